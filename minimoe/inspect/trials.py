"""Trials: runs whose results are compared. Each is an ordinary run in a folder of its own, by the ordinary command.

They take turns on the machine (train/turns.py). Sweeps and comparisons say which runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minimoe.config import TrainingRun
from minimoe.config.file import dump_config
from minimoe.errors import Preempted, UserError
from minimoe.inspect.record import read_run
from minimoe.train.files import CONFIG_FILE, STATUS_FILE
from minimoe.train.turns import VARIABLE

TURN_SECONDS = 4.0
_WARM_UP = 2  # steps that are not timed
_TIMED_SECONDS = 6.0  # of training, at least, to time a step by


@dataclass
class Trial:
    """One run, and how it ended."""

    variant: str
    seed: int
    config: TrainingRun  # whole, with its folder and its steps
    failure: str | None = None  # the last lines that it printed, if it failed

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def beside(self, ending: str) -> Path:
        """A file of the trial outside of the run's folder."""
        return self.folder.with_name(self.folder.name + ending)


def as_trial(config: TrainingRun, variant: str, folder: Path, seed: int, steps: int, *, timing: bool = False) -> Trial:
    """The run that takes so many steps, with validation five times on the way.

    Args:
        timing: only to see what a step takes: every row is logged, and next to nothing validated.
    """
    values = config.model_dump(mode="json")
    values |= {"output_dir": str(folder), "seed": seed}
    every = steps if timing else max(1, math.ceil(steps / 5))
    values["train"] |= {"max_steps": steps, "epochs": None, "sample_every": None, "eval_every": every, "keep_last": 1}
    values["train"]["log_every"] = 1 if timing else min(config.train.log_every, every)
    if timing:
        values["data"]["max_validation_documents"] = 1
    values["logging"] |= {"trackers": (), "report": False}
    return Trial(variant, seed, type(config).model_validate(values))


def is_finished(trial: Trial) -> bool:
    """Whether the folder holds the finished run.

    Raises:
        UserError: it holds another one.
    """
    file = trial.folder / CONFIG_FILE
    if not file.is_file():
        return False
    if file.read_text(encoding="utf-8") != dump_config(trial.config):
        raise UserError(
            f"{trial.folder} holds a run with another config", fix="choose another --out, or delete that folder"
        )
    try:
        return json.loads((trial.folder / STATUS_FILE).read_text(encoding="utf-8"))["state"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


# ---- running them ----


@dataclass
class _Child:
    trial: Trial
    process: subprocess.Popen[bytes]
    give: int  # write end: a turn
    back: int  # read end: its end


def run_by_seeds(
    planned: Sequence[tuple[str, TrainingRun, int]], folder: Path, seeds: int, at_once: int, bar: Progress
) -> list[Trial]:
    """Every (variant, config, steps) with every seed, those of a seed interleaved; what is finished is left alone."""
    trials = [
        as_trial(config, name, folder / slug(name) / f"seed-{seed}", seed, steps)
        for seed in range(seeds)
        for name, config, steps in planned
    ]
    task = bar.add_task("", total=len(trials))

    def count() -> None:
        bar.update(task, completed=sum(map(is_finished, trials)))

    count()
    for seed in range(seeds):
        bar.update(task, description=f"seed {seed}")
        run_trials([trial for trial in trials if trial.seed == seed], at_once, count)
    return trials


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """On the terminal, of runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar


def run_trials(trials: Sequence[Trial], at_once: int, progress: Callable[[], None] = lambda: None) -> None:
    """Run what is not finished; a trial that fails is noted, and the others go on.

    Args:
        at_once: runs that take turns; when one ends, the next begins.
        progress: called after every turn.

    Raises:
        Preempted: by Ctrl-C or SIGTERM, when every run has saved.
    """
    waiting = [trial for trial in trials if not is_finished(trial)]
    children: list[_Child] = []
    with _stoppable(children):
        while waiting or children:
            while waiting and len(children) < at_once:
                child = _start(waiting.pop(0))
                children.append(child)
                _await_turn_end(child, children)
                progress()
            for child in list(children):
                with suppress(BrokenPipeError):  # it was killed while it waited
                    os.write(child.give, b".")
                _await_turn_end(child, children)
                progress()


def _start(trial: Trial) -> _Child:
    trial.folder.mkdir(parents=True, exist_ok=True)
    file = trial.beside(".yaml")
    file.write_text(dump_config(trial.config), encoding="utf-8")
    read_end, give = os.pipe()
    back, write_end = os.pipe()
    command = [sys.executable, "-m", "minimoe.cli", trial.config.stage, str(file), "--resume"]
    with trial.beside(".log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            pass_fds=(read_end, write_end),
            env=os.environ | {VARIABLE: f"{read_end},{write_end},{TURN_SECONDS}"},
            start_new_session=True,  # Ctrl-C is for the command, which stops its runs
        )
    os.close(read_end)
    os.close(write_end)
    return _Child(trial, process, give, back)


def _await_turn_end(child: _Child, children: list[_Child]) -> None:
    """Until the run says so, or has ended."""
    if os.read(child.back, 1):
        return
    code = child.process.wait()
    os.close(child.give)
    os.close(child.back)
    children.remove(child)
    if code:
        lines = child.trial.beside(".log").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["nothing printed"]
        child.trial.failure = f"exit code {code}: {errors[-1].removeprefix('error: ')}"


@contextmanager
def _stoppable(children: list[_Child]) -> Iterator[None]:
    """Ctrl-C and SIGTERM let every run save before this command ends."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as error:
        for child in children:
            child.process.terminate()
            os.close(child.give)  # no more turns
        for child in children:
            child.process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise Preempted("stopped; every run is saved", fix="start the same command again: it goes on") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- how many steps fit into a budget ----


def step_seconds(configs: Mapping[str, TrainingRun], folder: Path, at_once: int, bar: Progress) -> dict[str, float]:
    """What a step takes of each, all of them interleaved; kept in the folder, so that a command that goes on has the
    same figures.

    Raises:
        UserError: one of them cannot run.
    """
    file = folder / "step_seconds.json"
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    steps = dict.fromkeys((name for name in configs if name not in known), 8)
    task = bar.add_task("a few steps of each, to see what they take", total=None)
    while steps:
        trials = [
            as_trial(configs[name], name, folder / "timing" / f"{slug(name)}-{count}", 0, count, timing=True)
            for name, count in steps.items()
        ]
        run_trials(trials, at_once)
        for trial in trials:
            if trial.failure is not None:
                raise UserError(f"{trial.variant}: {trial.failure}", where=str(trial.beside(".log")))
            seconds = np.diff(read_run(trial.folder).training["seconds"])[_WARM_UP:]
            known[trial.variant] = float(seconds.mean())
            if seconds.sum() < _TIMED_SECONDS / 2 and steps[trial.variant] == 8:
                steps[trial.variant] = min(500, math.ceil(_TIMED_SECONDS / float(seconds.mean())) + _WARM_UP)
            else:
                del steps[trial.variant]
    bar.remove_task(task)
    shutil.rmtree(folder / "timing", ignore_errors=True)
    file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known


def slug(name: str) -> str:
    """A variant's name as a folder's; of a long one the beginning, and a digest of all."""
    plain = "".join(sign if sign.isalnum() or sign in "=.-_" else "_" for sign in name).strip("_") or "base"
    return plain if len(plain) <= 120 else f"{plain[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
