"""The folder of a run: who may write into it, the config that explains what is in it, and how the run ended.

`status.json` says `running`, `finished`, `preempted` or `failed`, with the exit code, the message and the newest
checkpoint. `running` in a folder that no process holds means that the process was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimoe.config import TrainingRun
from minimoe.config.file import dump_config
from minimoe.errors import EXIT_BUG, EXIT_INTERRUPTED, MinimoeError, Preempted, UserError
from minimoe.loading import FINAL
from minimoe.train.checkpoint import newest_first
from minimoe.train.files import (
    CHARTS_FOLDER,
    CHECKPOINTS,
    CONFIG_FILE,
    FACTS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    ROLLOUTS_FILE,
    SAMPLES_FILE,
    SKIPPED_FOLDER,
    STATUS_FILE,
)

_USED_BY = (CHECKPOINTS, FINAL, METRICS_FILE)  # what tells a run's folder
# The status is the new run's by then.
_OF_A_RUN: tuple[str, ...] = (*_USED_BY, CONFIG_FILE, FACTS_FILE, SKIPPED_FOLDER, "wandb")
_OF_A_RUN += (ROLLOUTS_FILE, SAMPLES_FILE, REPORT_FILE, CHARTS_FOLDER)
_LOCK = ".lock"


class RunStatus:
    """Writes `status.json`; on other ranks than the first it does nothing."""

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self._folder, self._enabled = folder, enabled
        self._facts: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        self._write(state="running")

    def ended(self, error: BaseException | None) -> None:
        """Record how: normally, or by an error."""
        if error is None:
            self._write(state="finished", exit_code=0)
            return
        state = "preempted" if isinstance(error, Preempted) else "failed"
        code = error.exit_code if isinstance(error, MinimoeError) else EXIT_BUG
        message = error.what if isinstance(error, MinimoeError) else f"{type(error).__name__}: {error}"
        self._write(state=state, exit_code=code, message=message)

    def aborted(self) -> None:
        """Record a second Ctrl-C."""
        self._write(state="failed", exit_code=EXIT_INTERRUPTED, message="interrupted by a second Ctrl-C")

    def _write(self, **values: Any) -> None:
        if not self._enabled:
            return
        if "exit_code" in values:
            names = [path.name for path in newest_first(self._folder / CHECKPOINTS)]
            values |= {"ended": _now(), "newest_checkpoint": names[0] if names else None}
        temporary = self._folder / f".{STATUS_FILE}"
        temporary.write_text(json.dumps(self._facts | values, indent=1), encoding="utf-8")
        temporary.replace(self._folder / STATUS_FILE)


@contextmanager
def run_folder(config: TrainingRun, *, resume: bool, overwrite: bool, enabled: bool = True) -> Iterator[RunStatus]:
    """Own `output_dir` while the run lasts, with the run's status in it. What it holds stays until `claim_folder`.

    The lock is the operating system's and goes with the process, however that ends: kill -9 leaves nothing to clean.

    Args:
        enabled: False on all ranks but the first.

    Raises:
        UserError: another run is writing there; the folder holds a run and neither resume nor overwrite was asked
            for; or it cannot be written.
    """
    folder = Path(config.output_dir)
    if not enabled:
        yield RunStatus(folder, enabled=False)
        return
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir {folder} is in use by {_read_owner(folder)}",
            fix="wait for that run or stop it, or choose another output_dir",
        ) from None
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written: {error.strerror or error}", fix="choose another output_dir"
        ) from None
    try:
        _refuse_used(folder, resume or overwrite)
        status = RunStatus(folder)
        try:
            yield status
        except BaseException as error:
            with suppress(OSError):  # the error to report is the one that ended the run
                status.ended(error)
            raise
        status.ended(None)
    finally:
        lock.release()


def claim_folder(config: TrainingRun, *, keep: bool) -> None:
    """Delete the run that `output_dir` holds unless it is to be kept, and write the resolved config.

    Called when nothing but training is left to do: a run that is refused before has changed nothing.
    """
    folder = Path(config.output_dir)
    if not keep:
        for path in (folder / name for name in _OF_A_RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")


def _refuse_used(folder: Path, allowed: bool) -> None:
    used = [name for name in _USED_BY if (folder / name).exists()]
    if used and not allowed:
        raise UserError(
            f"output_dir {folder} already holds a run ({', '.join(used)})",
            fix="--resume continues it from its newest checkpoint, --overwrite deletes it and starts again",
        )


def _read_owner(folder: Path) -> str:
    try:
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
        return f"process {status['pid']} on {status['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
