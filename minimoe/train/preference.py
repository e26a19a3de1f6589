"""Losses of preferences, as pure functions of log-probabilities, and the objective made of them.

Sources: DPO (arXiv 2305.18290), its label smoothing (cDPO, ericmitchell.ai/cdpo.pdf), IPO (2310.12036), SimPO
(2405.14734), ORPO (2403.07691), KTO (2402.01306).

B batch, S sequence, P pairs of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.config import DpoConfig
from minimoe.data.pairs import PairBatch
from minimoe.train.objectives import Losses, Objective, Step, add_router_terms


def preference_loss(logprobs: Tensor, lengths: Tensor, reference: Tensor, dpo: DpoConfig) -> Tensor:
    """The loss of each pair of a chosen and a rejected answer, without the chosen one's cross-entropy.

    Args:
        logprobs: (..., 2) sums over the answers' tokens, chosen first.
        lengths: (..., 2) scored tokens of each.
        reference: (..., 2) the same sums under the reference.

    Returns:
        (...).
    """
    means = logprobs / lengths.clamp(min=1)
    if dpo.loss == "sigmoid":
        logits = dpo.beta * ahead(logprobs - reference)
        return -(1 - dpo.label_smoothing) * F.logsigmoid(logits) - dpo.label_smoothing * F.logsigmoid(-logits)
    if dpo.loss == "ipo":
        return (ahead(means - reference / lengths.clamp(min=1)) - 1 / (2 * dpo.beta)).square()
    if dpo.loss == "simpo":
        return -F.logsigmoid(dpo.beta * ahead(means) - dpo.simpo_margin)
    assert dpo.loss == "orpo"
    # log odds = log p - log(1 - p), of the geometric mean of an answer's probabilities
    log_odds = means - torch.log1p(-means.exp().clamp(max=1 - 1e-6))
    return -dpo.beta * F.logsigmoid(ahead(log_odds))


def kto_loss(ratios: Tensor, wanted: Tensor, kl: Tensor, dpo: DpoConfig) -> Tensor:
    """The loss of each judged answer.

    Args:
        ratios: (...) log-probabilities of the answers, less those under the reference.
        wanted: (...) bool.
        kl: scalar, at least 0, without gradient: how far the model is from the reference on answers to other prompts.

    Returns:
        (...).
    """
    gains = dpo.beta * torch.where(wanted, ratios - kl, kl - ratios)
    weights = torch.where(wanted, dpo.desirable_weight, dpo.undesirable_weight)
    return weights * (1 - gains.sigmoid())


def ahead(values: Tensor) -> Tensor:
    """First less second: (..., 2) -> (...)."""
    return values[..., 0] - values[..., 1]


def preference_objective(dpo: DpoConfig) -> Objective:
    """What `minimoe dpo` learns. Every value is a mean over the step's pairs (of kto, over its answers).

    Logged beside the loss: `lm_loss`, the first answers' cross-entropy per token; `reward_accuracy`, the share of pairs
    whose chosen answer is ahead (kto: of answers on their side); `reward_margin`, by how much; `chosen_logprob` and
    `rejected_logprob`; `kl`, an estimate of the divergence from the reference per token of these answers (kto: the one
    in its loss, a mean over each micro-batch).
    """

    def objective(model: Any, batch: PairBatch, step: Step) -> Losses:
        outputs = model(**batch.model_inputs(), skip_logits=True, logprob_temperature=1.0, use_cache=False)
        logprobs = batch.sums(outputs.token_logprobs)  # (B, P, 2)
        lengths = batch.sums(scored(batch))
        ratios = logprobs - batch.reference
        chosen_loss = -logprobs[..., 0] / lengths[..., 0].clamp(min=1)
        if dpo.loss == "kto":
            moved = step.sum_ranks(torch.stack([(ratios[..., 1] * batch.real).sum(), batch.real.sum()]).detach())
            kl = (moved[0] / moved[1].clamp(min=1)).clamp(min=0)
            losses = kto_loss(ratios[..., 0], batch.wanted, kl, dpo)
            rewards = dpo.beta * torch.where(batch.wanted, ratios[..., 0], -ratios[..., 0])
            right = torch.where(batch.wanted, ratios[..., 0] > kl, ratios[..., 0] < kl)
            extra = {"logprob": logprobs[..., 0], "kl": kl.expand_as(rewards)}
        else:
            losses = preference_loss(logprobs, lengths, batch.reference, dpo)
            if dpo.loss == "orpo":
                losses = losses + chosen_loss
            values = ratios if dpo.needs_reference else logprobs / lengths.clamp(min=1)
            rewards = dpo.beta * ahead(values)
            right = rewards > 0
            extra = {"chosen_logprob": logprobs[..., 0], "rejected_logprob": logprobs[..., 1]}
            if dpo.needs_reference:
                per_token = (ratios / lengths.clamp(min=1)).mean(-1)
                extra["kl"] = (-per_token).exp() - 1 + per_token  # at least 0, unlike the ratio itself
        losses = losses + dpo.sft_weight * chosen_loss
        means = {"preference_loss": losses, "lm_loss": chosen_loss, "reward_accuracy": right.float()}
        means |= {"reward_margin": rewards, **extra}
        terms = {name: (value * batch.real).sum() / step.num_items for name, value in means.items()}
        loss = terms["preference_loss"]
        return add_router_terms(loss, terms, model, outputs, batch, step)

    return objective


def scored(batch: PairBatch) -> Tensor:
    """(B, S) float32: 1 where a position predicts a token that is scored."""
    return F.pad(batch.labels[:, 1:] >= 0, (0, 1)).float()
