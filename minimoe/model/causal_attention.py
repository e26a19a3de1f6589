"""QK-norm, rotary positions and causal attention in one function, for training on a CPU.

torch's attention kernel for CPUs gains nothing from bf16 or from oneDNN and is slow backwards on sequences this short.
Here the products are batched matrix products in the dtype of the input, large enough for oneDNN, and a row is cut into
blocks of queries, so that most of the masked half is never computed:

    n = 512, blocks of 128:  queries   0..127 see keys 0..127     10/16 of all products instead of the causal 8/16
                             queries 128..255 see keys 0..255
                             ...
Where documents share a row, a block sees the keys from the start of its first query's document on, and a mask hides
the rest: however many documents there are, a row has the same few products, and none is larger than without them.

One row at a time, or a few short ones together, everything stays in the cache. Kept for backward: the input, from which
the heads are prepared again, and in small models the probabilities of short rows; others are computed again.

C rows of n tokens each, H query heads, K key/value heads, R = H/K, d head_dim, m keys that a block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe import kernels
from minimoe.model.norm import unit_rms
from minimoe.model.rotary import norm_and_rotate_backward, rotate

_BLOCK = 128  # queries; small blocks skip more of what is masked, large ones make larger products
_TOGETHER = 1024  # tokens of short rows computed together; more would leave the cache
# Up to which probabilities are kept for backward. What they take grows with the square of a row's length. What they
# save was measured with rows of 512 tokens: at H*d = 256 a twentieth of a step, at 512 in bf16 2 to 4 hundredths and
# in float32, where they take twice as much, at most 2.
_KEPT_LENGTH, _KEPT_BYTES = 512, 1024  # n; of a token's H*d numbers
_MULTIPLE = 32  # numbers of keys: oneDNN builds a kernel for each, so few different ones are used

aten = torch.ops.aten


def causal_attention(
    qkv: Tensor,
    gains: Tensor,
    kv_heads: int,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    sequence: int,
    documents: list[int] | None,
) -> Tensor:
    """Attention of rows of `sequence` tokens, within each row or each of its documents.

    Args:
        qkv: (T, (H + 2K) * d), what the projections gave.
        gains: (H + K, d), the weights of the norms, each head's own; queries' include the score's scale.
        kv_heads: K.
        eps: of the norms.
        cos, sin: (T, d) float32, of each token's position.
        documents: lengths that sum to T, none across rows; None where every row is one document.

    Returns:
        (T, H * d).
    """
    lengths = tuple(documents or [sequence] * (qkv.shape[0] // sequence))
    parts = _parts(lengths, sequence, gains.shape[0] // kv_heads - 1, qkv.dtype)
    return _CausalAttention.apply(qkv, gains, kv_heads, eps, cos, sin, sequence, parts)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        gains: Tensor,
        kv_heads: int,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        length: int,
        parts: list[_Part],
    ) -> Tensor:
        out = qkv.new_empty(qkv.shape[0], (gains.shape[0] - kv_heads) * gains.shape[1])
        kept: list[Tensor] = []
        keep = length <= _KEPT_LENGTH and out.shape[1] * out.itemsize <= _KEPT_BYTES
        for rows, blocks in parts:
            heads_in = prepare_heads(qkv[rows], gains, kv_heads, eps, cos[rows], sin[rows], length)
            attended = torch.empty_like(heads_in.q)
            for block in blocks:
                probabilities = _probabilities(heads_in, block)
                if keep:
                    kept.append(probabilities)
                torch.bmm(probabilities, heads_in.v[:, block.keys], out=attended[:, block.queries])
            out[rows] = _ungroup(attended, kv_heads, length).flatten(1)
        ctx.save_for_backward(qkv, gains, cos, sin, *kept)
        ctx.kv_heads, ctx.eps, ctx.length, ctx.parts = kv_heads, eps, length, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gains, cos, sin, *kept = ctx.saved_tensors
        kept_probabilities = iter(kept)
        kv_heads, head_dim, length = ctx.kv_heads, gains.shape[1], ctx.length
        grad_qkv, grad_gains = torch.empty_like(qkv), torch.zeros_like(gains)
        for rows, blocks in ctx.parts:
            heads_in = prepare_heads(qkv[rows], gains, kv_heads, ctx.eps, cos[rows], sin[rows], length)
            grad = _group(grad_out[rows].unflatten(1, (-1, head_dim)), kv_heads, length)  # (C*K, n*R, d)
            grad_q = torch.empty_like(heads_in.q)
            grad_k, grad_v = (heads_in.k.new_zeros(heads_in.k.shape, dtype=gains.dtype) for _ in range(2))
            for block in blocks:
                k, v, grad_block = heads_in.k[:, block.keys], heads_in.v[:, block.keys], grad[:, block.queries]
                probabilities = next(kept_probabilities) if kept else _probabilities(heads_in, block)
                grad_v[:, block.keys] += torch.bmm(probabilities.mT, grad_block)
                grad_scores = aten._softmax_backward_data(
                    torch.bmm(grad_block, v.mT), probabilities, -1, probabilities.dtype
                )
                torch.bmm(grad_scores, k, out=grad_q[:, block.queries])
                grad_k[:, block.keys] += torch.bmm(grad_scores.mT, heads_in.q[:, block.queries])
            grads = (grad_q, grad_k, grad_v)
            grad_gains += heads_backward(
                qkv[rows], gains, ctx.eps, cos[rows], sin[rows], length, grads, out=grad_qkv[rows]
            )
        return grad_qkv, grad_gains, *[None] * 6


class Heads(NamedTuple):
    """Normed and rotated heads; query rows are ordered by position, then head of their group."""

    q: Tensor  # (C*K, n*R, d)
    k: Tensor  # (C*K, n, d)
    v: Tensor  # (C*K, n, d)
    kv_heads: int


def prepare_heads(
    qkv: Tensor, gains: Tensor, kv_heads: int, eps: float, cos: Tensor, sin: Tensor, length: int
) -> Heads:
    """Norm and rotation in the precision of `gains`, one rounding after both; arguments as of `causal_attention`."""
    if kernels.made_for(qkv, float32=(gains, cos, sin)):
        return Heads(*kernels.heads(qkv, gains, cos, sin, eps, length, kv_heads), kv_heads)
    all_heads, head_dim = gains.shape
    x = qkv.unflatten(1, (-1, head_dim))  # (C*n, H + 2K, d)
    unit, _ = unit_rms(x[:, :all_heads].to(gains.dtype), eps)
    turned = rotate(unit * gains, cos, sin).to(qkv.dtype)
    queries, keys = turned.split((all_heads - kv_heads, kv_heads), dim=1)
    q, k, v = (_group(part, kv_heads, length) for part in (queries, keys, x[:, all_heads:]))
    return Heads(q, k, v, kv_heads)


def heads_backward(
    qkv: Tensor,
    gains: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    length: int,
    grads: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
) -> Tensor:
    """Writes the gradient of qkv into `out`, from those of q, k and v, and returns that of the gains."""
    if kernels.made_for(qkv, grads[0], out, float32=(gains, cos, sin, *grads[1:])):
        return kernels.heads_backward(qkv, gains, cos, sin, eps, length, grads, out)
    all_heads, head_dim = gains.shape
    kv_heads = grads[1].shape[0] * length // qkv.shape[0]
    unit, inverse = unit_rms(qkv.unflatten(1, (-1, head_dim))[:, :all_heads].to(gains.dtype), eps)
    grad_q, grad_k, grad_v = (_ungroup(grad, kv_heads, length) for grad in grads)
    turned = torch.cat((grad_q, grad_k), dim=1)
    grad_x, grad_gains = norm_and_rotate_backward(turned, unit, inverse, gains, cos, sin)
    grad_heads = out.unflatten(1, (-1, head_dim))
    grad_heads[:, :all_heads], grad_heads[:, all_heads:] = grad_x, grad_v
    return grad_gains


def _group(x: Tensor, kv_heads: int, length: int) -> Tensor:
    """(C*n, K*r, d) -> (C*K, n*r, d): the r heads that share a key head, position by position."""
    split = x.view(-1, length, kv_heads, x.shape[1] // kv_heads, x.shape[2])  # (C, n, K, r, d)
    return split.transpose(1, 2).reshape(split.shape[0] * kv_heads, -1, x.shape[2])


def _ungroup(x: Tensor, kv_heads: int, length: int) -> Tensor:
    """(C*K, n*r, d) -> (C*n, K*r, d)."""
    split = x.view(-1, kv_heads, length, x.shape[1] // length, x.shape[2])  # (C, K, n, r, d)
    return split.transpose(1, 2).reshape(split.shape[0] * length, -1, x.shape[2])


class _Block(NamedTuple):
    """A block of queries and what it sees."""

    queries: slice  # of n*R
    keys: slice  # of n
    mask: Tensor  # (1, size, size) or (C, size, m): what to add to the scores of the last keys


class _Part(NamedTuple):
    """Rows that are computed together."""

    tokens: slice  # of T
    blocks: list[_Block]


@lru_cache(maxsize=1)  # all layers of a forward pass, and their backward, see the same documents
def _parts(documents: tuple[int, ...], length: int, group: int, dtype: torch.dtype) -> list[_Part]:
    """What each part of the batch sees, for rows of n tokens and R query heads a key head."""
    lengths = torch.tensor(documents)
    starts = lengths.cumsum(0) - lengths
    first_keys = (starts % length).repeat_interleave(lengths).view(-1, length)  # (rows, n)
    parts, start = [], 0
    for first in first_keys.split(max(_TOGETHER // length, 1)):
        parts.append(_Part(slice(start, start + first.numel()), list(_blocks(first, group, dtype))))
        start += first.numel()
    return parts


def _blocks(first: Tensor, group: int, dtype: torch.dtype) -> Iterator[_Block]:
    """The blocks of C rows whose tokens see the keys from `first` (C, n) on, up to their own."""
    length = first.shape[1]
    positions = torch.arange(length)
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        low = int(first[:, start].min()) // _MULTIPLE * _MULTIPLE
        queries = positions[start:end, None]
        if int(first[:, end - 1].max()) <= low:  # one document: the causal mask cuts the block's own keys only
            hidden = (positions[start:end] > queries)[None]
        else:
            hidden = (positions[low:end] > queries) | (positions[low:end] < first[:, start:end, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        yield _Block(slice(start * group, end * group), slice(low, end), mask)


def _probabilities(heads: Heads, block: _Block) -> Tensor:
    """(C*K, rows, m): softmax of a block's scores."""
    scores = torch.bmm(heads.q[:, block.queries], heads.k[:, block.keys].mT)
    _, size, masked = block.mask.shape
    split = scores.view(-1, heads.kv_heads, size, scores.shape[1] // size, scores.shape[2])  # (C, K, size, R, m)
    split[..., scores.shape[2] - masked :] += block.mask[:, None, :, None]
    return scores.softmax(dim=-1)
