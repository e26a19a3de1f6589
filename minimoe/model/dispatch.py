"""Dispatch paths of the MoE block: how tokens reach their experts and come back.

T tokens, D hidden, E experts, k experts per token.

Every entry of `DISPATCHES` is one pure function of (tokens, expert_ids, weights, experts), in three steps:
dispatch, experts, combine. They compute the same values and the same gradients; the tests hold every entry to
that. `replicated` is written for training: slots are independent, so gradients are simple. `grouped` is written
for inference: nothing is copied k times, and the (T*k, D) output is never built. Both algorithms come from
minimind's MoE block (jingyaogong/minimind, May 2025).

Worked example, T = 3 tokens, k = 2, E = 3:

    expert_ids        [[2, 0], [0, 1], [2, 0]]
    flat              [2, 0, 0, 1, 2, 0]     slot s belongs to token s // k
    order             [1, 2, 5, 3, 0, 4]     stable argsort: slots of expert 0, then 1, then 2
    counts -> ends    [3, 1, 2] -> [3, 4, 6] rows 0..2 belong to expert 0, row 3 to expert 1, rows 4..5 to expert 2
    order // k        [0, 1, 2, 1, 0, 2]     the token of each row
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.model.experts import Experts, groups_of_rows, swiglu
from minimoe.model.losses import expert_counts
from minimoe.model.precision import compute_dtype

_BLOCK_ROWS = 1024  # measured with 512 numbers a row: 512 and 4096 are slower

Dispatch = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def replicated(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Training path: k copies of every token, each computed by its own expert, weighted and summed.

    Args:
        tokens: (T, D).
        expert_ids: (T, k) int64.
        weights: (T, k) float32.
        experts: the expert weights.

    Returns:
        (T, D) in the dtype of `tokens`.
    """
    num_slots = expert_ids.shape[1]
    # dispatch: one row per slot, brought into the order of the experts
    order, ends = sort_by_expert(expert_ids, experts.down_proj.shape[0])
    rows = replicate_rows(tokens, order, num_slots)  # tokens.repeat_interleave(k, dim=0)[order], (T*k, D)
    # experts: each computes its contiguous rows
    outputs = experts(rows, ends)
    # combine: every result returns to its slot; k weighted slots make one token
    return combine_rows(outputs, order, weights).to(tokens.dtype)


def grouped(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Inference path: every expert gathers the tokens that chose it and adds its weighted result in place.

    Arguments and result as in `replicated`. Gradients flow here too. Where kernels read the groups' sizes on a GPU, it
    is `replicated`: a loop over experts would make the host wait for them.
    """
    if experts.stay_on_device(tokens):
        return replicated(tokens, expert_ids, weights, experts)
    # dispatch: which tokens each expert computes, as slices of one sorted list
    order, ends = sort_by_expert(expert_ids, experts.down_proj.shape[0])
    groups, length = groups_of_rows(ends.tolist(), tokens.device, compute_dtype(tokens.device, tokens.dtype))
    token_ids = F.pad(order // expert_ids.shape[1], (0, length - len(order)))
    slot_weights = weights.flatten()[order, None]  # (T*k, 1)
    # Summed in float32 (weights are float32), as `replicated` does; half precision would round k times.
    combined = torch.zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, weights.dtype), device=tokens.device)
    unstacked = experts.unstacked()
    for expert, rows, size in groups:
        # experts: one contiguous group
        output = swiglu(tokens[token_ids[rows]], *unstacked[expert])[:size]
        # combine: accumulate into the tokens' rows
        own = slice(rows.start, rows.start + size)
        combined.index_add_(0, token_ids[own], output * slot_weights[own])
    return combined.to(tokens.dtype)


DISPATCHES: dict[str, Dispatch] = {"replicated": replicated, "grouped": grouped}


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
    """`tokens.repeat_interleave(num_slots, dim=0)[order]`, (T, D) -> (T*k, D), in one gather.

    Its backward is a gather and a sum over slots, where autograd's would be a scatter with atomics.
    """
    return _Replicate.apply(tokens, order, num_slots)


def combine_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Undo `order`, then `(slots.view(T, k, D) * weights[..., None]).sum(dim=1)`: (T*k, D) -> (T, D).

    The sum is in float32 at least, the precision of `weights` (T, k); backward multiplies in the dtype of `rows`, as
    the experts' own products do. Neither the rows in slot order nor their products with the weights are kept.
    """
    return _Combine.apply(rows, order, weights)


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
        places = _inverse(order).view(-1, ctx.num_slots)  # (T, k): the row of each slot
        grad_tokens = grad.new_empty(len(places), grad.shape[1])
        for block in _blocks(places):
            slots = grad.index_select(0, places[block].flatten()).view(-1, ctx.num_slots, grad.shape[1])
            torch.sum(slots, dim=1, out=grad_tokens[block])
        return grad_tokens, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        places = _inverse(order).view(weights.shape)  # (T, k): the row of each slot
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
