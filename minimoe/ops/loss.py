"""Next-token loss, and log-probabilities of tokens, of hidden states without ever holding all the logits.

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
    hidden, targets = _with_padding(hidden, targets)
    total = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total / torch.as_tensor(num_targets, device=total.device).clamp(min=1)


def chunked_logprobs(hidden: Tensor, lm_head: nn.Linear, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """`token_logprobs` of model/losses.py."""
    weight = lm_head.weight.to(compute_dtype(lm_head.weight))
    result = torch.zeros(len(targets), device=hidden.device)
    learned = (targets != IGNORE_INDEX).nonzero().flatten()
    rows = hidden.index_select(0, learned).to(compute_dtype(hidden))
    rows, targets = _with_padding(rows, targets[learned])
    logprobs = _LinearLogprobs.apply(rows, weight, targets, temperature)[: len(learned)]
    return result.index_copy(0, learned, logprobs)


def _with_padding(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are not learned added at the end, where few sizes of a matmul are faster than many."""
    last = hidden.shape[0] % _CHUNK_ROWS
    extra = few_sizes(last, hidden.device, hidden.dtype) - last  # rows that are not learned
    if extra:
        hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra), value=IGNORE_INDEX)
    return hidden, targets


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies in float32; matmuls in the dtype of `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        wanted = ctx.needs_input_grad[1]  # not of frozen weights
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
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
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += logits.t() @ chunk
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight, None


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of targets in float32; backward, which alone knows their weights, makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        parts = [
            -_cross_entropies(hidden[rows] @ weight.t() / temperature, targets[rows])[0]
            for rows in _chunks(hidden.shape[0])
        ]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        wanted = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        for rows in _chunks(hidden.shape[0]):
            gradients = _cross_entropies(hidden[rows] @ weight.t() / ctx.temperature, targets[rows])[1]
            gradients = gradients.mul_(-grad[rows, None] / ctx.temperature).to(hidden.dtype)  # (n, V)
            torch.mm(gradients, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += gradients.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, rows, _CHUNK_ROWS)]


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


def _suits(hidden: Tensor, lm_head: nn.Module, targets: Tensor, _: Tensor | float = 1) -> bool:
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
FORMS["token_logprobs"] += [Form("cpu", lambda *args: args[0].is_cpu and _suits(*args), chunked_logprobs)]
