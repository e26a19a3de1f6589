"""The folder of a run: who may write into it, and the resolved config that explains what is in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from minimoe.config import TrainingRun, dump_config
from minimoe.errors import UserError

CONFIG_FILE = "config.yaml"
_OURS = ("checkpoints", "final", "metrics.jsonl", CONFIG_FILE, "wandb")


def open_run_folder(config: TrainingRun, *, resume: bool, overwrite: bool) -> Path:
    """Make `output_dir` ready and write the resolved config into it.

    Raises:
        UserError: the folder holds a run and neither resume nor overwrite was asked for, or it cannot be written.
    """
    folder = Path(config.output_dir)
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written: {error.strerror}", mend="choose another output_dir"
        ) from None
    return folder
