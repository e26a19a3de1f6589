"""Seconds and bytes of a piece of work, in the process that does it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], dict[str, float]]  # a prepared subject: does its work once, returns figures by name


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], Any], device: str, at_least: float = 0.4, times: int = 3) -> float:
    """Median seconds of a call; calls go on for `at_least` seconds, and there are at least so many."""
    seconds: list[float] = []
    while sum(seconds) < at_least or len(seconds) < times:
        seconds.append(timed(work, device))
    return statistics.median(seconds) if seconds else 0.0


def repeated(work: Callable[[], Any], device: str) -> Run:
    """Short work, repeated within each run."""
    return lambda: {"seconds": median_seconds(work, device)}


def resident_bytes(field: str) -> int:
    """`VmRSS` or its peak `VmHWM` of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def reset_peak(device: str) -> None:
    """Forget the peak so far: memory that only the set-up needed does not count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
