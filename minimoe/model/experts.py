"""Stacked SwiGLU expert weights, and the kernels that apply them to rows sorted by expert.

N rows, D hidden, E experts, I expert width.

All experts live in two tensors. That keeps every expert in the graph whether or not a token chose it (an idle
expert cannot hang data-parallel training), and lets one function compute all groups. `weight[e]` in a loop under
plain autograd would allocate a gradient of the full stack for every expert, E times the memory traffic;
`_GroupedSwiGLU` writes each expert's gradient straight into its slice instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minimoe.model.precision import to_compute_dtype


class Experts(nn.Module):
    """E SwiGLU experts. `gate_up_proj` (E, 2I, D) holds gate first, `down_proj` is (E, D, I)."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply expert e to rows[ends[e-1]:ends[e]].

        Args:
            rows: (N, D), sorted by expert.
            ends: (E,) int64, where each expert's group ends; counts [6, 9, 5] -> ends [6, 15, 20].

        Returns:
            (N, D) in the computing dtype (autocast's, if on).
        """
        rows, gate_up, down = to_compute_dtype(rows, self.gate_up_proj, self.down_proj)
        return _GroupedSwiGLU.apply(rows, gate_up, down, ends.tolist())

    def unstacked(self) -> list[tuple[Tensor, Tensor]]:
        """(gate_up (2I, D), down (D, I)) of every expert; one `unbind` each, so gradients are stacked once."""
        return list(zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True))


def swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on its rows: (n, D), (2I, D), (D, I) -> (n, D)."""
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class _GroupedSwiGLU(torch.autograd.Function):
    """SwiGLU of contiguous groups of rows, one matrix product per group and weight.

    Saved for backward: rows and the pre-activations; the activation is computed again, which is cheap and saves
    N*I numbers.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, ends: list[int]) -> Tensor:
        width = down.shape[2]
        hidden = rows.new_empty(rows.shape[0], 2 * width)  # (N, 2I)
        out = torch.empty_like(rows)
        for expert, group in _groups(ends):
            torch.mm(rows[group], gate_up[expert].t(), out=hidden[group])
        activated = F.silu(hidden[:, :width]).mul_(hidden[:, width:])  # (N, I)
        for expert, group in _groups(ends):
            torch.mm(activated[group], down[expert].t(), out=out[group])
        ctx.save_for_backward(rows, gate_up, down, hidden)
        ctx.ends = ends
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, gate_up, down, hidden = ctx.saved_tensors
        width = down.shape[2]
        grad_out = grad_out.contiguous()
        gate, up = hidden[:, :width], hidden[:, width:]
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activated = silu * up

        grad_down, grad_gate_up = torch.empty_like(down), torch.empty_like(gate_up)
        grad_activated = torch.empty_like(activated)
        for expert, group in _groups(ctx.ends):
            torch.mm(grad_out[group], down[expert], out=grad_activated[group])
            torch.mm(grad_out[group].t(), activated[group], out=grad_down[expert])

        # d silu(g)/dg = sigmoid(g) * (1 + g * (1 - sigmoid(g))) = sigmoid + silu * (1 - sigmoid)
        grad_hidden = torch.empty_like(hidden)
        torch.mul(grad_activated, silu, out=grad_hidden[:, width:])
        slope = silu.mul_(1 - sigmoid).add_(sigmoid)
        torch.mul(grad_activated.mul_(up), slope, out=grad_hidden[:, :width])

        grad_rows = torch.empty_like(rows)
        for expert, group in _groups(ctx.ends):
            torch.mm(grad_hidden[group], gate_up[expert], out=grad_rows[group])
            torch.mm(grad_hidden[group].t(), rows[group], out=grad_gate_up[expert])
        for expert in _idle(ctx.ends):
            grad_down[expert].zero_()
            grad_gate_up[expert].zero_()
        return grad_rows, grad_gate_up, grad_down, None


def _groups(ends: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows; ends [6, 6, 20] -> (0, 0:6), (2, 6:20)."""
    starts = [0, *ends[:-1]]
    return [
        (expert, slice(start, end)) for expert, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end
    ]


def _idle(ends: list[int]) -> list[int]:
    """Experts without rows."""
    return [expert for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if start == end]
