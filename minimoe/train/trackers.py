"""Experiment trackers beside `metrics.jsonl`, through accelerate's: Weights & Biases, TensorBoard, trackio.

None of them is needed: one that fails is reported once and left out, and training goes on. Offline unless asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minimoe.config import LoggingConfig
from minimoe.errors import UserError
from minimoe.train.files import CONFIG_FILE, METRICS_FILE

_WANDB_SECONDS = 30.0  # to wait for its server at the start
_HEATMAP_EVERY = 10  # training rows between two images of the experts' loads
_CELL = 8  # pixels of an expert's load

Act = Callable[[str, Any], None]


def check_trackers(names: tuple[str, ...]) -> None:
    """Before anything is loaded.

    Raises:
        UserError: one of them is not installed.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"logging.trackers: {name} is not installed", fix=f"pip install {name}, or 'minimoe[trackers]' for all"
            ) from None


class Trackers:
    """Those that the config names. `wandb_run_id` is kept with the run, which goes on under it when resumed.

    Args:
        start_step: steps already done.
        warn: says a line to the person.
    """

    def __init__(
        self,
        folder: Path,
        logging: LoggingConfig,
        *,
        start_step: int,
        wandb_run_id: str | None,
        config: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.wandb_run_id, self._warn, self._folder = wandb_run_id, warn, folder
        self._running: dict[str, Any] = {}
        self._rows = 0
        name = logging.run_name or folder.name
        for tracker in logging.trackers:
            if tracker == "wandb":
                self._start_wandb(logging, name, config)
            elif tracker == "tensorboard":
                # What an interrupted run logged later will be logged again.
                options = {"logging_dir": str(folder), "purge_step": start_step + 1 if start_step else None}
                if self._start(tracker, tracker, **options):
                    self._running[tracker].log({"config": _as_text(config)}, step=0)
            else:
                self._start(tracker, logging.project, name=name, config=config, embed=False)

    def log_row(self, row: dict[str, Any]) -> None:
        """The scalars of a row, and of some training rows the experts' loads as an image."""
        scalars = {key: value for key, value in row.items() if _is_scalar(value) and key != "step"}
        self._each(lambda _, it: it.log(scalars, step=row["step"]))
        if self._running and "expert_load" in row:
            if self._rows % _HEATMAP_EVERY == 0 and row["expert_load"]:
                image = heatmap(row["expert_load"])
                self._each(lambda kind, it: _log_image(kind, it, "expert_load", image, row["step"]))
            self._rows += 1

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """A generated sample."""
        self._each(lambda kind, it: _log_sample(kind, it, step, prompt, text))

    def finish(self, report: Path, failed: bool) -> None:
        """When the run has ended and its report is written."""

        def end(kind: str, tracker: Any) -> None:
            if kind == "wandb":
                wandb = importlib.import_module("wandb")
                if report.is_file():
                    artifact = wandb.Artifact(f"report-{tracker.run.id}", type="report")
                    artifact.add_file(str(report))
                    artifact.add_file(str(self._folder / CONFIG_FILE))
                    tracker.run.log_artifact(artifact)
                tracker.run.finish(exit_code=int(failed))
            else:
                tracker.finish()

        self._each(end)
        self._running.clear()

    def _start(self, kind: str, project: str, **options: Any) -> bool:
        # Here, as it brings torch, which who only reads metrics does without.
        tracker = importlib.import_module("accelerate.tracking").LOGGER_TYPE_TO_CLASS[kind](project, **options)
        try:
            tracker.start()
        except Exception as error:  # no key, no network, no such project: nothing that training depends on
            self._warn(f"{kind} cannot log{_mode(options)}: {_first_line(error)}")
            return False
        self._running[kind] = tracker
        return True

    def _start_wandb(self, logging: LoggingConfig, name: str, config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        for mode in ("online", "offline") if logging.online else ("offline",):
            options = {
                "name": name,
                "dir": str(self._folder),
                "mode": mode,
                "id": self.wandb_run_id,
                "resume": "allow" if self.wandb_run_id else None,
                "config": config,
                "settings": wandb.Settings(init_timeout=_WANDB_SECONDS),
            }
            if self._start("wandb", logging.project, **options):
                self.wandb_run_id = self._running["wandb"].run.id
                return

    def _each(self, act: Act) -> None:
        """Hand something to every tracker; to one that fails, never again."""
        for kind, tracker in list(self._running.items()):
            try:
                act(kind, tracker)
            except Exception as error:
                del self._running[kind]
                self._warn(f"{kind} failed ({_first_line(error)}); {METRICS_FILE} goes on")


def heatmap(loads: list[list[float]]) -> np.ndarray:
    """The loads of (L, E) experts as an image (8 L, 8 E, 3) uint8: from a quarter of a fair share, dark, to four."""
    shades = (np.log2(np.clip(np.asarray(loads, np.float64), 0.25, 4.0)) + 2) / 4  # 0 to 1
    ends = np.array([[20, 24, 60], [250, 230, 120]])  # dark blue to yellow: the same order in grey
    colours = ends[0] + shades[..., None] * (ends[1] - ends[0])
    return np.kron(colours, np.ones((_CELL, _CELL, 1))).astype(np.uint8)


def _log_image(kind: str, tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    if kind == "trackio":
        tracker.log({name: importlib.import_module("trackio").Image(image)}, step=step)
    else:
        options = {"dataformats": "NHWC"} if kind == "tensorboard" else {}
        tracker.log_images({name: image[None]}, step=step, **options)


def _log_sample(kind: str, tracker: Any, step: int, prompt: str, text: str) -> None:
    if kind == "wandb":
        tracker.log_table("samples", columns=["step", "prompt", "text"], data=[[step, prompt, text]], step=step)
    elif kind == "trackio":
        tracker.log({"sample": importlib.import_module("trackio").Markdown(f"{prompt}{text}")}, step=step)
    else:
        tracker.log({"sample": prompt + text}, step=step)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_text(config: dict[str, Any]) -> str:
    """For TensorBoard, which shows Markdown."""
    lines = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).splitlines()
    return "\n".join(f"    {line}" for line in lines)


def _mode(options: dict[str, Any]) -> str:
    return f" {options['mode']}" if "mode" in options else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
