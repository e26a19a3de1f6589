"""Dense SwiGLU feed-forward (arXiv 2002.05202): the dense layers, and the shared experts of MoE layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model.config import MiniMoeConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), x of any shape (..., D)."""

    def __init__(self, config: MiniMoeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
