"""The folder of a run: who may write into it, and the resolved config that explains what is in it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from minimoe.config import TrainingRun, dump_config
from minimoe.errors import UserError

CONFIG_FILE = "config.yaml"
_OURS = ("checkpoints", "final", "metrics.jsonl", CONFIG_FILE, "wandb")
_LOCK, _OWNER = ".lock", ".owner"


@contextmanager
def run_folder(config: TrainingRun, *, resume: bool, overwrite: bool, enabled: bool = True) -> Iterator[None]:
    """Own `output_dir` while the run lasts, with the resolved config in it.

    The lock is the operating system's and goes with the process, however that ends: kill -9 leaves nothing to clean.

    Args:
        enabled: False on all ranks but the first.

    Raises:
        UserError: another run is writing there; the folder holds a run and neither resume nor overwrite was asked
            for; or it cannot be written.
    """
    if not enabled:
        yield
        return
    folder = Path(config.output_dir)
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir {folder} is in use by {_read_owner(folder)}",
            mend="wait for that run or stop it, or choose another output_dir",
        ) from None
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written: {error.strerror or error}", mend="choose another output_dir"
        ) from None
    try:
        _prepare(folder, config, resume, overwrite)
        yield
    finally:
        lock.release()


def _prepare(folder: Path, config: TrainingRun, resume: bool, overwrite: bool) -> None:
    used = [name for name in _OURS if (folder / name).exists()]
    if used and not (resume or overwrite):
        raise UserError(
            f"output_dir {folder} already holds a run ({', '.join(used)})",
            mend="--resume continues it from its newest checkpoint, --overwrite deletes it and starts again",
        )
    if overwrite and not resume:
        for name in used:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    (folder / _OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")


def _read_owner(folder: Path) -> str:
    try:
        return (folder / _OWNER).read_text(encoding="utf-8")
    except OSError:
        return "another process"
