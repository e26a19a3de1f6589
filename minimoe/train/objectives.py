"""What a stage trains for. An objective is a pure function of the model and a micro-batch, and the only place where
training runs the model; the loop differentiates its loss, adds up its terms and logs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from minimoe.data.loader import Batch


class Losses(NamedTuple):
    """A micro-batch's share of the step: over micro-batches and ranks, each value adds up to the step's."""

    loss: Tensor  # scalar, to differentiate
    terms: dict[str, Tensor]  # scalars logged beside it, before their coefficients
    expert_counts: Tensor  # (L, E) int64: real tokens per expert of each MoE layer


# (the model, rows of the stage's batch, `num_items()` of the whole step over all ranks: what to divide by) -> Losses
Objective = Callable[[Any, Any, Tensor], Losses]


def next_token(model: Any, batch: Batch, num_items: Tensor) -> Losses:
    """Cross-entropy of the learned tokens plus the router's weighted terms: pretraining and SFT."""
    outputs = model(**batch.model_inputs(), num_items_in_batch=num_items, skip_logits=True, use_cache=False)
    share = batch.num_items() / num_items.clamp(min=1)  # the router's terms are means over this call's tokens
    terms = {
        "lm_loss": outputs.lm_loss,
        "load_balancing_loss": share * outputs.load_balancing_loss,
        "router_z_loss": share * outputs.router_z_loss,
    }
    return Losses(outputs.loss, terms, outputs.expert_counts)
