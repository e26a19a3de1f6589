"""How the process handles memory that was freed."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for what comes next, in this process from now on.

    By default it gives blocks of more than 32 MB back to the system at once, and the next step gets its activations as
    fresh pages, each of which has to be cleared: 6 % of a step of 4096 tokens at hidden size 512. Other C libraries
    than glibc are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)  # no block is a mapping of its own
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap's end is not given back
