"""RMS normalisation (arXiv 1910.07467), computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.ops import accelerated


class MiniMoeRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x (..., D) -> the same shape in `dtype`, or by default in that of x times the weight."""
        return rms_norm(x, self.weight, self.eps, dtype or torch.promote_types(x.dtype, self.weight.dtype))


@accelerated
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in `dtype`."""
    return (weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)).to(dtype)
