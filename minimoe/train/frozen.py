"""Experts that training leaves as they are: those of the model's `frozen_experts` (`minimoe experts … freeze`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimoe.adapters import has_adapter
from minimoe.errors import UserError


class FrozenExperts:
    """Keeps them: they get no gradient, and after each step their weights are put back, as weight decay moves what has
    no gradient too. A layer whose experts are all frozen is not trained at all.

    Raises:
        UserError: the model has adapters, which would change what frozen experts compute.
    """

    def __init__(self, model: Any) -> None:
        if model.config.frozen_experts and has_adapter(model):
            raise UserError("frozen_experts and lora: adapters would change frozen experts", fix="leave lora: out")
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # stack, its frozen experts, their weights
        for layer, experts in (model.config.frozen_experts or {}).items():
            block = model.model.layers[int(layer)].mlp.experts
            for stack in (block.gate_up_proj, block.down_proj):
                if len(experts) == len(stack):
                    stack.requires_grad_(False)
                elif stack.requires_grad:
                    frozen = torch.tensor(experts, device=stack.device)
                    stack.register_hook(lambda grad, frozen=frozen: grad.index_fill(0, frozen, 0.0))
                    self._kept.append((stack, frozen, stack.detach()[frozen]))

    @torch.no_grad()
    def restore(self) -> None:
        """After an optimizer step."""
        for stack, frozen, weights in self._kept:
            stack.index_copy_(0, frozen, weights)
