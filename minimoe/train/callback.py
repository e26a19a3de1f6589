"""For those who train a minimoe model with `transformers.Trainer`, or with a trainer made of it such as TRL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from minimoe.errors import UserError
from minimoe.model.decoder import MiniMoeModel, real_tokens
from minimoe.model.losses import expert_counts
from minimoe.train.optim import update_selection_bias


class SelectionBiasCallback(TrainerCallback):
    """Moves the routers' selection bias after each optimizer step, as `minimoe pretrain` does.

    `Trainer` trains parameters, and the bias is none: without this, `router_bias_update_rate` has no effect there.

        Trainer(model, ..., callbacks=[SelectionBiasCallback()])
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # (L, E) of this rank's real tokens since the last step
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Count what the model's calls choose.

        Raises:
            UserError: the trainer has another model.
        """
        self._model = next((module for module in model.modules() if isinstance(module, MiniMoeModel)), None)
        if self._model is None:
            raise UserError(f"SelectionBiasCallback: no minimoe model in {type(model).__name__}", fix="leave it out")
        self._counts = None
        # Of the decoder: TRL's trainers call it, and compute logits and losses themselves.
        self._hook = self._model.register_forward_hook(self._count, with_kwargs=True)
        self._model.moves_selection_bias = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bias by the counts of all ranks."""
        counts, self._counts = self._counts, None
        if counts is None or self._model is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        update_selection_bias(self._model, counts, self._model.config.router_bias_update_rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._hook.remove()
        if self._model is not None:
            self._model.moves_selection_bias = False

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        # Answers that a trainer lets the model generate, and references, are computed without gradients.
        if module.training and torch.is_grad_enabled() and outputs.routings:
            real = real_tokens(kwargs.get("attention_mask"), outputs.last_hidden_state.shape[1])
            num_experts = module.config.num_router_outputs
            counts = torch.stack([expert_counts(routing.expert_ids, num_experts, real) for routing in outputs.routings])
            self._counts = counts if self._counts is None else self._counts + counts
