"""Checkpoints that are either complete or not there: save, verify, find the latest, prune.

A checkpoint is a Hugging Face model folder (`config.json`, `model.safetensors`, tokenizer, generation config) plus
`optimizer.safetensors` and `trainer.json`; nothing in it is a pickle. It is written to a temporary folder beside
its place, `manifest.json` gets each file's SHA-256, every file and folder is synced, and one rename publishes it.
A reader trusts only what the manifest confirms, so a torn write or a flipped bit is found, not trained on.

Training waits only for the copy of its state (`take_snapshot`); a
`BackgroundSaver` writes it while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from minimoe.adapters import has_adapter, load_weights, save_adapter, trained_tensors
from minimoe.errors import CheckpointError, NonFiniteError, disk_errors
from minimoe.failpoints import failpoint
from minimoe.loading import quiet_transformers
from minimoe.train.guard import StepGuard
from minimoe.train.sharding import fill, whole

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.json"
OPTIMIZER_STATE = "optimizer.safetensors"
_WRITING, _DELETING = ".writing-", ".deleting-"  # folders that no reader may see


@dataclass
class TrainerState:
    """Everything besides tensors that a resumed run needs to continue exactly.

    The position in the data is `step` alone: the loader is a pure function of it.
    """

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen
    best_val_loss: float | None = None
    best_step: int | None = None
    wandb_run_id: str | None = None
    data_fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # of the run, to tell what a resumed run changes
    guard: StepGuard = field(default_factory=StepGuard)
    validation_due: bool = False  # of this step: it was cut short by a request to stop


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of one step, on the CPU: safe to write while training goes on."""

    state: TrainerState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: list[dict[str, Tensor]]  # of every process
    data: dict[str, Tensor] = field(default_factory=dict)  # what later batches cannot be made of anew


def take_snapshot(
    model: nn.Module,
    optimizers: list[Optimizer],
    state: TrainerState,
    rng: list[dict[str, Tensor]],
    data: dict[str, Tensor] | None = None,
) -> Snapshot:
    """Copy what has to be saved. Of a sharded model it is a collective."""
    weights = whole_weights(model)
    return Snapshot(_state_from(asdict(state)), weights, _optimizer_tensors(optimizers), rng, data or {})


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of what training changes; of a sharded model all of it, which is a collective."""
    places = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    copies: dict[Any, Tensor] = {}  # by place: tied tensors stay one, and are written once
    weights = {}
    for name, tensor in trained_tensors(model).items():
        place = places.get(name, name)
        if place not in copies:
            copies[place] = _copy(tensor)
        weights[name] = copies[place]
    return weights


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True)


def save(root: Path, snapshot: Snapshot, model: Any, tokenizer: Any) -> Path:
    """Write `root/step-XXXXXXXX` so that it exists completely or not at all.

    Args:
        model, tokenizer: give the config and the file formats; the weights are the snapshot's.

    Raises:
        StorageError: disk full, permission denied; what was there before is untouched.
        NonFiniteError: a weight or moment is NaN or infinite; nothing was written.
    """
    _check_finite(snapshot)
    target = root / f"step-{snapshot.state.step:08d}"
    with written_whole(target) as folder:
        failpoint("save.begin")
        save_weights(model, tokenizer, folder, snapshot.weights)
        failpoint("save.weights")
        tensors = dict(snapshot.optimizer)
        for rank, states in enumerate(snapshot.rng):
            tensors |= {f"rng.{rank}.{name}": tensor for name, tensor in states.items()}
        tensors |= {f"data.{name}": tensor.contiguous() for name, tensor in snapshot.data.items()}
        save_file(tensors, folder / OPTIMIZER_STATE)
        failpoint("save.optimizer")
        (folder / TRAINER_STATE).write_text(json.dumps(asdict(snapshot.state), indent=1))
        failpoint("save.state")
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in _files(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        failpoint("save.manifest")
    return target


def save_weights(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The model's files or its adapter's, the configs and the tokenizer.

    Args:
        weights: of `trained_tensors`; None takes them from the model.
    """
    with quiet_transformers():
        if has_adapter(model):
            save_adapter(model, folder, weights)
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(folder)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, synced to the disk, when the block ends; an older one is replaced.

    Raises:
        StorageError: it cannot be written; the temporary folder is gone then.
    """
    temporary = target.with_name(f"{_WRITING}{target.name}")
    with disk_errors(target.name, target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
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
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


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


def load_state(folder: Path) -> TrainerState:
    """The trainer's state of a verified checkpoint."""
    return _state_from(json.loads((folder / TRAINER_STATE).read_text()))


def restore(
    folder: Path,
    model: Any,
    optimizers: list[Optimizer],
    rank: int,
    load_data: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> TrainerState:
    """Put weights, optimizer moments, random generators and the data's state back as they were."""
    if has_adapter(model):
        load_weights(model, folder)
    else:
        with quiet_transformers():
            loaded = type(model).from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        values = loaded.state_dict()
        for name, target in model.state_dict().items():
            fill(target, values[name])
    tensors = load_file(folder / OPTIMIZER_STATE)
    for index, optimizer in enumerate(optimizers):
        _load_optimizer(optimizer, f"optimizer.{index}.", tensors)
    rng = {name.removeprefix(f"rng.{rank}."): t for name, t in tensors.items() if name.startswith(f"rng.{rank}.")}
    if rng:  # a larger number of processes than before: the new ones keep their seed
        set_rng(rng)
    load_data({name.removeprefix("data."): t for name, t in tensors.items() if name.startswith("data.")})
    return load_state(folder)


def get_rng() -> dict[str, Tensor]:
    """States of this process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: dict[str, Tensor]) -> None:
    """The reverse of `get_rng`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _state_from(values: dict[str, Any]) -> TrainerState:
    """The reverse of `asdict`."""
    return TrainerState(**values | {"guard": StepGuard(**values.get("guard", {}))})


def _check_finite(snapshot: Snapshot) -> None:
    for name, tensor in (snapshot.weights | snapshot.optimizer).items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"step {snapshot.state.step} is not saved: {name} has NaN or infinite values",
                fix="lower optimizer.lr or lengthen schedule.warmup_steps; --resume continues from the last good save",
            )


def _optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Moments as flat names: optimizer.<which>.<parameter>/<moment>."""
    return {
        f"optimizer.{which}.{parameter}/{moment}": _copy(tensor)
        for which, optimizer in enumerate(optimizers)
        for parameter, moments in _named_state(optimizer).items()
        for moment, tensor in moments.items()
    }


def _named_state(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """By the names of the parameters: how these are grouped may differ from layout to layout."""
    return {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def _load_optimizer(optimizer: Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """The groups (rates, decay) are today's config's, not the checkpoint's: a resumed run may change them."""
    saved = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    known = {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    for key, tensor in saved.items():
        name, _, moment = key.partition("/")
        if name not in known:
            raise CheckpointError(f"moments of {name}, which is not trained", fix="start a new run from the weights")
        like = known[name]
        if tensor.shape == like.shape:
            state = torch.zeros_like(like, dtype=tensor.dtype)
            fill(state, tensor)
        else:  # a count of steps
            state = tensor.to(like.device, copy=True)
        optimizer.state[like][moment] = state


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
