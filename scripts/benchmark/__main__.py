"""`python -m scripts.benchmark`: prints the tables of a run and writes them to docs/results/benchmark.md."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import scripts.benchmark
from scripts.benchmark.sections import SECTIONS, Benchmark, Rows
from scripts.circumstances import circumstances


def as_table(title: str, rows: Rows) -> Table:
    table = Table(title=title)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*map(spell, row.values()))
    return table


def as_markdown(title: str, rows: Rows) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([spell(value) for value in row.values()] for row in rows)]
    return f"## {title}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spell(value: Any) -> str:
    """Three digits that count."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=scripts.benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--section", choices=SECTIONS, nargs="+", help="default: all that can be run")
    parser.add_argument("--beside", type=Path, help="another checkout, measured as the subject `before`")
    parser.add_argument("--subjects", nargs="+", help="beside minimoe; default: all, with --beside `before` alone")
    parser.add_argument("--shape", nargs="+", help="of training and the optimizer, default: all")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    trained = Path("runs/quickstart/pretrain/final")
    parser.add_argument("--trained", type=Path, default=trained, help="model of the rounding section, skipped without")
    parser.add_argument("--texts", type=Path, default=Path("data/quickstart"), help="folder of its held-out texts")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each subject, at least")
    parser.add_argument("--seconds", type=float, default=40, help="training: measure for at least so long")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/benchmark.md"), help="page of the tables, of this run alone"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark.json"), help="the same as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    head = circumstances("One run of the benchmark", time.strftime("%Y-%m-%d %H:%M %Z"), command)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        os.environ.pop(name, None)  # the benchmark decides how threads wait
    benchmark, console = Benchmark(options), Console()
    possible = [name for name in SECTIONS if name != "rounding" or options.trained.exists()]
    tables: dict[str, Rows] = {
        "Ceilings of the machine (operations, bytes)": [
            {"ceiling": name, "G/s": value / 1e9} for name, value in benchmark.ceilings.items()
        ]
    }
    console.print(as_table(*next(iter(tables.items()))))
    for path in (options.out, options.json):
        path.parent.mkdir(parents=True, exist_ok=True)
    for section in options.section or possible:
        method = getattr(benchmark, section)
        title = method.__doc__
        tables[title] = method()
        console.print(as_table(title, tables[title]))
        # After each section, so that a run that is cut short leaves what it has.
        options.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
        blocks = [head, *(as_markdown(*table) for table in tables.items())]
        options.out.write_text("\n".join(blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
