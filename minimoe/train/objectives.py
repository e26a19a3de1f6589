"""What a stage trains for. An objective is a pure function of the model and a micro-batch, and the only place where
training runs the model; the loop differentiates its loss, adds up its terms and logs them.

Every objective adds the router's terms as pretraining does: an MoE that is fine-tuned without them loses its balance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from minimoe.data.loader import Batch
from minimoe.model.losses import global_balancing_loss


class Step(NamedTuple):
    """What a micro-batch must know of the optimizer step that it is a part of."""

    num_items: Tensor  # `Batch.num_items()` of the whole step over all ranks: what a mean loss divides by
    num_tokens: Tensor  # `Batch.num_tokens()` likewise
    sum_ranks: Callable[[Tensor], Tensor]  # a tensor -> its sum over the ranks' same micro-batches. A collective.
    # This call's expert counts (L, E) -> those of all ranks, this micro-batch's and the earlier ones'. A collective.
    gather_counts: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, batch: Batch) -> Step:
        """The step that this batch, on one rank, is all of."""
        return cls(batch.num_items(), batch.num_tokens(), lambda tensor: tensor, lambda counts: counts)


class Losses(NamedTuple):
    """A micro-batch's share of the step: over micro-batches and ranks, each value adds up to the step's."""

    loss: Tensor  # scalar, to differentiate
    terms: dict[str, Tensor]  # logged beside it, before their coefficients: scalars, or one value for each MoE layer
    expert_counts: Tensor  # (L, E) int64: real tokens per expert of each MoE layer


Objective = Callable[[Any, Any, Step], Losses]  # of the model and of rows of the stage's batch


class HeldOut(NamedTuple):
    """What a stage finds on its held-out data."""

    row: dict[str, float]  # of metrics.jsonl
    score: float  # the lower the better: the checkpoint with the lowest is kept


# Of the model, the held-out data, the rows of a forward pass, the accelerator, and what to call before every batch.
Evaluate = Callable[[Any, Any, int, Any, Callable[[], None]], HeldOut]


def next_token(model: Any, batch: Batch, step: Step) -> Losses:
    """Cross-entropy of the learned tokens plus the router's weighted terms: pretraining and SFT."""
    outputs = model(**batch.model_inputs(), num_items_in_batch=step.num_items, skip_logits=True, use_cache=False)
    return add_router_terms(outputs.lm_loss, {"lm_loss": outputs.lm_loss}, model, outputs, batch, step)


def add_router_terms(
    loss: Tensor, terms: dict[str, Tensor], model: Any, outputs: Any, batch: Batch, step: Step
) -> Losses:
    """A stage's own loss and terms with the router's, which are means over real tokens, learned or not.

    Args:
        outputs: of the model, which was given labels.
    """
    config = getattr(model, "module", model).config  # data-parallel training wraps the model
    balance = outputs.load_balancing_loss
    if outputs.expert_probabilities is not None:
        counts = step.gather_counts(outputs.expert_counts)
        balance = global_balancing_loss(outputs.expert_probabilities, counts, config.num_experts_per_tok)
    share = batch.num_tokens() / step.num_tokens.clamp(min=1)
    balance, z_loss = share * balance, share * outputs.router_z_loss
    loss = loss + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
    terms = terms | {"load_balancing_loss": balance, "router_z_loss": z_loss}
    if outputs.router_entropy_loss is not None:
        entropy = share * outputs.router_entropy_loss
        loss, terms = loss + config.router_entropy_loss_coef * entropy, terms | {"router_entropy_loss": entropy}
    return Losses(loss, terms | {"router_confidence": share * outputs.router_confidence}, outputs.expert_counts)
