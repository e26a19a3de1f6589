"""The compiled functions as forms: which arguments each can take, and when it is the faster one.

T tokens, k experts per token, E experts, D hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.ops import c
from minimoe.ops.autocast import compute_dtype
from minimoe.ops.c.library import there
from minimoe.ops.door import FORMS, Form, first_derivative, needs_gradient, ordinary, untouched
from minimoe.ops.heads import Heads
from minimoe.ops.moe import combine, fitting, grads_of_slots, sort_by_expert, stacked

_FLOATS = (torch.float32, torch.bfloat16)
_FEW_ROWS = 6  # a matrix, on average, up to which reading it once is the faster way
_NEWTON_SCHULZ_LARGEST = 2**21  # entries of a matrix; larger ones leave a core's cache


def _add(definition: str, suits: Callable[..., bool], run: Callable[..., Any]) -> None:
    """A compiled form goes before the others; whether there is a compiler is asked last, as it may compile."""
    FORMS[definition].insert(0, Form("c", lambda *args: suits(*args) and there(), run))


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _takes(*tensors: Tensor, float32: tuple[Tensor, ...] = ()) -> bool:
    """Contiguous on the CPU, of float32 or bfloat16 alike, and others of float32."""
    dtype = tensors[0].dtype
    if dtype not in _FLOATS or not ordinary(*tensors, *float32):
        return False
    for x in tensors:  # loops, as this is asked hundreds of times a step
        if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
            return False
    for x in float32:
        if x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous():
            return False
    return True


def _takes_rows(*tensors: Tensor) -> bool:
    """The same of matrices whose rows may be apart, as in a slice of columns."""
    dtype = tensors[0].dtype
    if dtype not in _FLOATS or not ordinary(*tensors):
        return False
    for x in tensors:
        if x.dtype != dtype or not x.is_cpu or x.stride(-1) != 1:
            return False
    return True


# ---- passes over rows ----

_add("norm_rows", lambda x, weight, eps, dtype: dtype in _FLOATS and _takes(x, float32=(x, weight)), c.rms_norm)
_add(
    "norm_rows_backward",
    lambda x, weight, grad, eps: _takes(grad, float32=(x, weight)),
    c.rms_norm_backward,
)
_add("gather_rows", lambda rows, ids: _takes(rows), c.gather_rows)
_add("sum_slots", lambda rows, places: _takes(rows), c.sum_slots)
_add(
    "weighted_swiglu",
    lambda gate_up, weights: _takes(gate_up, float32=() if weights is None else (weights,)),
    c.swiglu,
)
_add(
    "weighted_swiglu_backward",
    lambda gate_up, weights, grad: _takes(gate_up, grad, float32=(weights,)),
    c.swiglu_backward,
)
_add(
    "prepare_heads",
    lambda q, k, v, gains, cos, sin, *_: _takes_rows(q, k, v) and _takes(gains, float32=(gains, cos, sin)),
    lambda *args: Heads(*c.heads(*args)),
)
_add(
    "prepare_heads_backward",
    lambda q, k, v, gains, cos, sin, eps, length, grad_q, grad_k, grad_v: (
        _takes(grad_q, float32=(gains, cos, sin, grad_k, grad_v)) and _takes_rows(q, k, v, grad_q)
    ),
    c.heads_backward,
)


# ---- the experts ----


class _SwiGLUExperts(torch.autograd.Function):
    """All experts on rows sorted by expert, in one call whose matmuls read the tokens themselves."""

    @staticmethod
    def forward(ctx, tokens, order, token_ids, ends, weights, gate_up, down):
        row_weights = weights.flatten()[order]
        hidden, out = c.grouped_swiglu(tokens, token_ids, row_weights, gate_up, down, ends)
        ctx.save_for_backward(tokens, token_ids, row_weights, gate_up, down, ends, hidden, order)
        ctx.k = weights.shape[1]
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_ids, row_weights, gate_up, down, ends, hidden, order = ctx.saved_tensors
        grad_rows, grad_row_weights, *grads = c.grouped_swiglu_backward(
            tokens, token_ids, row_weights, gate_up, down, ends, hidden, grad_out.contiguous()
        )
        grad_tokens, grad_weights = grads_of_slots(order, ctx.k, grad_rows, grad_row_weights)
        return grad_tokens, None, None, None, grad_weights, *grads


def _many_rows(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    slots = sort_by_expert(expert_ids, experts.num_experts)
    x = tokens.to(compute_dtype(tokens)).contiguous()
    rows = _SwiGLUExperts.apply(x, *slots, weights, experts.gate_up_proj, experts.down_proj)
    return combine(rows, slots.order, expert_ids.shape[1]).to(tokens.dtype)


def _many_rows_suit(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    """It is faster than a library's matmuls if its tiles stay in registers, if bf16 is multiplied in vectors (tiles of
    AMX are faster), and if every thread has a panel of columns. It always makes the gradients of the weights, which
    are not wanted of frozen ones."""
    if not (tokens.is_cpu and stacked(experts, tokens, expert_ids, weights) and weights.dtype == torch.float32):
        return False
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if needs_gradient(tokens, weights) and not (gate_up.requires_grad and down.requires_grad):
        return False
    return (
        _takes(down, float32=(down, gate_up))
        and down.shape[1] % c.PANEL == down.shape[2] % c.PANEL == 0
        and down.shape[2] >= c.PANEL * _threads()
        and _multiplies(compute_dtype(tokens))
    )


@torch.compiler.assume_constant_result
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies it in vectors of 512 bits, and in nothing faster."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 and torch.cpu._is_avx512_supported()


def _few_rows(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    """Decoding: each chosen matrix is read once."""
    matrices = (experts.gate_up_proj, _scales(experts, "gate_up"), experts.down_proj, _scales(experts, "down"))
    return c.experts_few(*matrices, tokens, expert_ids, weights.contiguous()).to(tokens.dtype)


def _scales(experts: Any, name: str) -> Tensor | None:
    """Of experts that are rounded to int8."""
    return getattr(experts, f"{name}_scales", None)


def _few_rows_suit(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Any) -> bool:
    if not (tokens.is_cpu and expert_ids.numel() <= _FEW_ROWS * len(experts)):
        return False
    engines = untouched(experts, "PackedExperts")  # it has made its matrices for this
    return (
        (engines or _few_matrices_suit(experts, tokens.dtype))
        and ordinary(tokens, expert_ids, weights)
        and fitting(experts, tokens, expert_ids, weights)
        and not needs_gradient(tokens, weights)
        and tokens.dtype in _FLOATS
        and not torch.is_autocast_enabled("cpu")
        and expert_ids.is_contiguous()
        and weights.dtype == torch.float32
    )


def _few_matrices_suit(experts: Any, dtype: torch.dtype) -> bool:
    return (
        untouched(experts, "Experts")
        and _takes(experts.gate_up_proj, experts.down_proj)
        and experts.down_proj.dtype == dtype
        and not needs_gradient(experts.gate_up_proj, experts.down_proj)
    )


for path in ("replicated", "grouped"):
    _add(path, _many_rows_suit, _many_rows)
    _add(path, _few_rows_suit, _few_rows)


# ---- decoding: definitions in generation/packed.py ----


def _linear_few(x: Tensor, matrix: Any, norm: Any, add: Tensor | None) -> Tensor:
    values, scales = matrix.stored
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    if x.dtype == torch.float32:  # and so is `add`
        return c.linear_few(values, scales, x, weight, eps, add)
    return c.linear_few(values, scales, x, weight, eps, None if add is None else add.float()).to(x.dtype)


def _linear_few_suits(x: Tensor, matrix: Any, norm: Any, add: Tensor | None) -> bool:
    return x.shape[0] <= _FEW_ROWS and x.is_cpu


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    batch = q.shape[0]
    row_bias = None if bias is None else bias.reshape(batch, -1).float().contiguous()
    return c.attend(q[:, :, 0], keys, values, row_bias, scaling).view(batch, -1)


def _attend_suits(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> bool:
    """One query a head over the beginning of contiguous buffers, as `PreallocatedCache` has them."""
    strides = (keys.shape[1] * keys.stride(1), keys.stride(1), keys.shape[3], 1)
    return (
        q.shape[2] == 1
        and ordinary(q, keys, values)
        and q.is_cpu
        and q.is_contiguous()
        and q.dtype == keys.dtype == values.dtype
        and q.dtype in _FLOATS
        and keys.stride() == values.stride() == strides
        and (bias is None or (ordinary(bias) and bias.shape == (q.shape[0], 1, 1, keys.shape[2])))
        and not needs_gradient(q, keys, values, *(() if bias is None else (bias,)))
    )


_add("linear", _linear_few_suits, _linear_few)
_add("cached_attention", _attend_suits, _attend)


# ---- the optimizer ----


def _newton_schulz_suits(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> bool:
    """It makes half of a symmetric matrix, but a thread computes one, and it has no AMX."""
    fitting = len(x) >= _threads() and x[0].numel() <= _NEWTON_SCHULZ_LARGEST
    return x.dtype == torch.bfloat16 and fitting and _takes(x) and not torch.cpu._is_amx_tile_supported()


def _newton_schulz(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    first, second, third = coefficients
    return c.newton_schulz(x, first, second, third, steps)


_add("orthogonalise", _newton_schulz_suits, _newton_schulz)
