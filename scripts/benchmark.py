"""minimoe beside its peers, in one run: `python scripts/benchmark.py` prints tables and rewrites docs/benchmarks.md.

Every subject lives in a process of its own, and subjects take turns (A B C A B C ...), so that whatever else the
machine does hits all of them alike. Figures are medians; ratios are medians of the ratios within a turn. The
machine's ceilings (large matrix products, a large copy and sum) are measured first, and figures are given as shares of
them too. What each job does is in `benchmark_subjects.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Figures = dict[str, float]
Rows = list[dict[str, Any]]

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARKER = "<!-- figures: written by scripts/benchmark.py, do not edit below -->"
TRAINERS = "minimoe,qwen3 eager,qwen3 grouped_mm,qwen3 grouped_mm compiled,qwen3 literal loop,dense".split(",")
GENERATORS = ("minimoe", "minimoe int8", "qwen3 eager", "qwen3 grouped_mm")
ROUTINGS = ((4, 1408, 2), (8, 768, 2), (16, 512, 4), (32, 256, 4), (64, 256, 4))  # experts, width, k
QUIET = 0.5  # seconds before each turn: the threads of the last one go on spinning for 0.25
SECTIONS = "train layer attention decode rounding data".split()


class Worker:
    """A subject in a process of its own, which works only between `go` and the answer."""

    def __init__(self, job: str, **arguments: Any) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps({"job": job, **arguments})]
        # What `minimoe` sets for itself, here for every subject.
        environment = {**os.environ, "OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000000"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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


def take_turns(workers: dict[str, Worker], rounds: int, seconds: float, warm_up: int) -> dict[str, list[Figures]]:
    """Figures of at least `rounds` rounds and so many seconds, by subject, after `warm_up` rounds for nothing.

    In a subject's first rounds oneDNN builds its kernels and memory grows.
    """
    for worker in workers.values():
        worker.answer()  # prepared
    for worker in [*workers.values()] * warm_up:
        worker.go()
    figures: dict[str, list[Figures]] = {name: [] for name in workers}
    start = time.perf_counter()
    while len(figures[next(iter(workers))]) < rounds or time.perf_counter() - start < seconds:
        for name, worker in workers.items():
            figures[name].append(worker.go())
    for worker in workers.values():
        worker.process.communicate()
    return figures


def median(figures: list[Figures], name: str = "seconds") -> float:
    return statistics.median(figure[name] for figure in figures)


def ratio(figures: list[Figures], base: list[Figures], name: str = "seconds") -> float:
    """Median over the turns of figures / base."""
    return statistics.median(a[name] / b[name] for a, b in zip(figures, base, strict=True))


class Benchmark:
    """One run: the options, the ceilings, and a table of every section."""

    def __init__(self, options: argparse.Namespace) -> None:
        from benchmark_subjects import GPU_SHAPES, SHAPES

        self.options = options
        shapes = {**SHAPES, **(GPU_SHAPES if options.device == "cuda" else {})}
        if options.shape not in (None, *shapes):
            raise SystemExit(f"--shape {options.shape}: there are {', '.join(shapes)}")
        self.shapes = {name: shape for name, shape in shapes.items() if options.shape in (None, name)}
        self.base = SHAPES["few"]
        self.ceilings = self.turns({"machine": Worker("ceilings", device=options.device)}, rounds=1)["machine"][0]

    def turns(
        self, workers: dict[str, Worker], rounds: int | None = None, warm_up: int = 2
    ) -> dict[str, list[Figures]]:
        return take_turns(workers, rounds or self.options.rounds, 0 if rounds else self.options.seconds, warm_up)

    def train(self) -> Rows:
        """Whole optimizer steps."""
        rows = []
        for shape_name, shape in self.shapes.items():
            for dtype in self.options.dtype:
                common = {"shape": asdict(shape), "dtype": dtype, "device": self.options.device}
                subjects = [*TRAINERS, *(["minimoe compiled"] if self.options.device == "cuda" else [])]
                workers = {name: Worker("train_step", subject=name, **common) for name in subjects}
                figures = self.turns(workers, warm_up=5)  # the first steps take up to twice as long
                for name in subjects:
                    seconds = median(figures[name])
                    rows.append(
                        {
                            "shape": shape_name,
                            "dtype": dtype,
                            "subject": name,
                            "step, s": seconds,
                            "times minimoe": ratio(figures[name], figures["minimoe"]),
                            "tokens/s": shape.batch * shape.sequence / seconds,
                            "GFLOP/s": shape.step_flops() / seconds / 1e9,
                            "of products' speed": shape.step_flops() / seconds / self.ceilings[dtype],
                            "peak memory, MB": median(figures[name], "peak_bytes") / 1e6,
                        }
                    )
        return rows

    def layer(self) -> Rows:
        """One MoE block, forward and backward, against nothing but its matrix products."""
        rows = []
        for experts, width, k in ROUTINGS:
            shape = replace(self.base, experts=experts, width=width, k=k)
            for dtype in self.options.dtype:
                common = {"shape": asdict(shape), "dtype": dtype, "device": self.options.device}
                workers = {name: Worker("moe_layer", subject=name, **common) for name in ("minimoe", "literal loop")}
                workers["products"] = Worker("bare_products", **common)
                figures = self.turns(workers, rounds=5)
                rows.append(
                    {
                        "experts": f"{experts} x {width}, top-{k}",
                        "dtype": dtype,
                        "MoE block, s": median(figures["minimoe"]),
                        "literal loop, s": median(figures["literal loop"]),
                        "products alone, s": median(figures["products"]),
                        "faster than the loop": ratio(figures["literal loop"], figures["minimoe"]),
                        "speed of the products": ratio(figures["products"], figures["minimoe"]),
                    }
                )
        return rows

    def attention(self) -> Rows:
        """One attention block, forward and backward: packed documents against one document a row."""
        rows = []
        for dtype in self.options.dtype:
            common = {"shape": asdict(self.base), "dtype": dtype, "device": self.options.device}
            workers = {f"{n} a row": Worker("attention", documents=n, **common) for n in (1, 2, 4, 8)}
            figures = self.turns(workers, rounds=5)
            for name, values in figures.items():
                plain = figures["1 a row"]
                rows.append(
                    {"documents": name, "dtype": dtype, "s": median(values), "times plain causal": ratio(values, plain)}
                )
        return rows

    def decode(self) -> Rows:
        """Greedy tokens a second after a 128-token prompt, and the prompt's own tokens a second."""
        rows = []
        for batch in (1, 8):
            common = {"shape": asdict(self.base), "batch": batch, "device": self.options.device}
            subjects = [name for name in GENERATORS if self.options.device == "cpu" or name != "minimoe int8"]
            workers = {name: Worker("decode", subject=name, **common) for name in subjects}
            # Memory's speed decides here, and changes most: after five turns ratios were between 2.4 and 3.1.
            figures = self.turns(workers | {"machine": Worker("ceilings", device=self.options.device)}, rounds=11)
            reading = median(figures.pop("machine"), "read")  # it changes with what else the machine does
            for name, values in figures.items():
                rows.append(
                    {
                        "batch": batch,
                        "subject": name,
                        "tokens/s": median(values, "tokens_per_second"),
                        "minimoe is faster by": ratio(figures["minimoe"], values, "tokens_per_second"),
                        "prefill, tokens/s": median(values, "prefill_tokens_per_second"),
                        "of reading the weights": median(values, "bytes_per_second") / reading,
                    }
                )
        return rows

    def rounding(self) -> Rows:
        """Bits per byte of held-out text with exact and with int8 weights."""
        rows = []
        for name in ("stories", "english", "code"):
            text = f"{self.options.texts}/valid_{name}.jsonl"
            worker = Worker("rounding", model_dir=str(self.options.trained), text=text)
            figures = self.turns({"trained": worker}, rounds=1)["trained"][0]
            bits = {weights: f"{value:.5f}" for weights, value in figures.items()}
            rows.append({"text": name, **bits, "int8 loses": f"{figures['int8'] / figures['exact'] - 1:.3%}"})
        return rows

    def data(self) -> Rows:
        """The loader, tokenisation, and the command line's start."""
        figures = self.turns({"data": Worker("data")}, rounds=1)["data"][0]
        start = time.perf_counter()
        command = Path(sys.executable).with_name("minimoe")
        subprocess.run([str(command), "--help"], check=True, stdout=subprocess.DEVNULL)
        return [
            {"work": "loader, tokens/s of one process", "figure": figures["loader_tokens_per_second"]},
            {"work": "tokenisation, MB/s", "figure": figures["tokenised_mb_per_second"]},
            {"work": "minimoe --help, s", "figure": time.perf_counter() - start},
        ]


def as_table(title: str, rows: Rows) -> Table:
    table = Table(title=title)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*map(spell, row.values()))
    return table


def as_markdown(title: str, rows: Rows) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([spell(value) for value in row.values()] for row in rows)]
    return f"### {title}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_document(tables: dict[str, Rows]) -> None:
    """Replace the tables that were measured now; each table is of one run, and others stay."""
    text, _, figures = DOCUMENT.read_text().partition(MARKER)
    blocks = {block.partition("\n")[0]: f"### {block.rstrip()}\n" for block in figures.split("### ")[1:]}
    blocks |= {title: as_markdown(title, rows) for title, rows in tables.items()}
    DOCUMENT.write_text(text + MARKER + "\n\n" + "\n".join(blocks.values()))


def spell(value: Any) -> str:
    """Three digits that count."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="sections, default all; may be repeated")
    parser.add_argument("--shape", help="one shape of the training section, default all")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], action="append", help="default both; may be repeated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    trained = Path("runs/quickstart/pretrain/final")
    parser.add_argument("--trained", type=Path, default=trained, help="model of the rounding section, skipped without")
    parser.add_argument("--texts", type=Path, default=Path("data/quickstart"), help="folder of its held-out texts")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every subject at least")
    parser.add_argument("--seconds", type=float, default=40, help="go on taking turns so long")
    parser.add_argument("--no-document", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark.json"))
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    options.dtype = options.dtype or ["fp32", "bf16"]
    benchmark, console = Benchmark(options), Console()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    ceilings = [{"ceiling": name, "G/s": value / 1e9, "on": machine} for name, value in benchmark.ceilings.items()]
    ceilings_title = "Ceilings of the machine (operations, bytes)"
    tables: dict[str, Rows] = {ceilings_title: ceilings}
    console.print(as_table(*next(iter(tables.items()))))
    for section in options.only or [name for name in SECTIONS if name != "rounding" or options.trained.exists()]:
        method = getattr(benchmark, section)
        title = method.__doc__.splitlines()[0] + (f" ({options.shape})" if section == "train" and options.shape else "")
        tables[title] = method()
        console.print(as_table(title, tables[title]))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(tables, indent=1))
    if options.only:  # the document's ceilings are those that its other tables' shares are of
        del tables[ceilings_title]
    if DOCUMENT.exists() and not options.no_document:
        write_document(tables)


if __name__ == "__main__":
    main()
