"""How OpenMP's threads wait for work: they spin on an idle machine and sleep beside other busy processes.

A small model starts thousands of parallel regions a second, and a thread that spins until the next one is there at
once, where one that sleeps has to be woken. But with as many threads as CPUs, a spinning thread beside a busy process
keeps the CPU from the thread that everybody waits for. No fixed spin count is good in both cases, so a thread of ours
compares what all processes use of our CPUs (proc(5), /proc/stat) with what we use, and switches.

The switch is libgomp's own: while it manages more threads than there are CPUs, its threads wait by the throttled spin
count, which is next to nothing (GCC's libgomp/config/linux/wait.h). The watching thread gets there by starting a team
of its own, whose threads sleep, and back by dismissing it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Up to 0.25 s of spinning. A wait policy would change the throttled spin count too.
OURS = {"GOMP_SPINCOUNT": "10000000"}
THREAD = "openmp-watch"
INTERVAL = 0.5  # seconds between two looks
CROWDED, FREE = 0.25, 0.15  # CPUs that others take from us; /proc/stat counts ticks, which alone makes it up to 0.1
ROUNDS = 4  # looks in a row at a free machine after which threads spin again


class Usage(NamedTuple):
    """CPU time used until a moment, in seconds."""

    clock: float  # the moment
    everyone: float  # by all processes, on the CPUs we may run on
    own: float  # by this process


def environment() -> dict[str, str]:
    """The variables that minimoe sets before torch is loaded; none if the user has decided how threads wait."""
    present = {name: os.environ[name] for name in NAMES if name in os.environ}
    return OURS if present in ({}, OURS) else {}


def configure() -> None:
    """Set them for this process and those it starts."""
    os.environ.update(environment())


def watch(stat: Path = Path("/proc/stat")) -> bool:
    """Let OpenMP's threads sleep while others are busy, from now until the process ends; torch must be loaded.

    Returns:
        Whether they are watched. There is nothing to do without `configure`, Linux or libgomp, with one thread, or
        with more threads than CPUs, which never spin.
    """
    torch = sys.modules.get("torch")
    if torch is None or sys.platform != "linux" or not environment() or "GOMP_SPINCOUNT" not in os.environ:
        return False
    cpus, threads, libraries = os.sched_getaffinity(0), torch.get_num_threads(), _libgomp()
    if not libraries or not 1 < threads <= len(cpus) or not os.access(stat, os.R_OK):
        return False
    if THREAD not in (thread.name for thread in threading.enumerate()):
        arguments = (libraries, stat, cpus, threads)
        threading.Thread(target=_switch, args=arguments, name=THREAD, daemon=True).start()
    return True


def used(stat: str, cpus: Collection[int], niced: bool = False) -> float:
    """CPU seconds used on `cpus` since the machine started, from the text of /proc/stat.

    Args:
        niced: also by niced processes, which otherwise make way for us.
    """
    ticks = 0
    for line in stat.splitlines():
        name, *columns = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system = map(int, columns[:3])
            ticks += user + system + nice * niced
    return ticks / os.sysconf("SC_CLK_TCK")


def lacking(before: Usage, after: Usage, threads: int, cpus: int) -> float:
    """How many CPUs our threads lack because others use them: about 1 beside one busy process, if all are ours."""
    others = (after.everyone - before.everyone) - (after.own - before.own)
    return threads + others / (after.clock - before.clock) - cpus


def decide(lacks: Iterable[float]) -> Iterator[bool]:
    """After each look, whether threads should sleep: at once when CPUs lack, until they were free for a while."""
    sleep, free = False, 0
    for lack in lacks:
        free = free + 1 if lack < FREE else 0
        sleep = lack > CROWDED or (sleep and free < ROUNDS)
        yield sleep


def _switch(libraries: list[ctypes.CDLL], stat: Path, cpus: Collection[int], threads: int) -> None:
    asleep = False
    for sleep in decide(_look(stat, cpus, threads)):
        if sleep != asleep:
            for library in libraries:
                if sleep:  # a team, each thread of which only asks for its number
                    anything = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
                    library.GOMP_parallel(anything, None, len(cpus) + 1, 0)
                else:  # in libgomp, of the calling thread only
                    library.omp_pause_resource_all(1)
            asleep = sleep


def _look(stat: Path, cpus: Collection[int], threads: int) -> Iterator[float]:
    niced = os.nice(0) > 0

    def usage() -> Usage:
        return Usage(time.monotonic(), used(stat.read_text(), cpus, niced), time.process_time())

    before = usage()
    while True:
        time.sleep(INTERVAL)
        after = usage()
        yield lacking(before, after, threads, len(cpus))
        before = after


def _libgomp() -> list[ctypes.CDLL]:
    """The copies of GCC's OpenMP in this process, usually torch's alone."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})
    libraries = [ctypes.CDLL(path) for path in paths]
    return [library for library in libraries if hasattr(library, "omp_pause_resource_all")]
