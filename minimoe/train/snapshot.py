"""What a run is at one step, as tensors and a few numbers: copied to be saved, and put back.

A copy is taken while training waits, and written while it goes on (checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from minimoe.adapters import ADAPTER_WEIGHTS, has_adapter, name_in_file, trained_tensors
from minimoe.errors import CheckpointError, NonFiniteError
from minimoe.sharded_files import distinct, in_parts, read_into, read_shapes
from minimoe.train.guard import StepGuard
from minimoe.train.new_weights import read_plain
from minimoe.train.sharding import Layout, fill, local, whole

TRAINER_STATE = "trainer.json"
OPTIMIZER_STATE = "optimizer.safetensors"


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
    """A copy of the state of one step, on the CPU: safe to write while training goes on.

    Of a sharded model it is what this rank holds: `DTensor`s.
    """

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
    """Copy what has to be saved. Of a sharded model's adapter, which is small, all of it: a collective."""
    gather = whole if has_adapter(model) else (lambda tensor: tensor)
    tensors = trained(model) | _optimizer_tensors(optimizers)
    copies = {name: gather(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()}
    optimizer = {name: copies.pop(name) for name in list(copies) if name.startswith("optimizer.")}
    return Snapshot(_state_from(asdict(state)), copies, optimizer, rng, data or {})


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model, by name: all, tied tensors once, or its adapter."""
    return trained_tensors(model) if has_adapter(model) else distinct(model)


def check_finite(snapshot: Snapshot) -> None:
    """Whether what this rank holds may be saved.

    Raises:
        NonFiniteError: it may not.
    """
    for name, tensor in (snapshot.weights | snapshot.optimizer).items():
        if not torch.isfinite(local(tensor)).all():
            raise NonFiniteError(
                f"step {snapshot.state.step} is not saved: {name} has NaN or infinite values",
                fix="lower optimizer.lr or lengthen schedule.warmup_steps; --resume continues from the last good save",
            )


def restore(
    folder: Path,
    model: Any,
    optimizers: list[Optimizer],
    rank: int,
    load_data: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    layout: Layout | None = None,
) -> TrainerState:
    """Put weights, optimizer moments, random generators and the data's state back as they were.

    Args:
        rank: whose generators; data's state is the same for all.
        load_data: takes that state.
        layout: of a sharded model.
    """
    shapes = read_shapes(folder)
    weights: dict[str, Tensor] = {}
    if has_adapter(model):
        values = load_file(folder / ADAPTER_WEIGHTS)
        for name, target in trained(model).items():
            fill(target, values[name_in_file(name)])
    elif in_parts(folder):
        weights = distinct(model)
    else:
        read_plain(model, folder, layout)
    moments = {k: v for i, optimizer in enumerate(optimizers) for k, v in _make_moments(optimizer, i, shapes).items()}
    read_into(folder, weights | moments)
    if rng := _read(folder, f"rng.{rank}."):  # a larger number of processes than before: the new ones keep their seed
        set_rng(rng)
    load_data(_read(folder, "data."))
    return load_state(folder)


def _read(folder: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(folder / OPTIMIZER_STATE, "pt") as file:
        names = file.keys()
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}


def load_state(folder: Path) -> TrainerState:
    """The trainer's state of a verified checkpoint."""
    return _state_from(json.loads((folder / TRAINER_STATE).read_text()))


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


def _optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Moments as flat names: optimizer.<which>.<parameter>/<moment>."""
    return {
        f"optimizer.{which}.{parameter}/{moment}": tensor
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


def _make_moments(optimizer: Optimizer, which: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Room for what a checkpoint has of an optimizer, which becomes its state; by the names in the checkpoint.

    The groups (rates, decay) are today's config's, not the checkpoint's: a resumed run may change them.
    """
    prefix, made = f"optimizer.{which}.", {}
    known = {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    for key, shape in shapes.items():
        if not key.startswith(prefix):
            continue
        name, _, moment = key.removeprefix(prefix).partition("/")
        if name not in known:
            raise CheckpointError(f"moments of {name}, which is not trained", fix="start a new run from the weights")
        like = known[name].detach()
        # Another shape: a count of steps.
        made[key] = torch.zeros_like(like) if shape == like.shape else torch.zeros(shape, device=like.device)
        optimizer.state[known[name]][moment] = made[key]
    return made
