"""One logger for a run: a live console, `metrics.jsonl` always, trackers when asked.

A row of `metrics.jsonl` is one JSON object with step and seconds (of training so far, without validation, samples and
saving). Training rows carry tokens, loss, lm_loss, load_balancing_loss, router_z_loss, lr, grad_norm,
tokens_per_second, memory_bytes (the most so far), batch_hash, and of each MoE layer router_confidence (the largest
probability, on average), expert_load (1 = fair share) and, where a bias selects, selection_bias; evaluation rows
val_loss, val_perplexity, val_bits_per_byte and evaluation_seconds. A step that went wrong has a row with event
(`non-finite` or `spike`), loss, grad_norm, skipped and batch_file; an expert that no token chooses any more one with
event `router_collapse` and experts ([layer, expert] each).
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from minimoe.config import LoggingConfig
from minimoe.errors import disk_errors
from minimoe.train.files import METRICS_FILE, SAMPLES_FILE
from minimoe.train.trackers import Trackers

# Of a row: the only fields that two equal runs differ in.
CLOCK_FIELDS = frozenset({"tokens_per_second", "seconds", "memory_bytes", "evaluation_seconds"})


class MetricsLogger:
    """Context manager around a run; on other ranks than the first it is silent.

    Args:
        folder: the run's folder.
        total_steps: for the progress bar.
        start_step: steps already done; later rows of an interrupted run are dropped from the file.
        wandb_run_id: id of the wandb run to continue; a new one is made when None.
    """

    def __init__(
        self,
        folder: Path,
        logging: LoggingConfig,
        *,
        total_steps: int,
        start_step: int,
        wandb_run_id: str | None,
        config: dict[str, Any],
        enabled: bool,
    ) -> None:
        self.enabled = enabled
        self.console = Console(quiet=not enabled)
        self.wandb_run_id = wandb_run_id
        self.seconds = 0.0  # of training so far; the loop adds to it, and every row has it
        self._trackers: Trackers | None = None
        if not enabled:
            return
        self._file, self._samples = folder / METRICS_FILE, folder / SAMPLES_FILE
        self.seconds = _drop_rows_after(self._file, start_step)
        _drop_rows_after(self._samples, start_step)
        self._stream = self._file.open("a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=start_step, status="")
        if logging.trackers:
            self._trackers = Trackers(
                folder, logging, start_step=start_step, wandb_run_id=wandb_run_id, config=config, warn=self._warn
            )
            self.wandb_run_id = self._trackers.wandb_run_id

    def __enter__(self) -> MetricsLogger:
        if self.enabled:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.enabled:
            self._progress.stop()
            with suppress(OSError):  # every row was flushed, and reported if that failed
                self._stream.close()

    def finish_trackers(self, report: Path, failed: bool) -> None:
        """After all else: the report is for them too."""
        if self._trackers is not None:
            self._trackers.finish(report, failed)

    def print(self, message: str) -> None:
        """A line above the progress bar."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.enabled:
            self._progress.update(self._task, completed=step)

    def log_training(self, row: dict[str, Any]) -> None:
        """A training row."""
        load = [share for layer in row["expert_load"] for share in layer]
        balance = f"  experts {min(load):.2f}-{max(load):.2f}" if load else ""
        status = f"loss {row['loss']:.3f}  {_short(row['tokens_per_second'])} tok/s{balance}"
        for name in ("reward_accuracy", "reward"):  # of the stages that have them, what is looked at first
            if name in row:
                status = f"{name.replace('_', ' ')} {row[name]:.3f}  {status}"
        self._write(row)
        if self.enabled:
            self._progress.update(self._task, completed=row["step"], status=status)
            if not self.console.is_terminal:
                self.print(f"step {row['step']:>6}  {status}  lr {row['lr']:.2e}  grad norm {row['grad_norm']:.2f}")

    def log_evaluation(self, row: dict[str, Any]) -> None:
        """An evaluation row."""
        self._write(row)
        found = [
            f"{name.removeprefix('val_').replace('_', ' ')} {value:.{2 if name == 'val_perplexity' else 4}f}"
            for name, value in row.items()
            if name.startswith("val_")
        ]
        self.print(f"step {row['step']:>6}  [bold]validation[/] {'  '.join(found)}")

    def log_sample(self, step: int, prompt: str, text: str, seconds: float) -> None:
        """A generated sample: on the console, in its own file, in the trackers."""
        if self.enabled:
            with disk_errors("samples", self._samples), self._samples.open("a", encoding="utf-8") as stream:
                stream.write(
                    json.dumps({"step": step, "prompt": prompt, "text": text, "seconds": round(seconds, 3)}) + "\n"
                )
            self.print(f"step {step:>6}  [dim]sample[/]")
            self.print(f"[cyan]{escape(prompt)}[/]{escape(text)}")
            if self._trackers is not None:
                self._trackers.log_sample(step, prompt, text)

    def log_event(self, row: dict[str, Any], message: str) -> None:
        """Something that a person should know of: a row and a line on the console."""
        self._write(row)
        self.print(f"step {row['step']:>6}  [bold yellow]warning[/] {escape(message)}")

    def _write(self, row: dict[str, Any]) -> None:
        if not self.enabled:
            return
        finite = {key: _json_safe(value) for key, value in row.items()} | {"seconds": round(self.seconds, 3)}
        with disk_errors("metrics", self._file):
            self._stream.write(json.dumps(finite) + "\n")
            self._stream.flush()
        if self._trackers is not None:
            self._trackers.log_row(row)

    def _warn(self, message: str) -> None:
        self.print(f"[bold yellow]warning[/] {escape(message)}")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a run, without the torn last line of a killed process."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _drop_rows_after(file: Path, step: int) -> float:
    """Keep rows up to `step`: what an interrupted run logged later will be logged again. Returns their seconds."""
    if not file.exists():
        return 0.0
    kept = [row for row in read_metrics(file) if row["step"] <= step]
    replacement = file.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    replacement.replace(file)
    return float(kept[-1].get("seconds", 0.0)) if kept else 0.0


def _json_safe(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 02 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
