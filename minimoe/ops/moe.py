"""Forms of the two dispatch paths: all experts on rows sorted by expert, on a CPU and on a GPU.

Both paths are one function, so each form serves both. It gathers every expert's rows, computes them as one contiguous
group, and sums the k results of a token.

T tokens, k experts per token, N = T*k rows, D hidden, E experts, I expert width. Slot s belongs to token s // k;
`order` says which slot each row is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.ops.autocast import compute_dtype
from minimoe.ops.door import FORMS, Form, accelerated, first_derivative, needs_gradient, ordinary, untouched
from minimoe.ops.onednn import few_sizes

_BLOCK_ROWS = 1024  # tokens summed at a time on a CPU: what is made of them stays in the cache


class SortedSlots(NamedTuple):
    """The T*k slots in the order of their experts; the worked example is in model/dispatch.py."""

    order: Tensor  # (N,) int64, stable within an expert
    token_ids: Tensor  # (N,) int64: order // k
    ends: Tensor  # (E,) int64, where each expert's rows end


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> SortedSlots:
    """Sort without synchronising with a GPU."""
    chosen, order = expert_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(num_experts, device=chosen.device), right=True)
    return SortedSlots(order, order // expert_ids.shape[1], ends)


# ---- rows: every gather's backward is a gather, where autograd's own would scatter with atomics ----


@accelerated
def gather_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """rows[ids]: (T, D), (N,) -> (N, D)."""
    return rows.index_select(0, ids)


@accelerated
def sum_slots(rows: Tensor, places: Tensor) -> Tensor:
    """The sum over k of rows[places[t, k]]: (N, D), (T, k) -> (T, D), added up in float32 at least and rounded once."""
    tokens = rows.new_empty(len(places), rows.shape[1])
    size = _BLOCK_ROWS if rows.is_cpu else max(len(places), 1)
    for start in range(0, len(places), size):
        block = places[start : start + size]
        slots = rows.index_select(0, block.flatten()).view(*block.shape, rows.shape[1])
        torch.sum(slots, dim=1, out=tokens[start : start + size])
    return tokens


class _Replicate(torch.autograd.Function):
    """`tokens.repeat_interleave(k, dim=0)[order]`, (T, D) -> (N, D)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return gather_rows(tokens, order // k)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return sum_slots(grad, inverse(order).view(-1, ctx.k)), None, None


class _Combine(torch.autograd.Function):
    """Undo `order`, then `slots.view(T, k, D).sum(dim=1)`, (N, D) -> (T, D): `_Replicate` backwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return sum_slots(rows, inverse(order).view(-1, k))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gather_rows(grad, order // ctx.k), None, None


combine = _Combine.apply


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: slot s is row inverse[s]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


# ---- a GPU ----


def _on_device(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    """Two grouped matmuls that read the groups' sizes on the device, so that nothing synchronises."""
    dtype, k = compute_dtype(tokens), expert_ids.shape[1]
    slots = sort_by_expert(expert_ids, experts.num_experts)
    offsets = slots.ends.to(torch.int32)
    rows = _Replicate.apply(tokens.to(dtype), slots.order, k)
    gate, up = F.grouped_mm(rows, experts.gate_up_proj.to(dtype).mT, offs=offsets).chunk(2, dim=-1)
    row_weights = weights.flatten().gather(0, slots.order)
    # Activations are weighted, not results, as what follows is linear.
    activated = (F.silu(gate) * up * row_weights[:, None]).to(dtype)
    return combine(F.grouped_mm(activated, experts.down_proj.to(dtype).mT, offs=offsets), slots.order, k).to(
        tokens.dtype
    )


def _suits_device(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    """The meta device stands in for a GPU."""
    return (
        tokens.device.type in ("cuda", "meta")
        and stacked(experts, tokens, expert_ids, weights)
        and fits_grouped_mm(tokens, experts)
    )


def fits_grouped_mm(tokens: Tensor, experts: Any) -> bool:
    """Whether `F.grouped_mm` takes them: bf16, rows and weights of whole 16 bytes."""
    return compute_dtype(tokens) == torch.bfloat16 and all(size % 8 == 0 for size in experts.down_proj.shape[1:])


def stacked(experts: Any, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> bool:
    """Whether the experts are the project's own two stacks of weights, and the arguments fit them."""
    return (
        (untouched(experts, "Experts") or _shared_out(experts, expert_ids))
        and ordinary(tokens, expert_ids, weights, experts.gate_up_proj, experts.down_proj)
        and fitting(experts, tokens, expert_ids, weights)
    )


def _shared_out(experts: Any, expert_ids: Tensor) -> bool:
    """Whether expert parallelism has put a `forward` of its own before the class's, and FSDP a class: they call it with
    the rows and the weights of this rank. Where the ranks have one batch, it leaves slots to others: those have the id
    E, which only the definitions know."""
    own = (kind.__module__ == "minimoe.model.experts" for kind in type(experts).__mro__ if kind.__name__ == "Experts")
    return getattr(experts, "_is_expert_parallel", False) and any(own) and not bool((expert_ids >= len(experts)).any())


def fitting(experts: Any, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> bool:
    """Whether dtypes and shapes are those a dispatch asks for; what is to become of others, the definition decides."""
    return (
        expert_ids.dtype == torch.int64
        and expert_ids.shape == weights.shape
        and tokens.shape == (expert_ids.shape[0], experts.down_proj.shape[1])
    )


# ---- a CPU ----


def _on_cpu(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    slots = sort_by_expert(expert_ids, experts.num_experts)
    x = tokens.to(compute_dtype(tokens))
    rows = _GroupedSwiGLU.apply(x, slots, weights, experts.gate_up_proj, experts.down_proj)
    return combine(rows, slots.order, expert_ids.shape[1]).to(tokens.dtype)


def _suits_cpu(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    return (
        tokens.is_cpu
        and not torch.compiler.is_compiling()  # it loops over the groups' sizes
        and stacked(experts, tokens, expert_ids, weights)
        and tokens.is_floating_point()
    )


@accelerated
def weighted_swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """silu(gate) * up, each row times its weight, zeros for rows without one.

    Args:
        gate_up: (n, 2I), gate first.
        weights: (m,), m <= n, of the first rows; None for 1 each.

    Returns:
        (n, I).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate).mul_(up)
    if weights is not None:
        out[: len(weights)].mul_(weights[:, None])
        out[len(weights) :] = 0
    return out


@accelerated
def weighted_swiglu_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output (n, I) again, and the gradients of gate_up (n, 2I) and of the weights (m,), from the output's."""
    m, width = len(weights), grad.shape[1]
    grad_gate_up = torch.zeros_like(gate_up)
    out, grad = torch.zeros_like(grad), grad[:m]
    gate, up = gate_up[:m].chunk(2, dim=-1)
    # The weights' gradients are dot products in which terms cancel: their factors are not rounded before.
    silu = F.silu(gate.to(torch.promote_types(grad.dtype, weights.dtype)))
    activated = silu * up
    grad_weights = (grad * activated).sum(1).to(weights.dtype)
    torch.mul(activated, weights[:, None], out=out[:m])
    grad = (grad * weights[:, None]).to(grad.dtype)
    torch.mul(grad, silu, out=grad_gate_up[:m, width:])
    torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate_up[:m, :width])
    return out, grad_gate_up, grad_weights


class _GroupedSwiGLU(torch.autograd.Function):
    """SwiGLU of contiguous groups of rows, one expert after the other, in the dtype of the tokens.

    What an expert reads and makes on the way (its rows, weights cast to that dtype, activations and their gradients) is
    made for that expert alone: it stays in the cache, and memory that is used again costs no page faults. Each
    expert's gradient is written straight into its slice; `weight[e]` under plain autograd would allocate a gradient of
    the whole stack for every expert. Saved for backward: tokens and pre-activations; the rest is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: SortedSlots, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        width, dtype = down.shape[2], tokens.dtype
        groups, length = groups_of_rows(slots.ends.tolist(), tokens.device, dtype)
        token_ids = F.pad(slots.token_ids, (0, length - len(slots.order)))
        row_weights = weights.flatten()[slots.order]
        hidden = tokens.new_empty(length, 2 * width)
        out = tokens.new_empty(length, tokens.shape[1])
        for expert, group, own in groups:
            rows = gather_rows(tokens, token_ids[group])
            torch.mm(rows, gate_up[expert].to(dtype).t(), out=hidden[group])
            activated = weighted_swiglu(hidden[group], row_weights[own])
            torch.mm(activated, down[expert].to(dtype).t(), out=out[group])
        ctx.save_for_backward(tokens, token_ids, slots.order, row_weights, gate_up, down, hidden)
        ctx.groups, ctx.k = groups, weights.shape[1]
        return out[: len(slots.order)]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_ids, order, row_weights, gate_up, down, hidden = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_rows = tokens.new_empty(hidden.shape[0], tokens.shape[1])
        grad_row_weights = torch.empty_like(row_weights)
        # Frozen weights get none, and cost none of the time.
        grad_gate_up, grad_down = (
            torch.empty_like(stack) if wanted else None
            for stack, wanted in zip((gate_up, down), ctx.needs_input_grad[3:], strict=True)
        )
        for expert, group, own in ctx.groups:
            grad_group = _take(grad_out, group)
            grad_activated = grad_group @ down[expert].to(tokens.dtype)
            # Zeros for rows of other experts, which add nothing to this one's weights.
            activated, grad_hidden, grad_row_weights[own] = weighted_swiglu_backward(
                hidden[group], row_weights[own], grad_activated
            )
            if grad_down is not None:
                _matmul_into(grad_down[expert], grad_group.t(), activated)
            torch.mm(grad_hidden, gate_up[expert].to(tokens.dtype), out=grad_rows[group])
            if grad_gate_up is not None:
                _matmul_into(grad_gate_up[expert], grad_hidden.t(), gather_rows(tokens, token_ids[group]))
        for expert in set(range(len(down))).difference(group.expert for group in ctx.groups):
            for grad in (grad_gate_up, grad_down):
                if grad is not None:
                    grad[expert].zero_()
        grad_tokens, grad_weights = grads_of_slots(order, ctx.k, grad_rows, grad_row_weights)
        return grad_tokens, None, grad_weights, grad_gate_up, grad_down


def grads_of_slots(order: Tensor, k: int, grad_rows: Tensor, grad_row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens (T, D) and of their weights (T, k) from those of the rows."""
    grad_weights = torch.empty_like(grad_row_weights).scatter_(0, order, grad_row_weights).view(-1, k)
    return sum_slots(grad_rows, inverse(order).view(-1, k)), grad_weights


def _take(rows: Tensor, group: slice) -> Tensor:
    """rows[group], padded with zeros where the slice ends behind the last row."""
    missing = group.stop - rows.shape[0]
    return F.pad(rows[group], (0, 0, 0, missing)) if missing > 0 else rows[group]


def _matmul_into(target: Tensor, left: Tensor, right: Tensor) -> None:
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


# ---- any functions of rows, without gradients: the decode engine's ----


def _one_by_one(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    """Each expert that has rows computes them; one batched matmul sums a token's results."""
    num_tokens, k = expert_ids.shape
    chosen, order = expert_ids.flatten().sort(stable=True)
    counts = torch.bincount(chosen, minlength=len(experts)).tolist()
    parts = zip(experts, tokens.index_select(0, order // k).split(counts), strict=True)
    rows = torch.cat([expert(part) for expert, part in parts if len(part)])
    slots = torch.empty_like(rows).index_copy_(0, order, rows).view(num_tokens, k, -1)
    # (T, 1, k) @ (T, k, D), in float32 as the definitions sum
    return torch.bmm(weights.unsqueeze(1), slots.float()).squeeze(1).to(tokens.dtype)


def _suits_one_by_one(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    return (
        untouched(experts, "PackedExperts")
        and ordinary(tokens, expert_ids, weights)
        and fitting(experts, tokens, expert_ids, weights)
        and tokens.is_cpu
        and weights.dtype == torch.float32
        and not needs_gradient(tokens, weights)
        and expert_ids.numel() > 0
        and not torch.compiler.is_compiling()
    )


def _shape_alone(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    return torch.empty_like(tokens)


def _suits_meta(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    """How many rows an expert has is a value, and so unknown: the definitions cannot run."""
    return tokens.is_meta


for path in ("replicated", "grouped"):
    FORMS[path] += [
        Form("meta", _suits_meta, _shape_alone),
        Form("cpu", _suits_one_by_one, _one_by_one),
        Form("cpu", _suits_cpu, _on_cpu),
        Form("cuda", _suits_device, _on_device),
    ]
