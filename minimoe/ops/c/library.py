"""The C++ sources in this folder, compiled when they are first needed and called through ctypes.

The compiler (`CXX`, else `c++`; `MINIMOE_CXXFLAGS` are added to its options) makes them for exactly this CPU. The
result is kept in the user's cache folder, so that the few seconds are spent once. It shares torch's OpenMP threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minimoe.user_cache import user_cache

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
WORK_OF_A_THREAD = 2**14  # values to read, at least: waking another thread takes about as long
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}


class _Entry(ctypes.Structure):
    """What EXPORT in vec.h publishes: a function's address, and a letter for each of its parameters."""

    _fields_ = (("address", ctypes.c_void_p), ("kinds", ctypes.c_char_p))


def why_not() -> str | None:
    """What keeps this machine from having the C++ forms; None when nothing does. Compiles them if need be."""
    library = _library()
    return library if isinstance(library, str) else None


@torch.compiler.assume_constant_result
def there() -> bool:
    """Whether this machine has them."""
    return why_not() is None


def run(name: str, dtype: torch.dtype, work: int, tensors: tuple[Any, ...], *numbers: float) -> None:
    """Call the C++ function's instance for `dtype`, on as many threads as `work` (values read) is worth.

    Tensors may be None but for the first. On the meta device they have shapes only, and nothing is to be done.
    """
    if tensors[0].is_meta:
        return
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    threads = 1 if work < WORK_OF_A_THREAD else min(torch.get_num_threads(), work // WORK_OF_A_THREAD + 1)
    _function(name, dtype)(*addresses, *numbers, threads)


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    library = _library()
    assert not isinstance(library, str), library  # `why_not` is asked first
    entry = _Entry.in_dll(library, f"{name}_{_SUFFIXES[dtype]}")
    return ctypes.CFUNCTYPE(None, *(_KINDS[letter] for letter in entry.kinds.decode()))(entry.address)


@cache
def _library() -> ctypes.CDLL | str:
    try:
        folder = user_cache()
    except OSError as error:
        return f"there is no folder to keep them in: {error}"
    return load(os.environ.get("CXX") or "c++", os.environ.get("MINIMOE_CXXFLAGS", ""), folder)


def load(compiler: str, flags: str, folder: Path) -> ctypes.CDLL | str:
    """The sources compiled with `flags` added, kept in `folder`; or why they cannot be."""
    if platform.system() != "Linux":
        return f"they are for Linux, this is {platform.system()}"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}"
    command = [compiler, *_arguments(flags), "-o"]
    cpu = re.findall(r"^(?:flags|Features|model name).*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    made_from = "\0".join([*texts, *command, *sorted(set(cpu))])
    kept = folder / f"ops-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    with suppress(OSError):  # not there yet, or broken
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / kept.name
        try:
            # As one source, since reading the compiler's own headers takes as long as compiling any of them.
            source = "".join(f'#include "{path.name}"\n' for path in SOURCES)
            subprocess.run(
                [*command, str(compiled)], input=source.encode(), check=True, capture_output=True, timeout=300
            )
            library = ctypes.CDLL(str(compiled))
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").splitlines()
            errors = [line for line in lines if "error:" in line] or lines or [f"exit status {error.returncode}"]
            return f"{compiler} cannot compile them: {errors[0]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} cannot compile them: {error}"
        with suppress(OSError):  # a cache that cannot be written to costs those seconds each time
            folder.mkdir(parents=True, exist_ok=True)
            copy = shutil.copy(compiled, folder / f"{kept.name}.{os.getpid()}")
            Path(copy).replace(kept)  # whole or not at all, whoever else compiles now
    return library


def _arguments(flags: str) -> list[str]:
    own = "-std=gnu++17 -O3 -march=native -fopenmp -fPIC -shared -fvisibility=hidden -Wall -Wextra".split()
    own.append("-Wno-psabi")  # on how vectors are passed between files: none are
    if platform.machine() == "x86_64":
        own.append("-mprefer-vector-width=512")
    # The OpenMP that torch has loaded comes first, so that no second one is: its threads would compete for the cores.
    loaded = sorted(set(re.findall(r"/\S*/lib[gi]omp\S*", Path("/proc/self/maps").read_text())))
    source = [f"-I{SOURCES[0].parent}", "-x", "c++", "-", "-x", "none"]
    return [*own, *shlex.split(flags), *source, "-Wl,--as-needed", *loaded]
