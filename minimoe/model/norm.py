"""RMS normalisation (arXiv 1910.07467), computed in float32.

On a CPU torch builds `F.rms_norm` and its backward from a dozen passes over memory, and keeps most of their results
for backward; the function here makes fewer passes and keeps only its input.

N rows, D size of the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minimoe import kernels


class MiniMoeRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x of any shape (..., D); in `dtype`, or by default in that of x times the weight."""
        if x.device.type == "cpu" and torch.is_grad_enabled() and x.dtype == torch.float32:
            return _RMSNorm.apply(x, self.weight, self.eps, dtype or x.dtype)
        normed = self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        return normed if dtype is None else normed.to(dtype)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a kernel may compute it in its place: no adapter stands in for it, and no hook watches it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is kind and "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def unit_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its rms along the last dimension, and one over that rms: (..., D) -> (..., D), (..., 1)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x, dtype=dtype)
        if kernels.made_for(out, float32=(x, weight)):
            return kernels.rms_norm(x, weight, eps, out)
        return unit_rms(x, eps)[0].mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if kernels.made_for(grad, float32=(x, weight)):
            return *kernels.rms_norm_backward(x, weight, grad, ctx.eps), None, None
        # dx = inverse * (g - x_hat * mean(g * x_hat)), where x_hat = x * inverse and g = grad * weight
        x_hat, inverse = unit_rms(x, ctx.eps)
        product = grad * x_hat
        mean = (product @ weight).div_(weight.shape[0])[..., None]
        grad_x = (grad * weight).addcmul_(x_hat, mean, value=-1).mul_(inverse)
        return grad_x, product.flatten(0, -2).sum(0), None, None
