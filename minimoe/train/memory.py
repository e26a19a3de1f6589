"""How much memory the process takes, and what it does with memory that was freed."""

from __future__ import annotations

import ctypes
import sys

import torch

# Of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that a GPU's tensors, or on a CPU the process, have taken so far; 0 where it is not known."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()


def process_peak(*, children: bool = False) -> int:
    """Bytes that the process has taken at most, or the largest of its children that have ended; 0: not known."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for what comes next, in this process from now on.

    By default it gives blocks of more than 32 MB back to the system at once, and the next step gets its activations as
    fresh pages, each of which has to be cleared: 6 % of a step of 4096 tokens at hidden size 512. Other C libraries
    than glibc are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)  # no block is a mapping of its own
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap's end is not given back
