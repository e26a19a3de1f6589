"""The weights of a model that was built without any, on the meta device: drawn or read so that no rank has the whole.

A sharded model is sharded first, while it takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from minimoe.config import TrainingRun
from minimoe.errors import UserError
from minimoe.folder import check_folder, read_object
from minimoe.loading import FIX, check_vocabulary, model_folder, quiet_transformers
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.sharded_files import distinct, in_parts, read_into
from minimoe.tokenizer import load_tokenizer
from minimoe.train.sharding import Layout, distributed_config, fill, local


def without_weights(config: MiniMoeConfig) -> MiniMoeForCausalLM:
    """A model of this architecture that takes no memory."""
    with torch.device("meta"):
        return MiniMoeForCausalLM(config)


def has_none(model: nn.Module) -> bool:
    """Whether the weights are still to come."""
    return any(parameter.is_meta for parameter in model.parameters())


def give_weights(model: Any, layout: Layout, config: TrainingRun, device: torch.device) -> None:
    """Fill a model that was built without weights: from `init_from`, or freshly drawn."""
    torch.manual_seed(config.seed)
    if (folder := getattr(config, "init_from", None)) is not None:
        read(model, folder, layout, device)
        torch.manual_seed(config.seed)
    else:
        draw(model, device, kept_on="cpu" if layout.cpu_offload else device)


@torch.no_grad()
def draw(
    model: Any,
    device: torch.device | str = "cpu",
    with_buffers_alone: bool = False,
    kept_on: torch.device | str | None = None,
) -> None:
    """Fresh weights by torch's generator, the same on every layout: of each module that it draws a rank keeps its part.

    Args:
        device: that the model computes on.
        with_buffers_alone: only of modules that have a buffer, such as rotary angles, which no file has.
        kept_on: where the parameters stay between passes; None: on `device`.
    """
    model.to_empty(device=kept_on or device)
    model.tie_weights()
    drawn: set[int] = set()
    for module in _inner_first(model):
        if with_buffers_alone and not module._buffers:
            continue
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        kept = [dict(place) for place in places]
        for place in places:
            place |= {name: _whole_like(tensor) for name, tensor in place.items() if tensor is not None}
        model._init_weights(module)
        for place, before in zip(places, kept, strict=True):
            values = dict(place)
            place |= before
            for name, target in before.items():
                if target is not None and id(target) not in drawn:  # tied: as it was drawn first
                    drawn.add(id(target))
                    fill(target, values[name].to(target.device))
    for module in model.modules():
        module._buffers |= {name: None if b is None else b.to(device) for name, b in module._buffers.items()}


def _whole_like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inner_first(child)
    yield module


def open_without_weights(path: str) -> tuple[MiniMoeForCausalLM, Any]:
    """The architecture and the tokenizer of a model folder; `read` gives the weights.

    Raises:
        UserError: no minimoe model is there, or its tokenizer does not fit.
    """
    folder = model_folder(path)
    check_folder(folder)
    kind = read_object(folder / "config.json").get("model_type")
    if kind != MiniMoeConfig.model_type:
        fix = "give one trained by minimoe"
        raise UserError(f"a {kind} model; a minimoe model is needed", where=str(folder), fix=fix)
    try:
        model = without_weights(MiniMoeConfig.from_pretrained(folder, local_files_only=True))
    except ValueError as error:
        raise UserError(f"cannot open the model: {error}", where=str(folder), fix=FIX) from error
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = load_tokenizer(str(folder))
    check_vocabulary(model, tokenizer, str(folder))
    return model, tokenizer


@torch.no_grad()
def read(model: Any, path: str, layout: Layout, device: torch.device) -> None:
    """The weights of a model folder, each rank its part.

    Raises:
        UserError: they cannot be read, or some are missing or of another shape.
    """
    folder = model_folder(path)
    draw(model, device, with_buffers_alone=True, kept_on="cpu" if layout.cpu_offload else device)
    if in_parts(folder):
        read_into(folder, distinct(model))
    else:
        read_plain(model, folder, layout)


@torch.no_grad()
def read_plain(model: Any, folder: Path, layout: Layout | None) -> None:
    """Into a model that has room for them: the weights of a folder as `transformers` writes it, each rank its part.

    Raises:
        UserError: they cannot be read, or some are missing or of another shape.
    """
    try:
        with quiet_transformers():
            found = type(model).from_pretrained(
                folder,
                dtype=torch.float32,
                distributed_config=None if layout is None else distributed_config(layout),
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot open the model: {first_line}", where=str(folder), fix=FIX) from error
    for target, values in zip(distinct(model).values(), distinct(found).values(), strict=True):
        local(target).copy_(local(values))
