"""Training losses as pure functions. Padding never counts: every function takes the mask of real tokens.

B batch, S sequence, T tokens = B*S, E experts, k experts per token, V vocabulary.

Sources: Switch Transformer (arXiv 2101.03961) for the balance loss, DeepSeek-V2 (arXiv 2405.04434) for its
sequence-wise form, Qiu et al. (arXiv 2501.11873) for its global one, ST-MoE (arXiv 2202.08906) for the z-loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.ops import accelerated
from minimoe.ops.loss import IGNORE_INDEX


def next_token_loss(logits: Tensor, targets: Tensor, num_targets: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats, summed over targets and divided by `num_targets`.

    Args:
        logits: (N, V), of any float type; computed in float32.
        targets: (N,) token ids, already shifted; IGNORE_INDEX is skipped.
        num_targets: divisor; None means the targets of this call. Under gradient accumulation pass the count of
            the whole step, and the sum of the micro-batches' losses is exactly the loss of the joined batch.

    Returns:
        A scalar; 0 (with gradient 0) when there is nothing to predict, where a mean would be NaN.
    """
    if num_targets is None:
        num_targets = (targets != IGNORE_INDEX).sum()
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / torch.as_tensor(num_targets, device=total.device).clamp(min=1)


@accelerated
def hidden_loss(hidden: Tensor, lm_head: nn.Module, targets: Tensor, num_targets: Tensor | int) -> Tensor:
    """`next_token_loss` of the head's logits, for those who do not need the logits.

    Args:
        hidden: (N, D) states, of positions that are learned or not.
        lm_head: (N, D) -> (N, V).
        targets, num_targets: as in `next_token_loss`.
    """
    return next_token_loss(lm_head(hidden), targets, num_targets)


@accelerated
def token_logprobs(hidden: Tensor, lm_head: nn.Module, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature), (N,) float32; 0 where it is IGNORE_INDEX.

    Args:
        hidden, lm_head, targets: as in `hidden_loss`.
    """
    logits = lm_head(hidden).float() / temperature
    return -F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


def expert_counts(expert_ids: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many real tokens chose each expert.

    Args:
        expert_ids: (T, k); the id E is a slot that a router left open.
        mask: (T,) bool, True for real tokens; None means all.

    Returns:
        (E,) int64.
    """
    chosen = expert_ids.flatten()  # (T*k,)
    ones = torch.ones_like(chosen) if mask is None else mask.repeat_interleave(expert_ids.shape[1]).to(chosen.dtype)
    # scatter_add rather than bincount: a masked slot adds 0 without a data-dependent shape.
    counts = torch.zeros(num_experts + 1, dtype=chosen.dtype, device=chosen.device).scatter_add(0, chosen, ones)
    return counts[:num_experts]


def load_balancing_loss(
    probabilities: Tensor, expert_ids: Tensor, mask: Tensor | None = None, batch_size: int | None = None
) -> Tensor:
    """E * sum_e f_e * P_e for one layer: f_e the tokens' assignments to expert e per token, P_e its mean probability.

    f carries no gradient; P does. A perfectly balanced router gives k, as in `transformers`.

    Args:
        probabilities: (T, E) router probabilities, each row summing to 1.
        expert_ids: (T, k); the id E is a slot that a router left open.
        mask: (T,) bool, True for real tokens; None means all.
        batch_size: None balances over all T tokens; B balances within each of B sequences and averages them,
            weighted by their real tokens.

    Returns:
        A scalar.
    """
    num_experts = probabilities.shape[1]
    rows = 1 if batch_size is None else batch_size
    weight = torch.ones_like(probabilities[:, 0]) if mask is None else mask.to(probabilities.dtype)  # (T,)
    open_too = F.pad(torch.zeros_like(probabilities), (0, 1))
    assigned = open_too.scatter_(1, expert_ids, 1.0)[:, :num_experts] * weight[:, None]  # (T, E)
    tokens = weight.view(rows, -1).sum(1)  # (rows,)
    per_token = tokens.clamp(min=1)[:, None]
    f = assigned.view(rows, -1, num_experts).sum(1) / per_token  # (rows, E), sums to k
    p = (probabilities * weight[:, None]).view(rows, -1, num_experts).sum(1) / per_token
    loss = num_experts * (f * p).sum(1)  # (rows,)
    return (loss * tokens).sum() / tokens.sum().clamp(min=1)


def global_balancing_loss(probabilities: Tensor, counts: Tensor, num_experts_per_tok: int) -> Tensor:
    """`load_balancing_loss` averaged over layers, with the experts' shares taken of more tokens than the probabilities.

    The loss is linear in the probabilities: with the counts of a whole step, the losses of its parts, weighted by their
    tokens, add up to the loss of the whole.

    Args:
        probabilities: (L, E) mean probability of each expert over the tokens of this call.
        counts: (L, E) assignments of those and other tokens, as `expert_counts` gives them.

    Returns:
        A scalar.
    """
    f = num_experts_per_tok * counts / counts.sum(1, keepdim=True).clamp(min=1)  # (L, E), sums to k
    return counts.shape[1] * (f * probabilities).sum(1).mean()


def mean_probabilities(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """(E,): each expert's mean of the probabilities (T, E) over real tokens (T,)."""
    if mask is None:
        return probabilities.mean(0)
    weight = mask.to(probabilities.dtype)
    return (probabilities * weight[:, None]).sum(0) / weight.sum().clamp(min=1)


@torch.no_grad()
def router_confidence(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """How sure a router is: the largest of each real token's probabilities (T, E), on average. Returns a scalar."""
    largest = probabilities.amax(dim=-1)  # (T,)
    if mask is None:
        return largest.mean()
    weight = mask.to(largest.dtype)
    return (largest * weight).sum() / weight.sum().clamp(min=1)


def router_entropy_loss(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the router's probabilities (T, E), in nats (Huang et al., arXiv 2403.07652, equation 6): without
    it a top-p router spreads its probability to be given more experts. Returns a scalar."""
    entropy = torch.special.entr(probabilities).sum(dim=-1)  # (T,)
    if mask is None:
        return entropy.mean()
    weight = mask.to(entropy.dtype)
    return (entropy * weight).sum() / weight.sum().clamp(min=1)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router logits (T, E): keeps them small. Returns a scalar."""
    squared = logits.float().logsumexp(dim=-1).square()  # (T,)
    if mask is None:
        return squared.mean()
    weight = mask.to(squared.dtype)
    return (squared * weight).sum() / weight.sum().clamp(min=1)
