"""Kernels in C (`kernels.c`) for what a CPU does much faster in one pass than in several of torch's calls.

They are compiled when one is first needed, by the machine's C compiler (`CC`, else `cc`) and for exactly this CPU, and
kept in the user's cache folder; that takes three seconds. They share torch's threads. Without a compiler, and for what
they are not made for (other devices and number formats, a model under `torch.compile`), torch computes the same.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
_PANEL = 32  # columns, WIDE in kernels.c
_WORD = 4  # bytes of it there: a number of float32, or two of bfloat16
_BLOCK = 1024  # rows of an expert that backward works on at a time, so that a cache holds what it makes of them
WORK_OF_A_THREAD = 2**14  # numbers to read, at least: waking another one takes about as long


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    name = os.environ.get("CC") or "cc"
    compiler = shutil.which(name)
    if platform.system() != "Linux":
        return f"they are for Linux, this is {platform.system()}"
    if compiler is None:
        return f"there is no C compiler {name!r}"
    flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    # The OpenMP that torch has loaded comes first, so that no second one is: its threads would compete for the cores.
    loaded = sorted(set(re.findall(r"/\S*/lib[gi]omp\S*", Path("/proc/self/maps").read_text())))
    command = [compiler, *flags, str(SOURCE), "-Wl,--as-needed", *loaded, "-lm", "-o"]
    cpu = re.findall(r"^(?:flags|Features|model name).*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    made_from = "\0".join([SOURCE.read_text(), *command, *sorted(set(cpu))])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minimoe"
    kept = folder / f"kernels-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    with suppress(OSError):  # not there yet
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / kept.name
        try:
            subprocess.run([*command, str(compiled)], check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(str(compiled))
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").splitlines()
            return f"{name} cannot compile them: {lines[0] if lines else f'exit status {error.returncode}'}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{name} cannot compile them: {error}"
        with suppress(OSError):  # a cache that cannot be written to costs three seconds each time
            folder.mkdir(parents=True, exist_ok=True)
            copy = shutil.copy(compiled, folder / f"{kept.name}.{os.getpid()}")
            Path(copy).replace(kept)  # whole or not at all, whoever else compiles now
    return library


def why_not() -> str | None:
    """What keeps this machine from having the kernels; None when nothing does. Compiles them if need be."""
    library = _library()
    return library if isinstance(library, str) else None


# The arguments of each but the last, how many threads: addresses `p`, whole numbers `n`, fractions `f`.
_SIGNATURES = {
    "products": "pppnppfppnnnnn",
    "experts": "ppppppnppppnnnn",
    "attend": "ppppfppnnnnnn",
    "swiglu": "pppnnn",
    "swiglu_backward": "pppppnnn",
    "gather_rows": "pppnn",
    "sum_slots": "pppnnn",
    "rms_norm": "pppfnn",
    "rms_norm_backward": "pppppfnn",
    "heads": "pppppppfnnnnn",
    "heads_backward": "pppppppppfnnnnn",
    "grouped_swiglu": "ppppppppppnnnn",
    "grouped_swiglu_backward": "ppppppppppppppnnnnn",
    "newton_schulz": "pppnfffnnnn",
}
_KINDS: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    library = _library()
    assert not isinstance(library, str), library  # `made_for` is asked first
    function = library[f"{name}_{SUFFIXES[dtype]}"]
    function.argtypes = [*(_KINDS[letter] for letter in _SIGNATURES[name]), ctypes.c_int]
    function.restype = None
    return function


def _run(name: str, dtype: torch.dtype, threads: int, *arguments: Tensor | float | None) -> None:
    """Call the kernel for numbers of this type."""
    _kernel(name, dtype)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), threads)


def _threads(work: int) -> int:
    return min(torch.get_num_threads(), work // WORK_OF_A_THREAD + 1)


def made_for(*numbers: Tensor, float32: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels can be had for `numbers`, of float32 or bfloat16 alike, and others that must be float32.

    All must be contiguous, on the CPU, and not being compiled.
    """
    dtype = numbers[0].dtype  # loops, as this is asked hundreds of times a step
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    for x in numbers:
        if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
            return False
    for x in float32:
        if x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous():
            return False
    return not torch.compiler.is_compiling() and why_not() is None


class Matrices(NamedTuple):
    """Of as many outputs and inputs each; of int8 numbers an output's products are multiplied by its scale."""

    numbers: Tensor  # (E, out, in), float32, bfloat16 or int8, contiguous, on the CPU
    scales: Tensor | None  # (E, out) float32


# The next three are for few rows, as fast as memory is read, without gradients. They have no other form: ask `why_not`.


def products(
    matrices: Matrices,
    x: Tensor,
    ids: Tensor,
    copies: int = 1,
    norm: tuple[Tensor, float] | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """y[n] = matrices[ids[n]] @ x[n // copies], every matrix read once.

    Args:
        x: (N / copies, in).
        ids: (N,) int64, from 0 to E - 1.
        norm: weight (in,) float32 and eps of an RMS norm of x before.
        add: (N, out) float32, which the products are added to, in place.

    Returns:
        (N, out) float32; `add`, if there is one.
    """
    numbers, scales = matrices
    count, outputs, inputs = numbers.shape
    x, rows = x.float().contiguous(), len(ids)
    y = x.new_empty(rows, outputs) if add is None else add
    assert all(tensor.is_contiguous() for tensor in (numbers, ids, y))
    gains, eps, normed = (None, 0.0, None) if norm is None else (*norm, torch.empty_like(x))
    arguments = (x, gains, eps, normed, y, add is not None, rows, copies, inputs, outputs)
    _run("products", numbers.dtype, _threads(rows * outputs * inputs), numbers, scales, ids, count, *arguments)
    return y


def experts(gate_up: Matrices, down: Matrices, x: Tensor, ids: Tensor, weights: Tensor, add: Tensor) -> Tensor:
    """add[t] += the sum over s of weights[t, s] * down[e] @ swiglu(gate_up[e] @ x[t]), where e is ids[t, s].

    Args:
        gate_up, down: (E, 2I, D), gate first, and (E, D, I).
        x: (T, D).
        ids, weights: (T, k) int64 and float32.
        add: (T, D) float32, changed in place.

    Returns:
        `add`.
    """
    count, inputs, width = down.numbers.shape
    x, (tokens, slots) = x.float().contiguous(), ids.shape
    assert all(tensor.is_contiguous() for tensor in (gate_up.numbers, down.numbers, ids, weights, add))
    hidden, outputs = x.new_empty(tokens * slots, 2 * width), x.new_empty(tokens * slots, inputs)
    arguments = (ids, weights, count, x, hidden, outputs, add, tokens, slots, inputs, width)
    threads = _threads(tokens * slots * inputs * width)
    _run("experts", down.numbers.dtype, threads, *gate_up, *down, *arguments)
    return add


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a head to all positions of a cache.

    Args:
        q: (B, K, G, d), the G heads of each key head, contiguous.
        keys, values: (B, K, L, d), the first L positions of larger buffers.
        bias: (B, L) float32, added to the scores, or None.

    Returns:
        (B, K, G, d).
    """
    batch, kv_heads, group, head_dim = q.shape
    sequences, length, stride = batch * kv_heads, keys.shape[2], keys.stride(1)
    assert keys.stride() == values.stride() == (kv_heads * stride, stride, head_dim, 1)
    assert q.is_contiguous()
    assert bias is None or bias.is_contiguous()
    scores, out = q.new_empty(sequences, group, length, dtype=torch.float32), torch.empty_like(q)
    arguments = (bias, scale, scores, out, sequences, kv_heads, group, length, stride, head_dim)
    _run("attend", q.dtype, _threads(2 * sequences * group * length * head_dim), q, keys, values, *arguments)
    return out


# The next three have their other form here.


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, each row times its weight, zeros for rows without one.

    Args:
        gate_up: (n, 2I), gate first.
        weights: (m,), m <= n, of the first rows; None for 1 each.

    Returns:
        (n, I).
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    weighted = rows if weights is None else weights.shape[0]
    if not made_for(gate_up, float32=() if weights is None else (weights,)):
        gate, up = gate_up.chunk(2, dim=-1)
        out = F.silu(gate).mul_(up)
        if weights is not None:
            out[:weighted].mul_(weights[:, None])
            out[weighted:] = 0
        return out
    out = gate_up.new_empty(rows, width)
    _run("swiglu", gate_up.dtype, _threads(gate_up.numel()), gate_up, weights, out, rows, weighted, width)
    return out


def swiglu_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output again, and the gradients of gate_up (n, 2I) and of the weights (m,), from the output's.

    `grad` (n, I) is overwritten.
    """
    (rows, width), weighted = grad.shape, weights.shape[0]
    grad_gate_up, grad_weights = torch.empty_like(gate_up), torch.empty_like(weights)
    if not made_for(gate_up, grad, float32=(weights,)):
        gate, up = gate_up[:weighted].chunk(2, dim=-1)
        grad_out, out = grad[:weighted], torch.zeros_like(grad)
        silu = F.silu(gate)
        activated = torch.mul(silu, up, out=out[:weighted])
        grad_weights.copy_((grad_out * activated).sum(1, dtype=torch.promote_types(grad.dtype, weights.dtype)))
        activated.mul_(weights[:, None])
        grad_gate_up[weighted:] = 0
        torch.mul(grad_out.mul_(weights[:, None]), silu, out=grad_gate_up[:weighted, width:])
        torch.ops.aten.silu_backward(grad_out.mul_(up), gate, grad_input=grad_gate_up[:weighted, :width])
        return out, grad_gate_up, grad_weights
    arguments = (gate_up, weights, grad, grad_gate_up, grad_weights, rows, weighted, width)
    _run("swiglu_backward", gate_up.dtype, _threads(gate_up.numel()), *arguments)
    return grad, grad_gate_up, grad_weights


def gather_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """rows[ids]: (T, D), (N,) -> (N, D)."""
    if not made_for(rows):
        return rows.index_select(0, ids)
    out = rows.new_empty(ids.shape[0], rows.shape[1])
    _run("gather_rows", rows.dtype, _threads(out.numel()), rows, ids, out, *out.shape)
    return out


# What follows has its other form where it is called: ask `made_for` there.


def sum_slots(rows: Tensor, places: Tensor) -> Tensor:
    """The sum over s of rows[places[t, s]], added up in float32: rows (N, D), places (T, k) -> (T, D)."""
    tokens, slots = places.shape
    out = rows.new_empty(tokens, rows.shape[1])
    _run("sum_slots", rows.dtype, _threads(rows.numel()), rows, places, out, tokens, slots, rows.shape[1])
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x and weight (D,) float32."""
    width = x.shape[-1]
    _run("rms_norm", out.dtype, _threads(x.numel()), x, weight, out, eps, x.numel() // width, width)
    return out


def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (D,), float32, from that of the output."""
    grad_x, width, threads = torch.empty_like(x), x.shape[-1], _threads(x.numel())
    parts = weight.new_zeros(threads, width)
    arguments = (x, weight, grad, grad_x, parts, eps, x.numel() // width, width)
    _run("rms_norm_backward", grad.dtype, threads, *arguments)
    return grad_x, parts.sum(0)


def heads(
    qkv: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, length: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated heads of C rows of `length` tokens each, in the order of attention's products.

    Args:
        qkv: (C * n, (H + 2K) * d), what the projections gave.
        gains: (H + K, d) float32, the weights of the norms.
        cos, sin: (C * n, d) float32, of each token's position.
        eps: of the norms.
        kv_heads: K.

    Returns:
        q (C*K, n*R, d) with R = H/K, by position, then head of the group; k and v (C*K, n, d).
    """
    tokens, (normed, head_dim) = qkv.shape[0], gains.shape
    sequences, group = tokens // length * kv_heads, normed // kv_heads - 1
    q = qkv.new_empty(sequences, length * group, head_dim)
    k, v = (qkv.new_empty(sequences, length, head_dim) for _ in range(2))
    arguments = (qkv, gains, cos, sin, q, k, v, eps, tokens, length, kv_heads, group, head_dim)
    _run("heads", qkv.dtype, _threads(qkv.numel()), *arguments)
    return q, k, v


def heads_backward(
    qkv: Tensor,
    gains: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    length: int,
    grads: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
) -> Tensor:
    """The gradient of qkv into `out`, that of the gains is returned; `grads` are of q, and in float32 of k and v."""
    (normed, head_dim), threads = gains.shape, _threads(qkv.numel())
    kv_heads = grads[1].shape[0] * length // qkv.shape[0]
    parts = gains.new_zeros(threads, normed, head_dim)
    shape = (qkv.shape[0], length, kv_heads, normed // kv_heads - 1, head_dim)
    _run("heads_backward", qkv.dtype, threads, qkv, gains, cos, sin, *grads, out, parts, eps, *shape)
    return parts.sum(0)


def multiplies_experts(tokens: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `grouped_swiglu` can be had for these, and is faster than a library's products one after the other.

    It is where its tiles stay in registers, and where bfloat16 is multiplied in vectors: AMX's tiles are faster than
    these. A thread needs a panel of columns.
    """
    in_panels = gate_up.shape[2] % _PANEL == 0 and down.shape[2] % _PANEL == 0
    enough = down.shape[2] >= _PANEL * torch.get_num_threads()
    if not (in_panels and enough and made_for(tokens, float32=(gate_up, down))):
        return False
    if tokens.dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_avx512_supported()


def grouped_swiglu(
    tokens: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """SwiGLU of rows sorted by expert, each times its weight, with products of the tokens' number format.

    Args:
        tokens: (T, D) float32 or bfloat16.
        ids: (N,) int64, the token of each row.
        weights: (N,) float32.
        gate_up, down: (E, 2I, D), gate first, and (E, D, I), float32.
        ends: (E,) int64, where each expert's rows end.

    Returns:
        The pre-activations (N, 2I), for backward, and the results (N, D), in the tokens' format.
    """
    experts, inputs, width = down.shape
    hidden, out = tokens.new_empty(len(ids), 2 * width), tokens.new_empty(len(ids), inputs)
    activated = tokens.new_empty(_largest_group(ends), width)
    panels = tokens.new_empty(torch.get_num_threads(), max(inputs, width), _PANEL)
    operands = (tokens, ids, weights, gate_up, down, ends, hidden, out, activated, panels)
    sizes = (panels[0].nbytes // _WORD, experts, inputs, width)
    _run("grouped_swiglu", tokens.dtype, torch.get_num_threads(), *operands, *sizes)
    return hidden, out


def grouped_swiglu_backward(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ends: Tensor,
    hidden: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows (N, D) in the tokens' format, and of weights, gate_up and down in float32.

    Args:
        hidden: (N, 2I), the pre-activations.
        grad: (N, D), of the results.
    """
    (experts, inputs, width), threads = down.shape, torch.get_num_threads()
    most = min((_largest_group(ends) + 1) // 2 * 2, _BLOCK)
    buffers = tokens.new_empty(most, 6 * width + 2 * inputs)
    panels = tokens.new_empty(threads, max(inputs, 2 * width), _PANEL)
    grad_rows, grad_weights = torch.empty_like(grad), weights.new_zeros(threads, len(ids))
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    operands = (tokens, ids, weights, gate_up, down, ends, hidden, grad)
    results = (grad_rows, grad_weights, grad_gate_up, grad_down)
    sizes = (panels[0].nbytes // _WORD, experts, most, inputs, width)
    _run("grouped_swiglu_backward", tokens.dtype, threads, *operands, *results, buffers, panels, *sizes)
    return grad_rows, grad_weights.sum(0), grad_gate_up, grad_down


def _largest_group(ends: Tensor) -> int:
    return int(ends.diff(prepend=ends.new_zeros(1)).max())


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Each matrix over its norm, then `steps` times x <- x (a + b x^T x + c (x^T x)^2).

    Args:
        matrices: (N, rows, columns) bfloat16, no more columns than rows. A thread computes one of them at a time.
        coefficients: a, b, c.
    """
    count, rows, columns = matrices.shape
    threads, out = min(torch.get_num_threads(), count), torch.empty_like(matrices)
    padded_rows, padded_columns = -(-rows // 4) * 4, -(-columns // 16) * 16
    scratch = matrices.new_empty(threads, 3 * padded_columns * (padded_rows + padded_columns))
    arguments = (matrices, out, scratch, scratch.shape[1], *coefficients, steps, count, rows, columns)
    _run("newton_schulz", matrices.dtype, threads, *arguments)
    return out
