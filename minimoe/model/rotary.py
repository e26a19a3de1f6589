"""Rotary positions (RoPE, arXiv 2104.09864), and QK-norm (arXiv 2302.05442) together with the rotation.

B batch, S sequence, d head_dim; `...` stands for any dimensions of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from minimoe.model.config import MiniMoeConfig


class MiniMoeRotaryEmbedding(nn.Module):
    """cos and sin tables of the rotary positions; scaling types come from transformers.

    The class name and `original_inv_freq` make `transformers` recompute the buffers after a load, which would
    otherwise come back uninitialised since they are not saved.
    """

    inv_freq: Tensor

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        assert config.rope_parameters is not None  # filled in by the config
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        scaled = self.rope_type != "default"
        init = ROPE_INIT_FUNCTIONS[self.rope_type] if scaled else self.compute_default_rope_parameters
        inv_freq, scaling = init(config)
        self.attention_scaling: float = scaling
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MiniMoeConfig, *_: Any, **__: Any) -> tuple[Tensor, float]:
        """(inverse frequencies (d/2,), scaling 1)."""
        assert config.head_dim is not None
        assert config.rope_parameters is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B, S) -> cos, sin (B, S, d), computed in float32, in the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.float()  # (B, S, d/2)
        halves = (part * self.attention_scaling for part in (angles.cos(), angles.sin()))
        cos, sin = (torch.cat((half, half), dim=-1).to(x.dtype) for half in halves)
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) of x (..., heads, d) by its position's angle; cos, sin (..., d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat((-second, first), dim=-1) * sin[..., None, :]


def norm_and_rotate(x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., heads, d) -> the same, normed and rotated in float32; rounded once after both, to the dtype of x."""
    return rotate(norm(x.float()), cos, sin).to(x.dtype)
