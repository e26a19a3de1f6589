"""Next-token loss of hidden states without ever holding all the logits.

Rows are taken in chunks; the gradient of each chunk's logits takes their place on the spot, while the probabilities are
at hand, so backward only scales.

N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.ops.autocast import compute_dtype
from minimoe.ops.door import FORMS, Form, first_derivative, ordinary, untouched
from minimoe.ops.onednn import few_sizes

IGNORE_INDEX = -100  # target of positions that are not learned; torch's and transformers' convention
_CHUNK_ROWS = 1024  # rows of logits held at once
_BLOCK_ROWS = 128  # of them, those whose probabilities are: on a CPU they stay in the cache


def chunked_loss(hidden: Tensor, lm_head: nn.Linear, targets: Tensor, num_targets: Tensor | int) -> Tensor:
    """`hidden_loss` of model/losses.py; which says what the arguments are."""
    weight = lm_head.weight
    if not torch.is_grad_enabled():  # which the function cannot see: to it, a parameter always needs a gradient
        hidden, weight = hidden.detach(), weight.detach()
    if hidden.is_cpu:  # on a GPU, counting the learned rows would synchronise
        learned = (targets != IGNORE_INDEX).nonzero().flatten()
        hidden, targets = hidden.index_select(0, learned), targets[learned]
    hidden, weight = hidden.to(compute_dtype(hidden)), weight.to(compute_dtype(weight))
    last = hidden.shape[0] % _CHUNK_ROWS
    extra = few_sizes(last, hidden.device, hidden.dtype) - last  # rows that are not learned
    if extra:
        hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra), value=IGNORE_INDEX)
    total = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total / torch.as_tensor(num_targets, device=total.device).clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies in float32; matmuls in the dtype of `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        memory = hidden.new_empty(min(_CHUNK_ROWS, hidden.shape[0]), weight.shape[0])  # for each chunk in turn
        block_rows = _BLOCK_ROWS if hidden.is_cpu else _CHUNK_ROWS
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
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None


def _cross_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, V), and their gradients (n, V), in float32; both 0 where the target is not learned."""
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    # log sum exp(x) = max(x) - log(max(p)), since the likeliest token has p = exp(max - logsumexp)
    normaliser = logits.amax(-1).float() - probabilities.amax(-1).log()  # (n,)
    counts = targets != IGNORE_INDEX
    safe = targets.masked_fill(~counts, 0)[:, None]  # any other negative target is an error
    losses = normaliser - logits.gather(1, safe)[:, 0].float()
    # d loss / d logits = p - onehot(target)
    probabilities.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=torch.float32))
    return losses * counts, probabilities.mul_(counts[:, None])


def _suits(hidden: Tensor, lm_head: nn.Module, targets: Tensor, num_targets: Tensor | int) -> bool:
    return (
        untouched(lm_head, "Linear")
        and lm_head.bias is None
        and ordinary(hidden, lm_head.weight, targets)
        and hidden.dtype != torch.float64  # it adds up in float32
        and not (hidden.is_cpu and torch.compiler.is_compiling())  # the number of learned rows is data
    )


FORMS["hidden_loss"] += [
    Form("cpu", lambda *args: args[0].is_cpu and _suits(*args), chunked_loss),
    Form("cuda", lambda *args: not args[0].is_cpu and _suits(*args), chunked_loss),
]
