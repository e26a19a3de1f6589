"""Kernels in C (`kernels.c`) for what a CPU does much faster in one pass than in several of torch's calls.

They are compiled when one is first needed, by the machine's C compiler and for exactly this CPU, which takes a second,
and kept in the user's cache folder; they share torch's threads. Without a compiler, and for what they are not made for
(other devices and number formats, a model under `torch.compile`), torch computes the same functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
WORK_OF_A_THREAD = 2**14  # numbers to read, at least: waking another one takes about as long


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or platform.system() != "Linux":
        return None
    flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    # The OpenMP that torch has loaded comes first, so that no second one is: its threads would compete for the cores.
    loaded = sorted(set(re.findall(r"/\S*/lib[gi]omp\S*", Path("/proc/self/maps").read_text())))
    command = [compiler, *flags, str(SOURCE), "-Wl,--as-needed", *loaded, "-o"]
    cpu = re.findall(r"^(?:flags|Features|model name).*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    made_from = "\0".join([SOURCE.read_text(), *command, *sorted(set(cpu))])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minimoe"
    compiled = folder / f"kernels-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(compiled))
    except OSError:  # not there yet
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / compiled.name
            subprocess.run([*command, str(target)], check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(str(target))
            target.replace(compiled)  # whole or not at all, whoever else compiles now
        return library
    except (OSError, subprocess.SubprocessError):
        return None


def available() -> bool:
    """Whether this machine has the kernels; compiles them if need be."""
    return _library() is not None


@cache
def _kernel(name: str, dtype: torch.dtype, signature: str) -> Callable[..., None] | None:
    """A C function; of its arguments, `p` are addresses and `n` numbers, and the last is the number of threads."""
    library = _library()
    if library is None:
        return None
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_long}
    function = library[f"{name}_{SUFFIXES[dtype]}"]
    function.argtypes = [*(kinds[letter] for letter in signature), ctypes.c_int]
    function.restype = None
    return function


def _threads(work: int) -> int:
    return min(torch.get_num_threads(), work // WORK_OF_A_THREAD + 1)


def _made_for(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def swiglu(gate_up: Tensor) -> Tensor:
    """(n, 2I), gate first -> silu(gate) * up (n, I)."""
    kernel = _kernel("swiglu", gate_up.dtype, "ppnn") if _made_for(gate_up) else None
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if kernel is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    out = gate_up.new_empty(rows, width)
    kernel(gate_up.data_ptr(), out.data_ptr(), rows, width, _threads(gate_up.numel()))
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The output again, and the gradient of gate_up (n, 2I), from the output's `grad` (n, I), which is overwritten."""
    both = _made_for(gate_up) and grad.dtype == gate_up.dtype and grad.is_contiguous()
    kernel = _kernel("swiglu_backward", gate_up.dtype, "pppnn") if both else None
    grad_gate_up = torch.empty_like(gate_up)
    rows, width = grad.shape
    if kernel is None:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        out = silu * up
        torch.mul(grad, silu, out=grad_gate_up[:, width:])
        torch.ops.aten.silu_backward(grad.mul_(up), gate, grad_input=grad_gate_up[:, :width])
        return out, grad_gate_up
    addresses = (gate_up.data_ptr(), grad.data_ptr(), grad_gate_up.data_ptr())
    kernel(*addresses, rows, width, _threads(gate_up.numel()))
    return grad, grad_gate_up


def products(matrices: Tensor, scales: Tensor | None, x: Tensor, ids: Tensor, copies: int = 1) -> Tensor:
    """y[n] = matrices[ids[n]] @ x[n // copies], every matrix read once. For few rows, and without gradients.

    There is no other way than the kernel: ask `available` first.

    Args:
        matrices: (E, out, in), float32, bfloat16 or int8, on the CPU.
        scales: (E, out) float32, by which the outputs are multiplied, or None.
        x: (N / copies, in).
        ids: (N,) int64, from 0 to E - 1.

    Returns:
        (N, out) float32.
    """
    kernel = _kernel("products", matrices.dtype, "pppnppnnnn")
    assert kernel is not None
    assert matrices.is_contiguous()
    assert ids.is_contiguous()
    count, outputs, inputs = matrices.shape
    rows = len(ids)
    x = x.float().contiguous()
    y = x.new_empty(rows, outputs)
    scales_at = None if scales is None else scales.data_ptr()
    addresses = (matrices.data_ptr(), scales_at, ids.data_ptr(), count, x.data_ptr(), y.data_ptr())
    kernel(*addresses, rows, copies, inputs, outputs, _threads(rows * outputs * inputs))
    return y
