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


def combine_rows(rows: Tensor, order: Tensor, num_slots: int) -> Tensor:
    """Undo `order`, then `slots.view(T, k, D).sum(dim=1)`, (T*k, D) -> (T, D): `replicate_rows` backwards."""
    return _Combine.apply(rows, order, num_slots)


def sum_slots(rows: Tensor, order: Tensor, num_slots: int) -> Tensor:
    """`combine_rows` without its gradient. Adds up in float32 at least and rounds once; no copy of the rows is made."""
    places = _inverse(order).view(-1, num_slots)  # (T, k): the row of each slot
    if kernels.made_for(rows):
        return kernels.sum_slots(rows, places)
    tokens = rows.new_empty(len(places), rows.shape[1])
    for block in _blocks(places):
        slots = rows.index_select(0, places[block].flatten()).view(-1, num_slots, rows.shape[1])
        torch.sum(slots, dim=1, out=tokens[block])
    return tokens


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_slots = num_slots
        return kernels.gather_rows(tokens, order // num_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return sum_slots(grad, order, ctx.num_slots), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_slots = num_slots
        return sum_slots(rows, order, num_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return kernels.gather_rows(grad, order // ctx.num_slots), None, None


def _blocks(rows: Tensor) -> list[slice]:
    """Slices of rows to take one after the other. What is made of a block on a CPU stays in the cache, and in memory
    that is used again, where a fresh page costs more than filling it; a GPU takes all rows at once."""
    size = _BLOCK_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: slot s is row inverse[s]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
