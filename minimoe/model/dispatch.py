"""Dispatch paths of the MoE block: how tokens reach their experts and come back.

T tokens, D hidden, E experts, k experts per token.

Both paths are one pure function of (tokens, expert_ids, weights, experts): the same values and the same gradients. The
tests check that for every entry of `DISPATCHES` and for every faster form of one. `replicated` is written for training:
slots are independent, so gradients are simple. `grouped` is written for inference: the (T*k, D) output is never built.
An expert is a function of rows, (n, D) -> (n, D), also for n = 0. Both algorithms come from minimind's MoE block
(jingyaogong/minimind, May 2025).

Worked example, T = 3 tokens a, b, c, k = 2, E = 3:

    expert_ids        [[2, 0], [0, 1], [2, 0]]
    chosen            [2, 0, 0, 1, 2, 0]     slot s belongs to token s // k: slots 0 and 1 to a, 2 and 3 to b, ...
    order             [1, 2, 5, 3, 0, 4]     stable argsort: slots of expert 0, then 1, then 2
    counts -> ends    [3, 1, 2] -> [3, 4, 6] rows 0..2 belong to expert 0, row 3 to expert 1, rows 4..5 to expert 2
    order // k        [0, 1, 2, 1, 0, 2]     the token of each row: a b c | b | a c
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from minimoe.ops import accelerated


class Experts(Protocol):
    """E functions of rows, such as a list of them, or the module of experts.py."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]: ...


Dispatch = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


@accelerated
def replicated(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Training path: k copies of every token, each computed by its own expert, weighted and summed.

    Args:
        tokens: (T, D).
        expert_ids: (T, k) int64.
        weights: (T, k) float32.
        experts: E functions of rows, (n, D) -> (n, D).

    Returns:
        (T, D) in the dtype of `tokens`.
    """
    (num_tokens, k), hidden_size = expert_ids.shape, tokens.shape[1]
    copies = tokens.repeat_interleave(k, dim=0)  # (T*k, D): slot s is a copy of token s // k
    chosen = expert_ids.flatten()  # (T*k,)
    slots = torch.zeros_like(copies)  # as expert parallelism leaves slots to other ranks: id E, weight 0
    for e, expert in enumerate(experts):
        mine = chosen == e
        slots[mine] = expert(copies[mine]).to(slots.dtype)  # back to the slots they came from
    return (slots.view(num_tokens, k, hidden_size) * weights[..., None]).sum(dim=1).to(tokens.dtype)


@accelerated
def grouped(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Inference path: slots sorted by expert; every expert computes one slice and adds its weighted results in place.

    Arguments and result as in `replicated`. Gradients flow here too.
    """
    k = expert_ids.shape[1]
    chosen = expert_ids.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(experts))[: len(experts)]  # the slice tells a compiler how many there are
    ends = counts.cumsum(0).tolist()
    token_ids, slot_weights = order // k, weights.flatten()[order, None]
    # Summed in float32 (weights are float32), as `replicated` does; half precision would round k times.
    out = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, weights.dtype))
    for expert, start, end in zip(experts, [0, *ends], ends, strict=False):
        rows = token_ids[start:end]
        out.index_add_(0, rows, expert(tokens[rows]) * slot_weights[start:end])
    return out.to(tokens.dtype)


DISPATCHES: dict[str, Dispatch] = {"replicated": replicated, "grouped": grouped}
