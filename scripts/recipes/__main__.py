"""`python -m scripts.recipes`: run recipes over seeds, keep their figures, write the page."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import scripts.recipes
from scripts.recipes.run import OUT, RECIPES, prepare


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.recipes",
        description=scripts.recipes.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (default 3)")
    parser.add_argument("--only", choices=RECIPES, nargs="*", help="these recipes; default: all")
    parser.add_argument("--page", type=Path, default=Path("docs/results/after_sft.md"), help="where the table goes")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    prepare()
    for seed in range(options.seeds):
        for name in options.only or RECIPES:
            file = OUT / f"{name}-{seed}.json"
            if file.exists() or (name == "start" and seed):
                continue
            started = time.monotonic()
            figures = RECIPES[name](seed)
            file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
            print(f"{name}, seed {seed}, {time.monotonic() - started:.0f} s: {json.dumps(figures)}", flush=True)
    write_page(options.page)


def write_page(page: Path) -> None:
    """Medians over seeds, with the least and the largest."""
    lines = [
        "# What the stages after SFT reach on the quickstart",
        f"Made by `python -m scripts.recipes` on {time.strftime('%Y-%m-%d')}, {platform.machine()}, 2 cores. Percent",
        "of held-out instructions that a program marks as followed: 1,000 of all tasks, 200 of others. A figure is",
        "the median over seeds, with the least and the largest; all seeds begin with one SFT model.",
        "",
        "| figure | median | least | largest | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in RECIPES:
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(OUT.glob(f"{name}-*.json"))]
        for key in found[0] if found else []:
            values = [figures[key] for figures in found]
            numbers = (statistics.median(values), min(values), max(values))
            lines.append(f"| {key} | {' | '.join(f'{value:,.1f}' for value in numbers)} | {len(values)} |")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {page}")


if __name__ == "__main__":
    main()
