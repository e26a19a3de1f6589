"""`minimoe evaluate --tasks`: benchmark tasks through `lm-eval`, from files here or by the names that it knows.

The average is that of DCLM's CORE (arXiv 2406.11794): accuracies, rescaled so that guessing is 0 and all right is 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from minimoe.errors import UserError
from minimoe.extras import extra
from minimoe.generation.engine import Engine

# The first of these that a task has is shown and counts.
_ACCURACIES = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome."""

    task: str
    num_rows: int
    metric: str
    value: float
    standard_error: float | None
    chance: float | None  # of guessing; None where the metric is no accuracy
    metrics: dict[str, float]  # all that the task has

    @property
    def centered(self) -> float | None:
        """0 for guessing, 1 for all right."""
        return None if self.chance is None else (self.value - self.chance) / (1 - self.chance)


def read_tasks(words: str, rows: str | None) -> list[str | dict[str, Any]]:
    """Tasks for lm-eval.

    Args:
        words: YAML files, folders of them and names of lm-eval's own tasks, with commas between.
        rows: folder that files' relative `data_files` are in; None: a file's own folder.

    Raises:
        UserError: a file is none of lm-eval's task files, or names rows that are not there.
    """
    tasks: list[str | dict[str, Any]] = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        path = Path(os.path.expanduser(word))
        if path.is_dir():
            files = sorted(path.glob("*.yaml"))
            if not files:
                raise UserError(f"--tasks {word}: no .yaml file in it")
            tasks += [_read_task(file, rows) for file in files]
        elif path.suffix in (".yaml", ".yml"):
            tasks.append(_read_task(path, rows))
        else:
            tasks.append(word)
    if not tasks:
        raise UserError("--tasks names none", fix="give files, folders or names, e.g. --tasks configs/tasks")
    return tasks


def _read_task(path: Path, rows: str | None) -> dict[str, Any]:
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"task file not found: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # also !function, which would run code
        reason = str(error).replace("\n", " ")[:200]
        raise UserError(f"not a task file: {reason}", where=str(path), fix="plain YAML, without tags") from None
    if not isinstance(task, dict) or "task" not in task:
        raise UserError("not a task file: it has no `task`", where=str(path))
    base = Path(os.path.expanduser(rows)) if rows else path.parent
    files = task.get("dataset_kwargs", {}).get("data_files", {})
    for split, name in files.items():
        files[split] = str(base / name)
        if not (base / name).is_file():
            raise UserError(f"rows not found: {base / name}", where=str(path), fix="--data FOLDER says where they are")
    return task


def run_tasks(
    engine: Engine,
    tasks: Sequence[str | dict[str, Any]],
    *,
    chat: bool = False,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
) -> list[TaskResult]:
    """Score a model.

    Args:
        chat: contexts go through the chat template.
        limit: rows of each task.
        num_fewshot: solved examples before each row; None is what the task says.

    Raises:
        UserError: lm-eval does not know a task or cannot read its rows.
    """
    lm_eval = extra("lm_eval", "eval")
    from minimoe.evaluate.harness import HarnessModel

    with _quiet():
        try:
            found = lm_eval.simple_evaluate(
                HarnessModel(engine, batch_size),
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
        except (KeyError, ValueError, OSError, ConnectionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fix = "`lm-eval ls tasks` lists what it knows, and reads from the hub; or give a .yaml file"
            raise UserError(f"lm-eval cannot run the tasks: {reason[:300]}", fix=fix) from error
    return [_result(found, name) for name in found["results"] if name in found["samples"]]


def _result(found: dict[str, Any], name: str) -> TaskResult:
    values = found["results"][name]
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    metric = next((key for key in _ACCURACIES if key in metrics), next(iter(metrics)))
    rows = found["samples"][name]
    rows = list({row["doc_id"]: row for row in rows}.values())  # a filter each, of the same rows
    chance = None
    if metric in _ACCURACIES:
        choices = found["configs"][name]["output_type"] == "multiple_choice"
        chance = sum(1 / len(row["arguments"]) for row in rows) / len(rows) if choices else 0.0
    value = metrics[metric]
    # Of a mean of zeros and ones.
    error = math.sqrt(value * (1 - value) / (len(rows) - 1)) if chance is not None and len(rows) > 1 else None
    return TaskResult(name, len(rows), metric, value, error, chance, metrics)


def core(results: Sequence[TaskResult]) -> float | None:
    """Mean of the rescaled accuracies."""
    centered = [result.centered for result in results if result.centered is not None]
    return sum(centered) / len(centered) if centered else None


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval and datasets log what they do and draw bars for it; here the table says what is done."""
    import datasets

    names = ("lm_eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def run(
    model_dir: str, words: str, rows: str | None, *, device: str = "auto", json_output: bool = False, **options: Any
) -> None:
    """`minimoe evaluate --tasks`: score and print."""
    extra("lm_eval", "eval")  # before the model is loaded
    tasks = read_tasks(words, rows)
    results = run_tasks(Engine.from_pretrained(model_dir, device), tasks, **options)
    average = core(results)
    if json_output:
        listed = [asdict(result) | {"centered": result.centered} for result in results]
        print(json.dumps({"tasks": listed, "core": average}))
        return
    columns = [Column(name, no_wrap=True) for name in ("task", "rows", "metric", "value", "guessing", "rescaled")]
    table = Table(*columns, box=SIMPLE, padding=(0, 0))
    for result in results:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.3f}"
        chance = "" if result.chance is None else f"{result.chance:.3f}"
        centered = "" if result.centered is None else f"{result.centered:+.3f}"
        value = f"{result.value:.3f}{error}" if result.value < 1000 else f"{result.value:.2e}"
        table.add_row(result.task, f"{result.num_rows:,}", result.metric, value, chance, centered)
    if average is not None and len(results) > 1:
        table.add_section()
        table.add_row("average", "", "", "", "", f"{average:+.3f}")
    Console().print(table)
