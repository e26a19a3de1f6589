"""Continue a run from its newest good checkpoint, after making sure that it is the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from minimoe.adapters import check_same_base, has_adapter
from minimoe.errors import UserError
from minimoe.model.config import MiniMoeConfig
from minimoe.train import checkpoint
from minimoe.train.sharding import Layout
from minimoe.train.snapshot import TrainerState, load_state, restore

# What a resumed run must share with the one it continues; every other change of the config is only logged.
_FIXED = ("seed", "data.sequence_length", "train.batch_size", "optimizer.name")
_FIXED_SECTIONS = ("lora.", "distil.", "dpo.", "grpo.")
_FREE_ARCHITECTURE = ("dispatch", "dropout", "coef", "rate", "loss_type", "use_cache", "logits")  # ends of names


def resume(
    checkpoints: Path,
    model: Any,
    optimizers: list[Optimizer],
    accelerator: Accelerator,
    fresh: TrainerState,
    load_data: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    layout: Layout | None = None,
) -> TrainerState:
    """State of the newest verified checkpoint, loaded into the model; the fresh state when there is none.

    Raises:
        CheckpointError: there are checkpoints, and none can be trusted.
        UserError: architecture, batches, optimizer or data are not those of the run to continue.
    """
    if accelerator.is_main_process:
        checkpoint.sweep(checkpoints)
    accelerator.wait_for_everyone()
    found, refused = checkpoint.latest_or_fail(checkpoints)
    for name, reason in refused.items():
        accelerator.print(f"checkpoint {name} is set aside: {reason}")
    if found is None:
        return fresh
    recorded = load_state(found)
    changes = _changes(recorded.config, fresh.config)
    conflicts = {key: change for key, change in changes.items() if key in _FIXED or key.startswith(_FIXED_SECTIONS)}
    conflicts |= _architecture_changes(json.loads((found / "config.json").read_text()), model.config.to_dict())
    if conflicts:
        raise UserError(
            f"a resumed run cannot change {_listed(conflicts)}",
            where=str(found),
            fix="restore the values, or start a new run with another output_dir",
        )
    if has_adapter(model):
        check_same_base(model, found)
    if recorded.data_fingerprint != fresh.data_fingerprint:
        edits = {key: change for key, change in changes.items() if key.startswith("data.")}
        raise UserError(
            f"the data is not what this run was trained on: {_listed(edits) or 'the contents have changed'}",
            where=str(found),
            fix="restore the data and the data section of the config, or start a new run with another output_dir",
        )
    accelerator.print(f"resuming from {found}" + (f", with {_listed(changes)}" if changes else ""))
    state = restore(found, model, optimizers, accelerator.process_index, load_data, layout)
    state.config = fresh.config
    return state


def _architecture_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Changed fields of the architecture, without those that only steer training."""
    names = [name for name in MiniMoeConfig.__annotations__ if not name.endswith(_FREE_ARCHITECTURE)]
    return {f"model.{name}": change for name, change in _changes(old, new).items() if name.partition(".")[0] in names}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new value."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= {f"{key}.{inner}": change for inner, change in _changes(before, after).items()}
        elif before != after:
            changes[key] = (before, after)
    return changes


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} from {old!r} to {new!r}" for key, (old, new) in changes.items())
