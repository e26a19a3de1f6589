"""minimoe beside its peers, in one run: `python scripts/benchmark.py` prints a table and writes docs/benchmarks.md.

Every subject lives in a process of its own, and subjects take turns (A B C A B C ...), so that whatever else the
machine does hits all of them alike. Figures are medians; speed-ups are medians of the ratios within a turn. The
machine's ceilings (large matrix products, a large copy) are measured first, and figures are given as shares of
them too. What is measured is in `benchmark_subjects.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

Figures = dict[str, float]


class Worker:
    """A subject in a process of its own, which works only between `go` and the answer."""

    def __init__(self, job: str, **arguments: Any) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps({"job": job, **arguments})]
        # The environment that `minimoe` sets for itself, for every subject.
        environment = {**os.environ, "OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000000"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.answer()  # ready

    def answer(self) -> Figures:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} died")
        return json.loads(line)

    def go(self) -> Figures:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()


def work(request: dict[str, Any]) -> None:
    """The worker's side: prepare, then one run per line of standard input."""
    from benchmark_subjects import JOBS, Shape

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    if "shape" in request:
        request["shape"] = Shape(**request["shape"])
    run = JOBS[request.pop("job")](**request)
    print(json.dumps({}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)


def take_turns(workers: dict[str, Worker], rounds: int) -> dict[str, list[Figures]]:
    """Figures of every round by subject; the workers are ended."""
    figures: dict[str, list[Figures]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            figures[name].append(worker.go())
    for worker in workers.values():
        worker.process.communicate()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    a, rest = parser.parse_known_args()
    if a.worker:
        work(json.loads(a.worker))
        sys.exit()
    from benchmark_subjects import SHAPES
    shape, dtype, rounds = rest[0], rest[1], int(rest[2])
    names = rest[3:] or ["minimoe", "qwen3 eager", "qwen3 grouped_mm", "qwen3 grouped_mm compiled", "literal loop", "dense"]
    ws = {}
    for n in names:
        t0 = time.time(); ws[n] = Worker("train_step", subject=n, shape=asdict(SHAPES[shape]), dtype=dtype, device="cpu")
        print(n, "ready in %.0f s" % (time.time() - t0), flush=True)
    f = take_turns(ws, rounds)
    base = [x["seconds"] for x in f[names[0]]]
    for n in names:
        s = [x["seconds"] for x in f[n]]
        print("%-28s %.3f s  x%.2f  peak %.0f MB  %.0f GFLOP/s" % (n, statistics.median(s), statistics.median(a / b for a, b in zip(s, base)), statistics.median(x["peak_bytes"] for x in f[n]) / 1e6, SHAPES[shape].step_flops() / statistics.median(s) / 1e9))
