"""QK-norm, rotary positions and causal attention in one function, for training on a CPU.

torch's attention kernel for CPUs gains nothing from bf16 and is slow backwards on sequences this short. Here the
products are batched matrix products in the dtype of the input, which are fast in either, and a document is cut into
blocks of queries, so that most of the masked half is never computed:

    n = 512, blocks of 128:  queries   0..127 see keys 0..127     10/16 of all products instead of the causal 8/16
                             queries 128..255 see keys 0..255
                             ...
One document at a time, everything stays in the cache. Kept for backward: only the input, from which the rest is
computed again, which is a quarter of the work and saves a matrix of n*n probabilities per head.

n tokens of a document, H query heads, K key/value heads, R = H/K, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.model.norm import inverse_rms

_BLOCK = 128  # queries; small blocks skip more of what is masked, large ones make larger products

aten = torch.ops.aten


def causal_attention(
    qkv: Tensor, gains: Tensor, kv_heads: int, eps: float, cos: Tensor, sin: Tensor, documents: list[int]
) -> Tensor:
    """Attention of a stream of documents, each of which sees itself only.

    Args:
        qkv: (T, (H + 2K) * d), what the projections gave.
        gains: (H + K, d), the weights of the norms, each head's own; queries' include the score's scale.
        kv_heads: K.
        eps: of the norms.
        cos, sin: (T, d) float32, of each token's position.
        documents: lengths that sum to T.

    Returns:
        (T, H * d).
    """
    return _CausalAttention.apply(qkv, gains, kv_heads, eps, cos, sin, documents)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gains: Tensor, kv_heads: int, eps: float, cos: Tensor, sin: Tensor, documents: list[int]
    ) -> Tensor:
        heads = gains.shape[0] - kv_heads
        out, later = qkv.new_empty(qkv.shape[0], heads * gains.shape[1]), _later(qkv)
        for rows in _slices(documents):
            heads_in = _prepare(qkv[rows], gains, kv_heads, eps, cos[rows], sin[rows])
            attended = torch.empty_like(heads_in.q)
            for queries, seen in _blocks(heads_in):
                torch.bmm(
                    _probabilities(heads_in, queries, seen, later), heads_in.v[:, :seen], out=attended[:, queries]
                )
            out[rows] = _ungroup(attended, heads_in.k.shape[1]).flatten(1)
        ctx.save_for_backward(qkv, gains, cos, sin)
        ctx.kv_heads, ctx.eps, ctx.documents = kv_heads, eps, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gains, cos, sin = ctx.saved_tensors
        kv_heads, (all_heads, head_dim) = ctx.kv_heads, gains.shape
        grad_qkv, grad_gains, later = torch.empty_like(qkv), torch.zeros_like(gains), _later(qkv)
        for rows in _slices(ctx.documents):
            heads_in = _prepare(qkv[rows], gains, kv_heads, ctx.eps, cos[rows], sin[rows])
            length = heads_in.k.shape[1]
            grad = _group(grad_out[rows].view(length, -1, head_dim), kv_heads)  # (K, n*R, d)
            grad_q = torch.empty_like(heads_in.q)
            grad_k, grad_v = (heads_in.k.new_zeros(heads_in.k.shape, dtype=gains.dtype) for _ in range(2))
            for queries, seen in _blocks(heads_in):
                k, v = heads_in.k[:, :seen], heads_in.v[:, :seen]
                probabilities = _probabilities(heads_in, queries, seen, later)
                grad_v[:, :seen] += torch.bmm(probabilities.mT, grad[:, queries])
                grad_scores = aten._softmax_backward_data(
                    torch.bmm(grad[:, queries], v.mT), probabilities, -1, probabilities.dtype
                )
                torch.bmm(grad_scores, k, out=grad_q[:, queries])
                grad_k[:, :seen] += torch.bmm(grad_scores.mT, heads_in.q[:, queries])
            turned = torch.cat((_ungroup(grad_q, length).to(gains.dtype), grad_k.transpose(0, 1)), dim=1)
            grad_heads = grad_qkv[rows].view(length, all_heads + kv_heads, head_dim)
            grad_x, grad_gain = _norm_rotate_backward(turned, heads_in, gains, cos[rows], sin[rows])
            grad_heads[:, :all_heads] = grad_x
            grad_heads[:, all_heads:] = grad_v.transpose(0, 1)
            grad_gains += grad_gain
        return grad_qkv, grad_gains, None, None, None, None, None


class _Heads(NamedTuple):
    """A document's normed and rotated heads; query rows are ordered by position, then head of their group."""

    q: Tensor  # (K, n*R, d)
    k: Tensor  # (K, n, d)
    v: Tensor  # (K, n, d)
    unit: Tensor  # (n, H + K, d): queries and keys over their rms, in the dtype of the gains
    inverse: Tensor  # (n, H + K, 1): one over that rms


def _prepare(qkv: Tensor, gains: Tensor, kv_heads: int, eps: float, cos: Tensor, sin: Tensor) -> _Heads:
    """Norm and rotation in the precision of `gains`, one rounding after both."""
    all_heads, head_dim = gains.shape
    x = qkv.view(qkv.shape[0], all_heads + kv_heads, head_dim)
    normed = x[:, :all_heads].to(gains.dtype)
    inverse = inverse_rms(normed, eps)
    unit = normed * inverse
    turned = rotate(unit * gains, cos, sin).to(qkv.dtype)
    q = _group(turned[:, : all_heads - kv_heads], kv_heads)
    k, v = (part.transpose(0, 1).contiguous() for part in (turned[:, all_heads - kv_heads :], x[:, all_heads:]))
    return _Heads(q, k, v, unit, inverse)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) of x (n, heads, d) by its position's angle; cos, sin (n, d)."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def _norm_rotate_backward(
    grad: Tensor, heads: _Heads, gains: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the raw heads and of the gains: turn back, then RMSNorm's backward with a gain per head."""
    grad = rotate(grad, cos, -sin)
    product = grad * heads.unit
    mean = (product * gains).mean(-1, keepdim=True)
    grad_x = (grad * gains).addcmul_(heads.unit, mean, value=-1).mul_(heads.inverse)
    return grad_x, product.sum(0)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(n, H, d) -> (K, n*R, d): the R query heads that share a key head, position by position."""
    length, heads, head_dim = x.shape
    grouped = x.view(length, kv_heads, heads // kv_heads, head_dim).transpose(0, 1)
    return grouped.reshape(kv_heads, length * (heads // kv_heads), head_dim)


def _ungroup(x: Tensor, length: int) -> Tensor:
    """(K, n*R, d) -> (n, H, d)."""
    kv_heads, rows, head_dim = x.shape
    return x.view(kv_heads, length, rows // length, head_dim).transpose(0, 1).flatten(1, 2)


def _blocks(heads: _Heads) -> Iterator[tuple[slice, int]]:
    """(query rows, number of keys they may see) of each block."""
    length = heads.k.shape[1]
    group = heads.q.shape[1] // length
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        yield slice(start * group, end * group), end


def _probabilities(heads: _Heads, queries: slice, seen: int, later: Tensor) -> Tensor:
    """(K, rows, seen): softmax of a block's scores."""
    kv_heads, length, _ = heads.k.shape
    group = heads.q.shape[1] // length
    scores = torch.bmm(heads.q[:, queries], heads.k[:, :seen].mT)
    size = scores.shape[1] // group  # the last `size` keys are the block's own: there the causal mask cuts
    scores.view(kv_heads, size, group, seen)[..., seen - size :] += later[:size, None, :size]
    return scores.softmax(dim=-1)


def _later(like: Tensor) -> Tensor:
    """(block, block): -inf where the key comes after the query, else 0."""
    return torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)


def _slices(lengths: list[int]) -> Iterator[slice]:
    """[3, 2] -> 0:3, 3:5."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length
