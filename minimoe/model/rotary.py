"""Rotary positions (RoPE, arXiv 2104.09864), and QK-norm (arXiv 2302.05442) together with the rotation.

B batch, S sequence, d head_dim; `...` stands for any dimensions of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from minimoe.model.config import MiniMoeConfig
from minimoe.model.norm import MiniMoeRMSNorm, is_plain, unit_rms


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
        """position_ids (B, S) -> cos, sin (B, S, d) in float32; x only tells the device."""
        angles = position_ids[..., None].float() * self.inv_freq.float()  # (B, S, d/2)
        halves = (part * self.attention_scaling for part in (angles.cos(), angles.sin()))
        cos, sin = (torch.cat((half, half), dim=-1).to(x.dtype) for half in halves)
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) of x (..., heads, d) by its position's angle; cos, sin (..., d)."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def norm_and_rotate(x: Tensor, norm: MiniMoeRMSNorm, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate(norm(x.float()), cos, sin)`: (..., heads, d) -> the same in float32, to be rounded once after both.

    For training on a CPU it is one function, which keeps nothing but its input. A norm with hooks and a module that
    stands in for one, such as an adapter, are called as they are.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and is_plain(norm, MiniMoeRMSNorm):
        return _NormAndRotate.apply(x, norm.weight, norm.eps, cos, sin)
    return rotate(norm(x.float()), cos, sin)


def norm_and_rotate_backward(
    grad: Tensor, unit: Tensor, inverse: Tensor, gains: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and of the gains (d,) or (heads, d): turn back, then RMSNorm's backward.

    Args:
        unit, inverse: what `unit_rms` gave.
    """
    grad = rotate(grad, cos, -sin)
    product = grad * unit
    mean = (product * gains).mean(-1, keepdim=True)
    grad_x = (grad * gains).addcmul_(unit, mean, value=-1).mul_(inverse)
    return grad_x, product.sum_to_size(gains.shape)


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.eps = eps
        return rotate(unit_rms(x.to(gain.dtype), eps)[0].mul_(gain), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin = ctx.saved_tensors
        grad_x, grad_gain = norm_and_rotate_backward(grad, *unit_rms(x.to(gain.dtype), ctx.eps), gain, cos, sin)
        return grad_x.to(x.dtype), grad_gain, None, None, None
