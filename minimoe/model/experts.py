"""Stacked SwiGLU expert weights, and the kernels that apply them to rows sorted by expert.

T tokens, N rows (copies of tokens), D hidden, E experts, I expert width.

All experts live in two tensors. That keeps every expert in the graph whether or not a token chose it (an idle
expert cannot hang data-parallel training), and lets one function compute all groups. `weight[e]` in a loop under
plain autograd would allocate a gradient of the full stack for every expert, E times the memory traffic;
`_GroupedSwiGLU` writes each expert's gradient straight into its slice instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minimoe import kernels
from minimoe.model.precision import compute_dtype, few_sizes, to_compute_dtype
from minimoe.model.rows import replicate_rows, sum_slots


class Experts(nn.Module):
    """E SwiGLU experts. `gate_up_proj` (E, 2I, D) holds gate first, `down_proj` is (E, D, I)."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, tokens: Tensor, order: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Weighted results of expert e for rows[ends[e-1]:ends[e]], where rows are the tokens' k copies in `order`.

        It is the activations that are multiplied by the weights, as what follows is linear: a weight's gradient is then
        the product of two rows that backward has at hand, and the results need not be kept for it.

        Args:
            tokens: (T, D).
            order: (N,), which slot each row is, sorted by expert; slot s belongs to token s // k, N = T * k.
            weights: (T, k), of the slots.
            ends: (E,) int64, where each expert's group ends; counts [6, 9, 5] -> ends [6, 15, 20].

        Returns:
            (N, D) in the computing dtype (autocast's, if on).
        """
        (tokens,) = to_compute_dtype(tokens)
        if self.stay_on_device(tokens):
            gate_up, down = to_compute_dtype(self.gate_up_proj, self.down_proj)
            rows, row_weights = replicate_rows(tokens, order, weights.shape[1]), weights.flatten().gather(0, order)
            return grouped_mm_swiglu(rows, gate_up, down, row_weights, ends)
        if weights.dtype == torch.float32 and kernels.multiplies_experts(tokens, self.gate_up_proj, self.down_proj):
            return _SwiGLUInC.apply(tokens, order, weights, self.gate_up_proj, self.down_proj, ends)
        return _GroupedSwiGLU.apply(tokens, order, weights, self.gate_up_proj, self.down_proj, ends.tolist())

    def stay_on_device(self, rows: Tensor) -> bool:
        """Whether kernels read the groups' sizes where they are, so that the host never waits for the device.

        `F.grouped_mm` does in bf16, with rows and weights that are multiples of 16 bytes. The meta device computes
        nothing and cannot be read from: what runs on it never waits.
        """
        in_bf16 = compute_dtype(rows.device, rows.dtype) == torch.bfloat16
        return rows.device.type in ("cuda", "meta") and in_bf16 and all(n % 8 == 0 for n in self.down_proj.shape[1:])

    def unstacked(self) -> list[tuple[Tensor, Tensor]]:
        """(gate_up (2I, D), down (D, I)) of every expert; one `unbind` each, so gradients are stacked once."""
        return list(zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True))


def swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on its rows: (n, D), (2I, D), (D, I) -> (n, D)."""
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def grouped_mm_swiglu(rows: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """All experts on their rows in two kernels that read `ends` on the device, so that the host need not wait."""
    offsets = ends.to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=offsets).chunk(2, dim=-1)
    activated = (F.silu(gate) * up * weights[:, None]).to(rows.dtype)
    return F.grouped_mm(activated, down.mT, offs=offsets)


class _GroupedSwiGLU(torch.autograd.Function):
    """SwiGLU of contiguous groups of rows, one expert after the other, in the computing dtype.

    What an expert reads and makes on the way (its rows, weights in the computing dtype, activations and gradients of
    them) is made for that expert alone: it stays in the cache, and memory that is used again costs no page faults.
    Saved for backward: tokens and the pre-activations; rows and activations are made again, which is cheap.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, order: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ends: list[int]
    ) -> Tensor:
        width, dtype = down.shape[2], tokens.dtype
        groups, length = groups_of_rows(ends, tokens.device, dtype)
        token_ids = F.pad(order // weights.shape[1], (0, length - len(order)))
        row_weights = weights.flatten()[order]
        hidden = tokens.new_empty(length, 2 * width)
        out = tokens.new_empty(length, tokens.shape[1])
        for expert, group, own in groups:
            rows = kernels.gather_rows(tokens, token_ids[group])
            torch.mm(rows, gate_up[expert].to(dtype).t(), out=hidden[group])
            activated = kernels.swiglu(hidden[group], row_weights[own])
            torch.mm(activated, down[expert].to(dtype).t(), out=out[group])
        ctx.save_for_backward(tokens, token_ids, order, row_weights, gate_up, down, hidden)
        ctx.groups = groups
        return out[: len(order)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_ids, order, row_weights, gate_up, down, hidden = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_rows = tokens.new_empty(hidden.shape[0], tokens.shape[1])
        grad_row_weights = torch.empty_like(row_weights)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, group, own in ctx.groups:
            grad_group = _take(grad_out, group)
            grad_activated = grad_group @ down[expert].to(tokens.dtype)
            # Zeros for rows of other experts, which add nothing to this one's weights.
            activated, grad_hidden, grad_row_weights[own] = kernels.swiglu_backward(
                hidden[group], row_weights[own], grad_activated
            )
            _product_into(grad_down[expert], grad_group.t(), activated)
            torch.mm(grad_hidden, gate_up[expert].to(tokens.dtype), out=grad_rows[group])
            rows = kernels.gather_rows(tokens, token_ids[group])
            _product_into(grad_gate_up[expert], grad_hidden.t(), rows)
        for expert in set(range(len(down))).difference(group.expert for group in ctx.groups):
            grad_down[expert].zero_()
            grad_gate_up[expert].zero_()
        grad_weights = torch.empty_like(row_weights).scatter_(0, order, grad_row_weights).view(len(tokens), -1)
        grad_tokens = sum_slots(grad_rows, order, grad_weights.shape[1])
        return grad_tokens, None, grad_weights, grad_gate_up, grad_down, None


class _SwiGLUInC(torch.autograd.Function):
    """The same with all experts in one call, whose products read the tokens themselves and need no rows to spare."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, order: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor
    ) -> Tensor:
        token_ids, row_weights = order // weights.shape[1], weights.flatten()[order]
        hidden, out = kernels.grouped_swiglu(tokens, token_ids, row_weights, gate_up, down, ends)
        ctx.save_for_backward(tokens, token_ids, order, row_weights, gate_up, down, ends, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_ids, order, row_weights, gate_up, down, ends, hidden = ctx.saved_tensors
        grad_rows, grad_row_weights, grad_gate_up, grad_down = kernels.grouped_swiglu_backward(
            tokens, token_ids, row_weights, gate_up, down, ends, hidden, grad_out.contiguous()
        )
        grad_weights = torch.empty_like(row_weights).scatter_(0, order, grad_row_weights).view(len(tokens), -1)
        grad_tokens = sum_slots(grad_rows, order, grad_weights.shape[1])
        return grad_tokens, None, grad_weights, grad_gate_up, grad_down, None


def _take(rows: Tensor, group: slice) -> Tensor:
    """rows[group], where the slice ends behind the last row with rows of zeros."""
    missing = group.stop - rows.shape[0]
    return F.pad(rows[group], (0, 0, 0, missing)) if missing > 0 else rows[group]


def _product_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target = left @ right; a target of higher precision is converted to."""
    if target.dtype == left.dtype:
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)


class Group(NamedTuple):
    """One expert and its rows."""

    expert: int
    rows: slice  # to compute; behind the expert's own rows there may be some of the experts that follow
    own: slice


def groups_of_rows(ends: list[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Group], int]:
    """The experts that have rows, and the largest end of a slice; [6, 6, 20] -> (0, 0:6, 0:6), (2, 6:20, 6:20) and 20.

    For oneDNN slices are longer (`few_sizes`). What is computed for the rows behind a group is wrong, and is
    overwritten when their own expert's turn comes.
    """
    groups, start = [], 0
    for expert, end in enumerate(ends):
        size = end - start
        if size:
            rows = slice(start, start + few_sizes(size, device, dtype))
            groups.append(Group(expert, rows, slice(start, end)))
        start = end
    return groups, max((group.rows.stop for group in groups), default=0)
