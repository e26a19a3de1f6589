"""Training losses as pure functions. Padding never counts: every function takes the mask of real tokens.

B batch, S sequence, T tokens = B*S, E experts, k experts per token, V vocabulary.

Sources: Switch Transformer (arXiv 2101.03961) for the balance loss, DeepSeek-V2 (arXiv 2405.04434) for its
sequence-wise form, ST-MoE (arXiv 2202.08906) for the z-loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.model.precision import few_sizes, to_compute_dtype

IGNORE_INDEX = -100  # label of positions that are not learned; torch's and transformers' convention
_CHUNK_ROWS = 1024  # rows of logits held at once by `fused_next_token_loss`
_BLOCK_ROWS = 128  # of them, those whose probabilities are: on a CPU they stay in the cache


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


def fused_next_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_targets: Tensor | int | None = None
) -> Tensor:
    """`next_token_loss(hidden @ weight.T, targets, num_targets)` without ever holding the logits (N, V).

    Rows are taken in chunks; the gradient of each chunk's logits takes their place on the spot, while the
    probabilities are at hand, so backward only scales.

    Args:
        hidden: (N, D) states, of the positions that are learned or not.
        weight: (V, D) of the language-model head.
    """
    if num_targets is None:
        num_targets = (targets != IGNORE_INDEX).sum()
    if not torch.is_grad_enabled():  # which the function cannot see: to it, a parameter always needs a gradient
        hidden, weight = hidden.detach(), weight.detach()
    hidden, weight = to_compute_dtype(hidden, weight)
    last = hidden.shape[0] % _CHUNK_ROWS
    extra = few_sizes(last, hidden.device, hidden.dtype) - last  # rows that are not learned
    if extra:
        hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra), value=IGNORE_INDEX)
    total = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total / torch.as_tensor(num_targets, device=total.device).clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies in float32; products in the dtype of `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        memory = hidden.new_empty(min(_CHUNK_ROWS, hidden.shape[0]), weight.shape[0])  # for each chunk in turn
        block_rows = _BLOCK_ROWS if hidden.device.type == "cpu" else _CHUNK_ROWS
        for start in range(0, hidden.shape[0], _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            chunk, target = hidden[rows], targets[rows]
            logits = torch.mm(chunk, weight.t(), out=memory[: chunk.shape[0]])  # (n, V)
            for block, block_targets in zip(logits.split(block_rows), target.split(block_rows), strict=True):
                losses, gradients = _cross_entropies(block, block_targets)
                total += losses.sum()
                if needs_grad:
                    block.copy_(gradients)
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
                grad_weight += logits.t() @ chunk
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None


def _cross_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, V), and their gradients (n, V), in float32; both 0 where the target is ignored."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    # log sum exp(x) = max(x) - log(max(p)), since the likeliest token has p = exp(max - logsumexp)
    normaliser = logits.amax(-1).float() - probabilities.amax(-1).log()  # (n,)
    counts = targets != IGNORE_INDEX
    safe = targets.clamp(min=0)[:, None]
    losses = normaliser - logits.gather(1, safe)[:, 0].float()
    # d loss / d logits = p - onehot(target)
    probabilities.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=torch.float32))
    return losses * counts, probabilities.mul_(counts[:, None])


def expert_counts(expert_ids: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many real tokens chose each expert.

    Args:
        expert_ids: (T, k).
        mask: (T,) bool, True for real tokens; None means all.

    Returns:
        (E,) int64.
    """
    chosen = expert_ids.flatten()  # (T*k,)
    ones = torch.ones_like(chosen) if mask is None else mask.repeat_interleave(expert_ids.shape[1]).to(chosen.dtype)
    # scatter_add_ rather than bincount: a masked slot adds 0 without a data-dependent shape.
    return torch.zeros(num_experts, dtype=chosen.dtype, device=chosen.device).scatter_add_(0, chosen, ones)


def load_balancing_loss(
    probabilities: Tensor, expert_ids: Tensor, mask: Tensor | None = None, batch_size: int | None = None
) -> Tensor:
    """E * sum_e f_e * P_e for one layer: f_e the tokens' assignments to expert e per token, P_e its mean probability.

    f carries no gradient; P does. A perfectly balanced router gives k, as in `transformers`.

    Args:
        probabilities: (T, E) router probabilities, each row summing to 1.
        expert_ids: (T, k).
        mask: (T,) bool, True for real tokens; None means all.
        batch_size: None balances over all T tokens; B balances within each of B sequences and averages them,
            weighted by their real tokens.

    Returns:
        A scalar.
    """
    num_experts = probabilities.shape[1]
    rows = 1 if batch_size is None else batch_size
    weight = torch.ones_like(probabilities[:, 0]) if mask is None else mask.to(probabilities.dtype)  # (T,)
    assigned = torch.zeros_like(probabilities).scatter_(1, expert_ids, 1.0) * weight[:, None]  # (T, E)
    tokens = weight.view(rows, -1).sum(1)  # (rows,)
    per_token = tokens.clamp(min=1)[:, None]
    f = assigned.view(rows, -1, num_experts).sum(1) / per_token  # (rows, E), sums to k
    p = (probabilities * weight[:, None]).view(rows, -1, num_experts).sum(1) / per_token
    loss = num_experts * (f * p).sum(1)  # (rows,)
    return (loss * tokens).sum() / tokens.sum().clamp(min=1)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router logits (T, E): keeps them small. Returns a scalar."""
    squared = logits.float().logsumexp(dim=-1).square()  # (T,)
    if mask is None:
        return squared.mean()
    weight = mask.to(squared.dtype)
    return (squared * weight).sum() / weight.sum().clamp(min=1)
