"""RMS norm on a CPU: torch builds `F.rms_norm` and its backward from a dozen passes over memory and keeps most of what
they make; this form makes fewer passes and keeps only its input.

N rows, D size of the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimoe.ops.door import FORMS, Form, accelerated, first_derivative, needs_gradient, ordinary


def unit_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its rms along the last dimension, and one over that rms: (..., D) -> (..., D), (..., 1)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


@accelerated
def norm_rows(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight, x (..., D) and weight (D,) float32, rounded once to `dtype`."""
    return unit_rms(x, eps)[0].mul_(weight).to(dtype)


@accelerated
def norm_rows_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of the weight (D,) from that of the output."""
    # dx = inverse * (g - unit * mean(g * unit)), where unit = x * inverse and g = grad * weight
    unit, inverse = unit_rms(x, eps)
    product = grad * unit
    mean = (product @ weight).div_(weight.shape[0])[..., None]
    grad_x = (grad * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
    return grad_x, product.flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_rows(x, weight, eps, dtype)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return *norm_rows_backward(x, weight, grad, ctx.eps), None, None


def _fewer_passes(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if needs_gradient(x, weight):
        return _RMSNorm.apply(x, weight, eps, dtype)
    return norm_rows(x.float(), weight, eps, dtype)


def _suits(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> bool:
    as_written = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not needs_gradient(x, weight))
    fits = weight.dtype == torch.float32 and weight.shape == x.shape[-1:]
    return x.is_cpu and as_written and fits and ordinary(x, weight)


FORMS["rms_norm"] += [Form("cpu", _suits, _fewer_passes)]
