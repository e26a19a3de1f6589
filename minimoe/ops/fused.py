"""The dispatch paths on a GPU by kernels of Triton: no copy of the tokens forward, no activations kept for backward.

After SonicMoE (arXiv 2512.14080). Forward, one kernel gathers each expert's tokens, multiplies them with its gate and
up matrices, and weighs SwiGLU of the two: only the weighted activations are written. Backward, one kernel computes them
again beside the gradient of their own. All other products are `F.grouped_mm`, and a token's results are summed where
they lie (`sum_slots`).

Never run on a GPU yet: tests/test_fused.py runs the kernels by Triton's interpreter on a CPU. So this backend is only
used where `MINIMOE_OPS` names it, and Triton is imported only then.

T tokens, k experts per token, N = T*k rows sorted by expert, D hidden, E experts, I expert width.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.ops.autocast import compute_dtype
from minimoe.ops.door import FORMS, Form, first_derivative
from minimoe.ops.moe import combine, fits_grouped_mm, gather_rows, grads_of_slots, sort_by_expert, stacked

# Of a tile: rows, columns of an expert's width, and the depth of a step along the hidden size.
ROWS, COLUMNS, DEPTH = 64, 64, 64


def _fused(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    slots = sort_by_expert(expert_ids, experts.num_experts)
    dtype = compute_dtype(tokens)
    row_weights = weights.flatten().gather(0, slots.order)
    gate_up, down = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    rows = _FusedExperts.apply(tokens.to(dtype), *slots, row_weights, gate_up, down, expert_ids.shape[1])
    return combine(rows, slots.order, expert_ids.shape[1]).to(tokens.dtype)


class _FusedExperts(torch.autograd.Function):
    """All experts on rows sorted by expert: (T, D) -> (N, D), in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        order: Tensor,
        token_ids: Tensor,
        ends: Tensor,
        row_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        k: int,
    ) -> Tensor:
        offsets = ends.to(torch.int32)
        activated = tokens.new_empty(len(token_ids), down.shape[2])
        _launch(_kernels().forward, tokens, token_ids, ends, row_weights, gate_up, activated)
        ctx.save_for_backward(tokens, order, token_ids, ends, row_weights, gate_up, down)
        ctx.k = k
        return F.grouped_mm(activated, down.mT, offs=offsets)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, order, token_ids, ends, row_weights, gate_up, down = ctx.saved_tensors
        offsets, grad_out = ends.to(torch.int32), grad_out.contiguous()
        width = down.shape[2]
        grad_activated = F.grouped_mm(grad_out, down, offs=offsets)  # (N, I)
        activated = torch.empty_like(grad_activated)
        grad_hidden = tokens.new_empty(len(token_ids), 2 * width)
        blocks = -(-width // COLUMNS)
        grad_weights = row_weights.new_zeros(blocks, len(token_ids))  # a part from each block of columns
        outputs = (activated, grad_activated, grad_hidden, grad_weights)
        _launch(_kernels().backward, tokens, token_ids, ends, row_weights, gate_up, *outputs)
        rows = gather_rows(tokens, token_ids)
        grad_down = F.grouped_mm(grad_out.mT, activated, offs=offsets)  # (E, D, I)
        grad_gate_up = F.grouped_mm(grad_hidden.mT, rows, offs=offsets)
        grad_rows = F.grouped_mm(grad_hidden, gate_up, offs=offsets)
        grad_tokens, _ = grads_of_slots(order, ctx.k, grad_rows, row_weights)
        return grad_tokens, None, None, None, grad_weights.sum(0), grad_gate_up, grad_down, None


def _launch(kernel: Any, tokens: Tensor, token_ids: Tensor, ends: Tensor, *others: Tensor) -> None:
    """Over tiles of rows, of which each expert has its own, and blocks of columns.

    How many rows an expert has is read on the device: some of the last tiles find nothing to do.
    """
    num_experts, width = len(ends), others[1].shape[1] // 2
    counts = ends.diff(prepend=ends.new_zeros(1))
    tile_ends = ((counts + ROWS - 1) // ROWS).cumsum(0)
    grid = (-(-len(token_ids) // ROWS) + num_experts, -(-width // COLUMNS))
    kernel[grid](
        tokens, token_ids, ends, tile_ends, *others,
        N=len(token_ids), D=tokens.shape[1], WIDTH=width, E=num_experts,
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, WIDEN=tokens.is_cpu,
    )  # fmt: skip


@lru_cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


@lru_cache
def _kernels() -> Any:
    from minimoe.ops import kernels

    return kernels


def _suits(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    """On a CPU only by Triton's interpreter, which tests ask for."""
    interpreted = tokens.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (tokens.is_cuda or interpreted)
        and stacked(experts, tokens, expert_ids, weights)
        and fits_grouped_mm(tokens, experts)
        and weights.dtype == torch.float32
        and expert_ids.numel() > 0
        and not torch.compiler.is_compiling()
        and _is_installed()
    )


for path in ("replicated", "grouped"):
    before = next(place for place, form in enumerate(FORMS[path]) if form.backend == "cuda")
    FORMS[path].insert(before, Form("triton", _suits, _fused))
