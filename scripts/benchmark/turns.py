"""Subjects take turns (A B C A B C ...), each in a process of its own, and only one works at a time.

So whatever else the machine does hits all of them alike. Figures are medians; ratios are medians of the ratios within
a turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minimoe import openmp

Figures = dict[str, float]

ROOT = Path(__file__).resolve().parents[2]  # this checkout
QUIET = 0.5  # seconds before each turn: the threads of the last one go on spinning for 0.25
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000000"}
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


class Worker:
    """A subject in a process of its own, which works only between `go` and the answer.

    Args:
        job: a function that prepares the subject, as `training.train_step`; see `worker.py`.
        checkout: whose `minimoe` is measured.
        environment: OpenMP's variables; default those that the `minimoe` command of this checkout sets.
        arguments: of the job, as JSON can write them.
    """

    def __init__(
        self, job: str, *, checkout: Path = ROOT, environment: dict[str, str] | None = None, **arguments: Any
    ) -> None:
        # Its folder holds these scripts and no `minimoe`, which thereby is the one of PYTHONPATH.
        self._folder = tempfile.TemporaryDirectory()
        Path(self._folder.name, "scripts").symlink_to(ROOT / "scripts")
        module, _, name = job.partition(".")
        waiting = openmp.environment() if environment is None else environment
        request = {"module": module, "job": name, "checkout": str(checkout), **arguments}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.benchmark.worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._folder.name,
            env=os.environ | waiting | {"PYTHONPATH": str(checkout)},
        )

    def answer(self) -> Figures:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker died: {self.process.args!r}")
        return json.loads(line)

    def go(self) -> Figures:
        assert self.process.stdin is not None
        time.sleep(QUIET)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let it end; one that is still at work is killed."""
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self._folder.cleanup()


def take_turns(workers: dict[str, Worker], rounds: int, seconds: float, warm_up: int) -> dict[str, list[Figures]]:
    """Figures of at least `rounds` rounds and so many seconds, by subject, after `warm_up` rounds for nothing.

    In a subject's first rounds oneDNN builds its kernels and memory grows. The workers have ended afterwards.
    """
    figures: dict[str, list[Figures]] = {name: [] for name in workers}
    try:
        for worker in workers.values():
            worker.answer()  # prepared
        for worker in [*workers.values()] * warm_up:
            worker.go()
        start = time.perf_counter()
        while len(figures[next(iter(workers))]) < rounds or time.perf_counter() - start < seconds:
            for name, worker in workers.items():
                figures[name].append(worker.go())
    finally:
        for worker in workers.values():
            worker.end()
    return figures


def openmp_environment(checkout: Path) -> dict[str, str]:
    """What the `minimoe` command of another checkout sets for OpenMP."""
    if not (checkout / "minimoe" / "openmp.py").exists():
        return SPINNING  # what it set before that file was there
    code = "import json; from minimoe import openmp; print(json.dumps(openmp.environment()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def median(figures: list[Figures], name: str = "seconds") -> float:
    return statistics.median(figure[name] for figure in figures)


def ratios(figures: list[Figures], base: list[Figures], name: str = "seconds") -> list[float]:
    """figures / base within each turn."""
    return [a[name] / b[name] for a, b in zip(figures, base, strict=True)]


def ratio(figures: list[Figures], base: list[Figures], name: str = "seconds") -> float:
    """Their median."""
    return statistics.median(ratios(figures, base, name))


def spread(figures: list[Figures], base: list[Figures], name: str = "seconds") -> str:
    """Their quartiles, to tell a difference from noise."""
    values = ratios(figures, base, name)
    low, _, high = statistics.quantiles(values if len(values) > 1 else values * 2, n=4, method="inclusive")
    return f"{low:.3f} to {high:.3f}"
