"""QK-norm and rotation of attention's heads for training on a CPU: one function that keeps nothing but its input.

B batch, S sequence, H query heads, K key/value heads, R = H/K, d head_dim; C rows of n tokens each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimoe.ops.door import accelerated, first_derivative
from minimoe.ops.norm import unit_rms


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) of x (..., heads, d) by its position's angle; cos, sin (..., d)."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.eps = eps
        return rotate(unit_rms(_precise(x, gain), eps)[0].mul_(gain), cos, sin)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin = ctx.saved_tensors
        grad_x, grad_gain = _backward(grad, *unit_rms(_precise(x, gain), ctx.eps), gain, cos, sin)
        return grad_x.to(x.dtype), grad_gain, None, None, None


norm_and_rotate = _NormAndRotate.apply  # (x (..., heads, d), gain (d,), eps, cos, sin) -> as x, float32 at least


def _precise(x: Tensor, gain: Tensor) -> Tensor:
    """x in the gain's dtype, or in float32 if that is half as wide: a half's squares overflow."""
    return x.to(torch.promote_types(gain.dtype, torch.float32))


def _backward(
    grad: Tensor, unit: Tensor, inverse: Tensor, gains: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and of the gains (d,) or (heads, d): turn back, then RMS norm's backward."""
    grad = rotate(grad, cos, -sin)
    product = grad * unit
    mean = (product * gains).mean(-1, keepdim=True)
    grad_x = (grad * gains).addcmul_(unit, mean, value=-1).mul_(inverse)
    return grad_x, product.sum_to_size(gains.shape)


class Heads(NamedTuple):
    """Normed and rotated heads; query rows are ordered by position, then head of their group."""

    q: Tensor  # (C*K, n*R, d)
    k: Tensor  # (C*K, n, d)
    v: Tensor  # (C*K, n, d)


@accelerated
def prepare_heads(
    q: Tensor, k: Tensor, v: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, length: int
) -> Heads:
    """Norm and rotation in the dtype of `gains`, one rounding after both.

    Args:
        q, k, v: (C*n, H*d), (C*n, K*d) twice: what the projections gave.
        gains: (H + K, d), the norm's weight of each head.
        cos, sin: (C*n, d), of each token's position.
        eps: of the norms.
        length: n.
    """
    head_dim = gains.shape[1]
    q, k, v = (x.unflatten(1, (-1, head_dim)) for x in (q, k, v))  # (C*n, heads, d)
    kv_heads = k.shape[1]
    unit, _ = unit_rms(torch.cat((q, k), dim=1).to(gains.dtype), eps)
    turned = rotate(unit * gains, cos, sin).to(q.dtype)
    queries, keys = turned.split((q.shape[1], kv_heads), dim=1)
    return Heads(*(group(part, kv_heads, length) for part in (queries, keys, v)))


def rotate_heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, length: int) -> Heads:
    """`prepare_heads` of a model without QK-norm."""
    q, k, v = (x.unflatten(1, (-1, cos.shape[1])) for x in (q, k, v))  # (C*n, heads, d)
    kv_heads = k.shape[1]
    q, k = (rotate(x.to(cos.dtype), cos, sin).to(x.dtype) for x in (q, k))
    return Heads(*(group(part, kv_heads, length) for part in (q, k, v)))


@accelerated
def prepare_heads_backward(q, k, v, gains, cos, sin, eps, length, grad_q, grad_k, grad_v):
    """Gradients of q, k, v and the gains from those of the heads; grad_k and grad_v are in the dtype of the gains."""
    head_dim = gains.shape[1]
    heads = torch.cat((q, k), dim=1).unflatten(1, (-1, head_dim)).to(gains.dtype)
    kv_heads = k.shape[1] // head_dim
    unit, inverse = unit_rms(heads, eps)
    grads = [ungroup(grad, kv_heads, length) for grad in (grad_q, grad_k, grad_v)]
    grad_x, grad_gains = _backward(torch.cat(grads[:2], dim=1), unit, inverse, gains, cos, sin)
    parts = (*grad_x.split((heads.shape[1] - kv_heads, kv_heads), dim=1), grads[2])
    return *(part.flatten(1).to(q.dtype) for part in parts), grad_gains


def group(x: Tensor, kv_heads: int, length: int) -> Tensor:
    """(C*n, K*r, d) -> (C*K, n*r, d): the r heads that share a key head, position by position."""
    split = x.reshape(-1, length, kv_heads, x.shape[1] // kv_heads, x.shape[2])  # (C, n, K, r, d)
    return split.transpose(1, 2).reshape(split.shape[0] * kv_heads, -1, x.shape[2])


def ungroup(x: Tensor, kv_heads: int, length: int) -> Tensor:
    """(C*K, n*r, d) -> (C*n, K*r, d)."""
    split = x.view(-1, kv_heads, length, x.shape[1] // length, x.shape[2])  # (C, K, n, r, d)
    return split.transpose(1, 2).reshape(split.shape[0] * length, -1, x.shape[2])
