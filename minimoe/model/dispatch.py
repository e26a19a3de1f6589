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
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.model.experts import Experts, swiglu

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
    num_tokens, num_slots = expert_ids.shape
    # dispatch: one row per slot, brought into the order of the experts
    order, ends = sort_by_expert(expert_ids, experts.down_proj.shape[0])
    slots = tokens.repeat_interleave(num_slots, dim=0)  # (T*k, D)
    rows = permute_rows(slots, order)
    # experts: each computes its contiguous rows
    outputs = experts(rows, ends)
    # combine: every result returns to its slot; k weighted slots make one token
    slots = permute_rows(outputs, order.argsort())
    slots = slots.view(num_tokens, num_slots, tokens.shape[1])
    return (slots * weights[..., None]).sum(dim=1).to(tokens.dtype)


def grouped(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Inference path: every expert gathers the tokens that chose it and adds its weighted result in place.

    Arguments and result as in `replicated`. Gradients flow here too.
    """
    # dispatch: which tokens each expert computes, as slices of one sorted list
    order, ends = sort_by_expert(expert_ids, experts.down_proj.shape[0])
    token_ids = order // expert_ids.shape[1]
    slot_weights = weights.flatten()[order, None]  # (T*k, 1)
    # Summed in float32 (weights are float32), as `replicated` does; half precision would round k times.
    combined = torch.zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, weights.dtype), device=tokens.device)
    start = 0
    for (gate_up, down), end in zip(experts.unstacked(), ends.tolist(), strict=True):
        if start < end:
            chosen = token_ids[start:end]
            # experts: one contiguous group
            output = swiglu(tokens[chosen], gate_up, down)
            # combine: accumulate into the tokens' rows
            combined.index_add_(0, chosen, output * slot_weights[start:end])
        start = end
    return combined.to(tokens.dtype)


DISPATCHES: dict[str, Dispatch] = {"replicated": replicated, "grouped": grouped}


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the T*k slots by expert, and where each expert's rows end.

    Returns:
        order (T*k,): slot indices, stable within an expert; ends (E,): cumulative counts.
    """
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0)
    return order, ends


def permute_rows(rows: Tensor, order: Tensor) -> Tensor:
    """rows[order] for a permutation, whose backward is a gather too instead of a scatter with atomics."""
    return _Permute.apply(rows, order)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order.argsort()), None
