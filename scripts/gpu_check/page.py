"""The results as a page: a table for each part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_page(out: Path, results: Path) -> None:
    """Make `page.md` of the lines in `results`."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    lines = ["# What a GPU computes, and how fast", "Made by `bash scripts/gpu_check.sh`.", ""]
    for name in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == name]
        ended = next((row for row in own if "outcome" in row), None)
        figures = [{key: value for key, value in row.items() if key != "part"} for row in own if "outcome" not in row]
        lines += [f"## {name}", ""]
        if ended:
            lines += [f"{ended['outcome']}, {ended['seconds']} s", ""]
        for columns in dict.fromkeys(tuple(figure) for figure in figures):
            alike = [figure for figure in figures if tuple(figure) == columns]
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(_shown(value) for value in figure.values()) + " |" for figure in alike]
            lines.append("")
    (out / "page.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
