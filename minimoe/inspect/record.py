"""What a run's folder says of the run: its rows as columns, its config, how it ended. Read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minimoe.errors import UserError
from minimoe.train.files import CONFIG_FILE, FACTS_FILE, METRICS_FILE, SAMPLES_FILE, STATUS_FILE

MOST_ROWS = 20_000  # of training that are read: of more, every so-many-th
_SAMPLES = 200  # read at most, the last ones


@dataclass
class Record:
    """One run. A column is NaN where a row does not have the value."""

    folder: Path
    config: dict[str, Any]
    status: dict[str, Any]
    facts: dict[str, Any]
    training: dict[str, np.ndarray]  # columns (N,), float64
    layers: dict[str, np.ndarray]  # columns (N, L) or (N, L, E), float64
    validation: dict[str, np.ndarray]  # columns (V,), float64
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    drawn_of: int  # rows of training that the file has
    name: str = field(default="")

    @property
    def steps(self) -> np.ndarray:
        """(N,) of the training rows."""
        return self.training.get("step", np.zeros(0))

    def axis(self, name: str, steps: np.ndarray) -> np.ndarray:
        """Where rows of these steps stand on an axis: tokens, FLOPs, or seconds of training."""
        column = {"step": "step", "seconds": "seconds"}.get(name, "tokens")
        if not len(self.steps):
            return np.full(len(steps), np.nan)
        # Before the first row that is logged, from 0.
        places = np.interp(steps, np.append(0, self.steps), np.append(0, self.training[column]))
        return places * self.facts.get("flops_per_token", np.nan) if name == "FLOPs" else places


def read_run(folder: Path) -> Record:
    """Read a run's folder, finished or not.

    Raises:
        UserError: there are no metrics in it.
    """
    file = folder / METRICS_FILE
    if not file.is_file():
        raise UserError(f"no run in {folder}: it has no {METRICS_FILE}", fix="give a run's folder, its output_dir")
    rows, drawn_of = _read_rows(file)
    training = [row for row in rows if "loss" in row and "event" not in row]
    validation = [row for row in rows if any(name.startswith("val_") for name in row)]
    vectors = {name for row in training[:1] + training[-1:] for name, value in row.items() if _is_vector(value)}
    return Record(
        folder=folder,
        config=_read_yaml(folder / CONFIG_FILE),
        status=_read_json(folder / STATUS_FILE),
        facts=_read_json(folder / FACTS_FILE),
        training=_columns(training),
        layers={name: column for name in sorted(vectors) if (column := _stack(training, name)) is not None},
        validation=_columns(validation),
        events=[row for row in rows if "event" in row],
        samples=_read_samples(folder / SAMPLES_FILE),
        drawn_of=drawn_of,
        name=folder.name,
    )


def _read_rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, of very many training rows only every so-many-th; and how many of training there are."""
    lines = file.read_bytes().splitlines()
    rare = [b'"val_' in line or b'"event"' in line for line in lines]
    count = len(lines) - sum(rare)
    stride = -(-count // MOST_ROWS) or 1
    rows, seen = [], 0
    for line, is_rare in zip(lines, rare, strict=True):
        seen += not is_rare
        if not (is_rare or seen % stride == 0 or seen in (1, count)):
            continue
        try:
            row = json.loads(line)
        except ValueError:  # the torn last line of a run that is writing, or was killed
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows, count


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    return {name: np.array([_number(row.get(name)) for row in rows], np.float64) for name in names}


def _stack(rows: list[dict[str, Any]], name: str) -> np.ndarray | None:
    """(N, ...) of a column of lists; None where their shapes differ."""
    shape = np.shape(rows[-1].get(name) or 0.0)
    try:
        values = [row[name] if row.get(name) else np.full(shape, np.nan) for row in rows]
        return np.array(values, np.float64)
    except (TypeError, ValueError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else np.nan


def _read_samples(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[-_SAMPLES:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "prompt", "text"} <= row.keys():
            found.append(row)
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
