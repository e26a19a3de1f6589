"""How OpenMP's threads wait: what is set, what counts as a busy machine, and that the switch does what it says."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from minimoe import openmp
from minimoe.openmp import Usage, decide, environment, lacking, used, watch

PATIENCE = 120.0  # seconds after which a process counts as hanging
TICK = os.sysconf("SC_CLK_TCK") if sys.platform == "linux" else 100
STAT = """cpu  1110 600 330 9000 50 60 70 80 0 0
cpu0 10 100 30 4000 20 30 30 40 0 0
cpu1 100 200 100 3000 20 20 20 20 0 0
cpu12 1000 300 200 2000 10 10 20 20 0 0
intr 123 0 9
ctxt 456
"""


def test_user_and_system_time_of_our_cpus_counts():
    assert used(STAT, {0, 1}) == pytest.approx((10 + 30 + 100 + 100) / TICK)
    assert used(STAT, {12}) == pytest.approx(1200 / TICK)
    assert used(STAT, {2}) == 0
    assert used("", {0}) == 0


def test_niced_processes_count_only_beside_a_niced_run():
    assert used(STAT, {1}, niced=True) - used(STAT, {1}) == pytest.approx(200 / TICK)


@pytest.mark.parametrize(
    ("everyone", "own", "threads", "cpus", "lack"),
    [
        (2.0, 2.0, 2, 2, 0.0),  # we alone
        (2.0, 1.4, 2, 2, 0.6),  # one busy process gets its share beside our two threads
        (1.0, 0.0, 2, 2, 1.0),  # we wait for something else meanwhile
        (2.0, 1.0, 2, 8, -5.0),  # room for everyone
        (8.0, 4.0, 8, 8, 4.0),
        (1.0, 1.05, 2, 2, -0.05),  # ticks are coarse
    ],
)
def test_what_others_use_counts_where_it_leaves_too_few_cpus_for_our_threads(everyone, own, threads, cpus, lack):
    before, after = Usage(10.0, 100.0, 50.0), Usage(12.0, 100.0 + 2 * everyone, 50.0 + 2 * own)
    assert lacking(before, after, threads, cpus) == pytest.approx(lack)


@pytest.mark.parametrize(
    ("lacks", "sleeps"),
    [
        ([0.0, 0.1, -3.0, 0.2], "...."),
        ([0.0, 0.9, 0.9], ".##"),  # at once
        ([0.9, 0.0, 0.0, 0.0, 0.0, 0.0], "####.."),  # not for a short break of the others
        ([0.9, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0], "#######."),  # a little use is no reason to begin, nor to end
        ([0.9, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0], "########."),
    ],
)
def test_threads_sleep_at_once_and_spin_again_after_a_while(lacks, sleeps):
    assert "".join(".#"[sleep] for sleep in decide(lacks)) == sleeps


@pytest.fixture
def unset(monkeypatch) -> pytest.MonkeyPatch:
    for name in openmp.NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_spin_count_is_set_for_this_process_and_those_it_starts(unset):
    assert environment() == {"GOMP_SPINCOUNT": "10000000"}
    unset.setenv("GOMP_SPINCOUNT", "")  # so that it is put back
    unset.delenv("GOMP_SPINCOUNT")
    openmp.configure()
    assert environment().items() <= os.environ.items()
    assert environment()  # which a minimoe started by minimoe does not take for the user's


@pytest.mark.parametrize("name", openmp.NAMES)
def test_what_the_user_has_set_stays_and_nothing_is_added_or_watched(unset, name):
    unset.setenv(name, "0")
    before = dict(os.environ)
    openmp.configure()
    assert dict(os.environ) == before
    assert not watch()


def test_nothing_is_watched_where_threads_cannot_get_in_the_way(unset):
    threads = torch.get_num_threads()
    assert not watch()  # nothing was configured
    unset.setenv("GOMP_SPINCOUNT", "10000000")
    try:
        torch.set_num_threads(1)
        assert not watch()
        torch.set_num_threads(len(os.sched_getaffinity(0)) + 1 if sys.platform == "linux" else 999)
        assert not watch()
    finally:
        torch.set_num_threads(threads)


# After each line on its standard input it says how long its threads went on after a parallel region, in CPU seconds.
WATCHED = """
import sys, time
from pathlib import Path
stat, sys.argv[0] = Path(sys.argv[1]), "minimoe"  # the command, which sets the environment before it loads torch
from minimoe import openmp
openmp.configure()
import torch
x = torch.ones(1 << 20).add_(1)
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "watch":
        print(openmp.watch(stat) and openmp.watch(stat), flush=True)
    else:
        x.add_(1)
        started = time.process_time()
        time.sleep(0.3)
        print(time.process_time() - started, flush=True)
"""


@contextmanager
def watched(stat: Path) -> Iterator[tuple[Callable[[str], str], Callable[..., None]]]:
    """A process that watches: how to ask it, and how to wait until it has so many threads more than it began with."""
    env = {name: value for name, value in os.environ.items() if name not in openmp.NAMES}
    env["OMP_NUM_THREADS"] = str(CPUS)
    command = [sys.executable, "-c", WATCHED, str(stat)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(line: str) -> str:
        print(line, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    def more_threads(count: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        deadline = time.monotonic() + PATIENCE
        while threads() - before != count:
            assert time.monotonic() < deadline, (before, threads())
            meanwhile()
            time.sleep(0.02)

    def threads() -> int:
        return len(os.listdir(f"/proc/{process.pid}/task"))

    try:
        assert process.stdout.readline() == "ready\n"
        before = threads()
        assert ask("watch") == "True"
        yield ask, more_threads
        process.stdin.close()
        assert process.wait(PATIENCE) == 0  # the watching thread holds nobody up
    finally:
        process.kill()
        process.wait()


CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
needs_two_cpus = pytest.mark.skipif(CPUS < 2, reason="threads wait for each other on Linux with 2 CPUs or more")


@needs_two_cpus
def test_threads_spin_until_others_are_busy_and_again_when_they_are_gone(tmp_path):
    stat, used = tmp_path / "stat", itertools.count(step=1000)

    def others_work() -> None:  # far more than can be used between two looks
        (tmp_path / "next").write_text(f"cpu{min(os.sched_getaffinity(0))} {next(used) * TICK} 0 0 0\n")
        (tmp_path / "next").replace(stat)

    others_work()
    with watched(stat) as (ask, more_threads):
        more_threads(1)
        spinning = [float(ask("go on")) for _ in range(5)]
        more_threads(1 + CPUS, meanwhile=others_work)
        sleeping = [float(ask("go on")) for _ in range(5) if others_work() is None]
        assert min(sleeping) < max(spinning) / 4
        more_threads(1)
        more_threads(1 + CPUS, meanwhile=others_work)  # and it ends in this state


@needs_two_cpus
def test_busy_processes_beside_it_are_seen():
    with watched(Path("/proc/stat")) as (_, more_threads):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CPUS)]
        try:
            more_threads(1 + CPUS)
        finally:
            for process in busy:
                process.kill()
                process.wait()
