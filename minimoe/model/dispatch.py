"""Dispatch paths of the MoE block: how tokens reach their experts and come back.

T tokens, D hidden, E experts, k experts per token.

Every entry of `DISPATCHES` is one pure function of (tokens, expert_ids, weights, experts), in three steps:
dispatch, experts, combine. They compute the same values and the same gradients; the tests hold every entry to
that. `replicated` is written for training: slots are independent, so gradients are simple. `grouped` is written
for inference: the (T*k, D) output is never built. Both algorithms come from minimind's MoE block
(jingyaogong/minimind, May 2025).

Worked example, T = 3 tokens, k = 2, E = 3:

    expert_ids        [[2, 0], [0, 1], [2, 0]]
    flat              [2, 0, 0, 1, 2, 0]     slot s belongs to token s // k
    order             [1, 2, 5, 3, 0, 4]     stable argsort: slots of expert 0, then 1, then 2
    counts -> ends    [3, 1, 2] -> [3, 4, 6] rows 0..2 belong to expert 0, row 3 to expert 1, rows 4..5 to expert 2
    order // k        [0, 1, 2, 1, 0, 2]     the token of each row
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.model.experts import Experts, groups_of_rows, swiglu
from minimoe.model.precision import compute_dtype
from minimoe.model.rows import combine_rows, sort_by_expert

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
    # dispatch: one row per slot, in the order of the experts
    order, ends = sort_by_expert(expert_ids, experts.down_proj.shape[0])
    # experts: each gathers its contiguous rows of tokens.repeat_interleave(k, dim=0)[order], computes and weighs them
    outputs = experts(tokens, order, weights, ends)  # (T*k, D)
    # combine: every result returns to its slot; k slots make one token
    return combine_rows(outputs, order, expert_ids.shape[1]).to(tokens.dtype)


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
    for expert, rows, own in groups:
        # experts: one contiguous group
        output = swiglu(tokens[token_ids[rows]], *unstacked[expert])[: own.stop - own.start]
        # combine: accumulate into the tokens' rows
        combined.index_add_(0, token_ids[own], output * slot_weights[own])
    return combined.to(tokens.dtype)


DISPATCHES: dict[str, Dispatch] = {"replicated": replicated, "grouped": grouped}
