"""Checkpoints that are either complete or not there: save, verify, find the latest, prune.

A checkpoint is a Hugging Face model folder (`config.json`, `model.safetensors`, tokenizer, generation config) plus
`optimizer.safetensors` and `trainer.json`; nothing in it is a pickle. It is written to a temporary folder beside
its place, `manifest.json` gets each file's SHA-256, every file and folder is synced, and one rename publishes it.
A reader trusts only what the manifest confirms, so a torn write or a flipped bit is found, not trained on.

Training waits only for the copy of its state (snapshot.py); a `BackgroundSaver` writes it while training goes on.
The ranks of a sharded run write theirs side by side: sharded_checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from minimoe.adapters import has_adapter, save_adapter
from minimoe.errors import CheckpointError, disk_errors
from minimoe.failpoints import failpoint
from minimoe.loading import quiet_transformers
from minimoe.train.snapshot import OPTIMIZER_STATE, TRAINER_STATE, Snapshot, check_finite

MANIFEST = "manifest.json"
_WRITING, _DELETING = ".writing-", ".deleting-"  # folders that no reader may see


def save(root: Path, snapshot: Snapshot, model: Any, tokenizer: Any) -> Path:
    """Write `root/step-XXXXXXXX` so that it exists completely or not at all.

    Args:
        model, tokenizer: give the config and the file formats; the weights are the snapshot's.

    Raises:
        StorageError: disk full, permission denied; what was there before is untouched.
        NonFiniteError: a weight or moment is NaN or infinite; nothing was written.
    """
    check_finite(snapshot)
    target = root / f"step-{snapshot.state.step:08d}"
    with written_whole(target) as folder:
        failpoint("save.begin")
        save_weights(model, tokenizer, folder, snapshot.weights)
        failpoint("save.weights")
        save_state(folder, snapshot, snapshot.optimizer)
        manifest = {file.name: manifest_entry(file) for file in _files(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        failpoint("save.manifest")
    return target


def save_state(folder: Path, snapshot: Snapshot, moments: Mapping[str, Tensor]) -> None:
    """The moments, the random generators and data's state of all ranks, and the trainer's own."""
    tensors = dict(moments)
    for rank, states in enumerate(snapshot.rng):
        tensors |= {f"rng.{rank}.{name}": tensor for name, tensor in states.items()}
    tensors |= {f"data.{name}": tensor.contiguous() for name, tensor in snapshot.data.items()}
    save_file(tensors, folder / OPTIMIZER_STATE)
    failpoint("save.optimizer")
    (folder / TRAINER_STATE).write_text(json.dumps(asdict(snapshot.state), indent=1))
    failpoint("save.state")


def save_weights(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The model's files or its adapter's, the configs and the tokenizer.

    Args:
        weights: of a snapshot; None takes them from the model.
    """
    with quiet_transformers():
        if has_adapter(model):
            save_adapter(model, folder, weights)
        else:
            model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    save_configs(model, tokenizer, folder)


def save_configs(model: Any, tokenizer: Any, folder: Path) -> None:
    """What describes the weights, and the tokenizer."""
    with quiet_transformers():
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, synced to the disk, when the block ends; an older one is replaced.

    Raises:
        StorageError: it cannot be written; the temporary folder is gone then.
    """
    with disk_errors(target.name, target):
        try:
            yield begin(target)
            publish(target)
        except Exception:
            shutil.rmtree(temporary_of(target), ignore_errors=True)
            raise


def temporary_of(target: Path) -> Path:
    """The folder in which `target` is made."""
    return target.with_name(f"{_WRITING}{target.name}")


def begin(target: Path) -> Path:
    """Its temporary folder, new and empty."""
    temporary = temporary_of(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(target: Path) -> None:
    """Sync the temporary folder and give it its name."""
    temporary = temporary_of(target)
    failpoint("save.sync")
    for file in _files(temporary):
        _sync(file)
    _sync(temporary)
    if target.exists():
        _delete(target)
    failpoint("save.rename")
    temporary.rename(target)
    failpoint("save.published")
    _sync(target.parent)
    _sync(target.parent.parent)  # which may have got its first checkpoint's folder just now


def verify(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    if not {TRAINER_STATE, OPTIMIZER_STATE, "config.json"} <= set(entries):
        return f"{MANIFEST} lists too few files"
    for name, (size, digest) in entries.items():
        file = folder / name
        if Path(name).name != name or not file.is_file() or file.is_symlink():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != digest:
            return f"{name} does not match its checksum"
    return None


def latest(root: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest verified checkpoint under `root`, and why each newer one was refused."""
    refused: dict[str, str] = {}
    for folder in newest_first(root):
        reason = verify(folder)
        if reason is None:
            return folder, refused
        refused[folder.name] = reason
    return None, refused


def latest_or_fail(root: Path) -> tuple[Path | None, dict[str, str]]:
    """`latest`, but having only damaged checkpoints is an error: starting over in silence would lose the run.

    Raises:
        CheckpointError: checkpoints exist and none can be trusted.
    """
    found, refused = latest(root)
    if found is None and refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise CheckpointError(
            f"no usable checkpoint ({reasons})",
            where=str(root),
            fix="restore one from a copy, or start again with --overwrite",
        )
    return found, refused


def prune(root: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` verified checkpoints and the best one; damaged ones stay for a look."""
    verified = [folder for folder in newest_first(root) if verify(folder) is None]
    for folder in verified[keep_last:]:
        if best_step is None or folder.name != f"step-{best_step:08d}":
            failpoint("prune.delete")
            _delete(folder)


def sweep(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    for prefix in (_WRITING, _DELETING):
        for folder in root.glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Remove a checkpoint so that it is either there completely or not at all."""
    doomed = folder.rename(folder.with_name(f"{_DELETING}{folder.name}"))
    failpoint("prune.renamed")
    shutil.rmtree(doomed, ignore_errors=True)


def newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root`, verified or not."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), key=lambda path: path.name, reverse=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def manifest_entry(file: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
