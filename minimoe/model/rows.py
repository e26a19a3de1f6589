"""How tokens reach the rows of their experts, and how rows become tokens again.

T tokens, D hidden, E experts, k experts per token. Slot s belongs to token s // k; `order` says which slot each row is.

Rows come and go by gathers, forwards and backwards, where autograd's own backward would be a scatter with atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe import kernels
from minimoe.model.losses import expert_counts

_BLOCK_ROWS = 1024  # measured with 512 numbers a row: 512 and 4096 are slower


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the T*k slots by expert, and where each expert's rows end.

    Returns:
        order (T*k,): slot indices, stable within an expert; ends (E,): cumulative counts.
    """
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    ends = expert_counts(expert_ids, num_experts).cumsum(0)  # a bincount for whose length the host need not wait
    return order, ends


def replicate_rows(tokens: Tensor, order: Tensor, num_slots: int) -> Tensor:
    """`tokens.repeat_interleave(num_slots, dim=0)[order]`, (T, D) -> (T*k, D), in one gather."""
    return _Replicate.apply(tokens, order, num_slots)


def combine_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Undo `order`, then `(slots.view(T, k, D) * weights[..., None]).sum(dim=1)`: (T*k, D) -> (T, D).

    The sum is in float32 at least, the precision of `weights` (T, k). Neither the rows in slot order nor their products
    with the weights are kept.
    """
    return _Combine.apply(rows, order, weights)


def sum_slots(rows: Tensor, order: Tensor, num_slots: int, dtype: torch.dtype) -> Tensor:
    """Backward of `replicate_rows`: undo `order` and sum each token's k rows, (T*k, D) -> (T, D) in `dtype`.

    Adds up in float32 at least and rounds once. Only for use inside an `autograd.Function`.
    """
    places = _inverse(order).view(-1, num_slots)  # (T, k): the row of each slot
    if kernels.made_for(rows) and dtype == torch.float32:
        return kernels.sum_slots(rows, places, None)
    tokens = rows.new_empty(len(places), rows.shape[1], dtype=dtype)
    for block in _blocks(places):
        slots = rows.index_select(0, places[block].flatten()).view(-1, num_slots, rows.shape[1])
        torch.sum(slots, dim=1, dtype=dtype, out=tokens[block])
    return tokens


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_slots = num_slots
        return tokens.index_select(0, order // num_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return sum_slots(grad, order, ctx.num_slots, grad.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        places = _inverse(order).view(weights.shape)  # (T, k): the row of each slot
        if kernels.made_for(rows, float32=(weights,)):
            return kernels.sum_slots(rows, places, weights)
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        combined = rows.new_empty(len(weights), rows.shape[1], dtype=dtype)
        for block in _blocks(places):
            out = combined[block].zero_()
            for slot in range(weights.shape[1]):
                chosen = rows.index_select(0, places[block, slot]).to(dtype)
                out.addcmul_(chosen, weights[block, slot, None])
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, order, weights = ctx.saved_tensors
        if kernels.made_for(rows, float32=(weights, grad)):
            grad_rows, grad_weights = kernels.sum_slots_backward(rows, order, weights, grad)
            return grad_rows, None, grad_weights
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        grad, token_ids = grad.to(rows.dtype), order // weights.shape[1]
        row_weights = weights.flatten()[order, None].to(rows.dtype)  # (T*k, 1)
        grad_rows, grad_row_weights = torch.empty_like(rows), torch.empty_like(weights.flatten())
        for block in _blocks(rows):
            grad_row = torch.index_select(grad, 0, token_ids[block], out=grad_rows[block])
            grad_row_weights[block] = (grad_row * rows[block]).sum(dim=1, dtype=dtype)
            grad_row.mul_(row_weights[block])
        grad_weights = torch.empty_like(grad_row_weights).scatter_(0, order, grad_row_weights)
        return grad_rows, None, grad_weights.view_as(weights)


def _blocks(rows: Tensor) -> list[slice]:
    """Slices of rows to take one after the other. What is made of a block on a CPU stays in the cache, and in memory
    that is used again, where a fresh page costs more than filling it; a GPU takes all rows at once."""
    size = _BLOCK_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: slot s is row inverse[s]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
