"""What is measured: a method for each section, which gives the rows of its table and has its title as docstring.

A worker's figures are of `training.py`, `generation.py` and `machine.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scripts.benchmark.shapes import GPU_SHAPES, QUICKSTART, SHAPES
from scripts.benchmark.turns import (
    PASSIVE,
    SPINNING,
    Figures,
    Worker,
    median,
    openmp_environment,
    ratio,
    spread,
    take_turns,
)

Rows = list[dict[str, Any]]

SECTIONS = "train optimizer layer attention decode busy rounding data".split()
OURS = ("minimoe", "before")
TRAINERS = "minimoe,before,qwen3 eager,qwen3 grouped_mm,qwen3 grouped_mm compiled,qwen3 literal loop,dense".split(",")
GENERATORS = ("minimoe", "minimoe int8", "before", "before int8", "qwen3 eager", "qwen3 grouped_mm")
ROUTINGS = ((4, 1408, 2), (8, 768, 2), (16, 512, 4), (32, 256, 4), (64, 256, 4))  # experts, width, k
SETTLE, STEADY = 3.0, 3.0  # seconds of steps in a turn of the busy section: until minimoe knows its company, and after


class Benchmark:
    """One run: the options, the ceilings, and a table of every section."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        shapes = {**SHAPES, **(GPU_SHAPES if options.device == "cuda" else {})}
        for name in options.shape or []:
            if name not in shapes:
                raise SystemExit(f"--shape {name}: there are {', '.join(shapes)}")
        self.shapes = {name: shape for name, shape in shapes.items() if name in (options.shape or shapes)}
        self.base = SHAPES["few"]
        self.before = {}
        if options.beside:
            checkout = options.beside.resolve()
            self.before = {"checkout": checkout, "environment": openmp_environment(checkout)}
        machine = {"machine": Worker("machine.ceilings", device=options.device)}
        self.ceilings = self.turns(machine, rounds=1)["machine"][0]

    def subjects(self, names: Sequence[str]) -> list[str]:
        """Those that are there and wanted: by default all, and of two checkouts nothing but themselves."""
        here = [name for name in names if self.before or not name.startswith("before")]
        if self.options.subjects:
            return [name for name in here if name == "minimoe" or name in self.options.subjects]
        return [name for name in here if not self.before or name.startswith(OURS)]

    def worker(self, job: str, subject: str, **arguments: Any) -> Worker:
        how = self.before if subject.startswith("before") else {}
        return Worker(job, subject=subject.replace("before", "minimoe"), device=self.options.device, **how, **arguments)

    def turns(
        self, workers: dict[str, Worker], rounds: int | None = None, warm_up: int = 2
    ) -> dict[str, list[Figures]]:
        """At least so many rounds, or else as many as the options ask for."""
        least = max(rounds or 0, self.options.rounds) if rounds != 1 else 1
        return take_turns(workers, least, 0 if rounds else self.options.seconds, warm_up)

    def train(self) -> Rows:
        """Whole optimizer steps"""
        rows = []
        for shape_name, shape in self.shapes.items():
            for dtype in self.options.dtype:
                subjects = self.subjects([*TRAINERS, *(["minimoe compiled"] if self.options.device == "cuda" else [])])
                common = {"shape": asdict(shape), "dtype": dtype}
                workers = {name: self.worker("training.train_step", name, **common) for name in subjects}
                figures = self.turns(workers, warm_up=5)  # the first steps take up to twice as long
                for name in subjects:
                    seconds = median(figures[name])
                    rows.append(
                        {
                            "shape": shape_name,
                            "dtype": dtype,
                            "subject": name,
                            "step, s": seconds,
                            **compared(figures, name),
                            "tokens/s": shape.batch * shape.sequence / seconds,
                            "GFLOP/s": shape.step_flops() / seconds / 1e9,
                            "of a large matmul's speed": shape.step_flops() / seconds / self.ceilings[dtype],
                            "peak memory, MB": median(figures[name], "peak_bytes") / 1e6,
                        }
                    )
        return rows

    def optimizer(self) -> Rows:
        """The optimizer's step alone: Muon for the matrices with AdamW for the rest, and AdamW"""
        rows = []
        for shape_name, shape in {**self.shapes, "quickstart": QUICKSTART}.items():
            for optimizer in ("muon", "adamw"):
                common = {"shape": asdict(shape), "name": optimizer}
                names = self.subjects(OURS)
                workers = {name: self.worker("training.optimizer_step", name, **common) for name in names}
                figures = self.turns(workers, rounds=7)
                for name in names:
                    row = {"shape": shape_name, "optimizer": optimizer, "subject": name}
                    rows.append(row | {"step, s": median(figures[name]), **compared(figures, name)})
        return rows

    def layer(self) -> Rows:
        """One MoE block, forward and backward, against nothing but its matmuls"""
        rows = []
        for experts, width, k in ROUTINGS:
            shape = replace(self.base, experts=experts, width=width, k=k)
            for dtype in self.options.dtype:
                common = {"shape": asdict(shape), "dtype": dtype}
                names = self.subjects([*OURS, "literal loop"])
                workers = {name: self.worker("training.moe_layer", name, **common) for name in names}
                workers["matmuls alone"] = Worker("training.bare_matmuls", device=self.options.device, **common)
                figures = self.turns(workers, rounds=5)
                routing = f"{experts} x {width}, top-{k}"
                for name in workers:
                    row = {"experts": routing, "dtype": dtype, "subject": name}
                    rows.append(row | {"block, s": median(figures[name]), **compared(figures, name)})
        return rows

    def attention(self) -> Rows:
        """One attention block, forward and backward: packed documents against one document a row"""
        rows = []
        for dtype in self.options.dtype:
            common = {"shape": asdict(self.base), "dtype": dtype}
            for documents in (1, 2, 4, 8):
                names = self.subjects(OURS)
                workers = {
                    name: self.worker("training.attention", name, documents=documents, **common) for name in names
                }
                if documents > 1:
                    workers["1 a row"] = self.worker("training.attention", "minimoe", documents=1, **common)
                figures = self.turns(workers, rounds=5)
                for name in names:
                    row = {"documents": f"{documents} a row", "dtype": dtype, "subject": name}
                    plain = figures.get("1 a row", figures["minimoe"])
                    row |= {"s": median(figures[name]), **compared(figures, name)}
                    rows.append(row | {"times plain causal": ratio(figures[name], plain)})
        return rows

    def decode(self) -> Rows:
        """Greedy tokens a second after a 128-token prompt, and the first token of a 512-token prompt"""
        rows = []
        for batch in (1, 8):
            common = {"shape": asdict(self.base), "batch": batch}
            names = self.subjects(GENERATORS)
            names = [name for name in names if self.options.device == "cpu" or not name.endswith("int8")]
            workers = {name: self.worker("generation.decode", name, **common) for name in names}
            machine = {"machine": Worker("machine.ceilings", device=self.options.device)}
            # Memory's speed decides here, and changes most: after five turns ratios were between 2.4 and 3.1.
            figures = self.turns(workers | machine, rounds=11)
            reading = median(figures.pop("machine"), "read")  # it changes with what else the machine does
            for name, values in figures.items():
                rows.append(
                    {
                        "batch": batch,
                        "subject": name,
                        "tokens/s": median(values, "tokens_per_second"),
                        "minimoe is faster by": ratio(figures["minimoe"], values, "tokens_per_second"),
                        "quartiles": spread(figures["minimoe"], values, "tokens_per_second"),
                        "of reading the weights": median(values, "bytes_per_second") / reading,
                        "first token, s": median(values, "first_token_seconds"),
                        "its times minimoe": ratio(values, figures["minimoe"], "first_token_seconds"),
                        "its quartiles": spread(values, figures["minimoe"], "first_token_seconds"),
                        "peak memory, MB": median(values, "peak_bytes") / 1e6,
                    }
                )
        return rows

    def busy(self) -> Rows:
        """A training step of the quickstart's model, alone and beside a busy process, by how OpenMP's threads wait"""
        settings: dict[str, dict[str, Any]] = {
            "minimoe": {"watch": True},
            "spinning": {"environment": SPINNING},
            "passive": {"environment": PASSIVE},
        }
        rows = []
        for beside, place in {"nothing": nothing_beside, "a busy process": busy_process}.items():
            common = {
                "shape": asdict(QUICKSTART),
                "dtype": "fp32",
                "optimizer": "muon",
                "settle": SETTLE,
                "at_least": STEADY,
            }
            workers = {
                name: self.worker("training.train_step", "minimoe", **common, **how) for name, how in settings.items()
            }
            with place():
                figures = self.turns(workers, rounds=7)
            for name, values in figures.items():
                row = {"beside": beside, "waiting": name, "step, s": median(values)}
                for other in ("passive", "spinning"):
                    row[f"of {other}'s speed"] = ratio(figures[other], values)
                    row[f"{other}: quartiles"] = spread(figures[other], values)
                rows.append(row)
        return rows

    def rounding(self) -> Rows:
        """Bits per byte of held-out text with exact and with int8 weights"""
        rows = []
        for name in ("stories", "english", "code"):
            text = self.options.texts.resolve() / f"valid_{name}.jsonl"
            worker = Worker("generation.rounding", model_dir=str(self.options.trained.resolve()), text=str(text))
            figures = self.turns({"trained": worker}, rounds=1)["trained"][0]
            bits = {weights: f"{value:.5f}" for weights, value in figures.items()}
            rows.append({"text": name, **bits, "int8 loses": f"{figures['int8'] / figures['exact'] - 1:.3%}"})
        return rows

    def data(self) -> Rows:
        """The loader, tokenisation, and the command line's start"""
        figures = self.turns({"data": Worker("machine.data")}, rounds=1)["data"][0]
        start = time.perf_counter()
        command = Path(sys.executable).with_name("minimoe")
        subprocess.run([str(command), "--help"], check=True, stdout=subprocess.DEVNULL)
        return [
            {"work": "loader, tokens/s of one process", "figure": figures["loader_tokens_per_second"]},
            {"work": "tokenisation, MB/s", "figure": figures["tokenised_mb_per_second"]},
            {"work": "minimoe --help, s", "figure": time.perf_counter() - start},
        ]


def compared(figures: dict[str, list[Figures]], name: str) -> dict[str, Any]:
    """A subject's time over minimoe's, and how much that varies."""
    ours = figures["minimoe"]
    return {"times minimoe": ratio(figures[name], ours), "quartiles": spread(figures[name], ours)}


@contextmanager
def nothing_beside() -> Iterator[None]:
    yield


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that keeps one core busy meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
