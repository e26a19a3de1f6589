"""Forms of causal self-attention on a CPU: in blocks of queries for training, and document by document.

**In blocks.** torch's attention kernel for CPUs gains nothing from bf16 or from oneDNN and is slow backwards on short
sequences. Here the matmuls are batched, in the dtype of the input and large enough for oneDNN, and a row is cut into
blocks of queries, so that most of the masked half is never computed:

    n = 512, blocks of 128:  queries   0..127 see keys 0..127     10/16 of all scores instead of the causal 8/16
                             queries 128..255 see keys 0..255
                             ...
Where documents share a row, a block sees the keys from the start of its first query's document on, and a mask hides
the rest: however many documents there are, a row has the same few matmuls, and none is larger than without them.
One row at a time, or a few short ones together, everything stays in the cache. Kept for backward: the input, from which
the heads are prepared again, and in small models the probabilities of short rows; others are computed again.

**By documents.** A block-diagonal mask is exact but slow; here each document gets a call of its own.

B batch, S sequence, T = B*S; C rows of n tokens each, H query heads, K key/value heads, R = H/K, d head_dim, m keys
that a block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.ops.autocast import compute_dtype
from minimoe.ops.door import FORMS, Form, first_derivative, needs_gradient, ordinary, untouched
from minimoe.ops.heads import Heads, group, norm_and_rotate, prepare_heads, prepare_heads_backward, rotate, ungroup
from minimoe.ops.onednn import onednn_multiplies

_BLOCK = 128  # queries; small blocks skip more of what is masked, large ones make larger matmuls
_TOGETHER = 1024  # tokens of short rows computed together; more would leave the cache
# Up to which probabilities are kept for backward: their memory grows with the square of a row's length.
_KEPT_LENGTH, _KEPT_BYTES = 512, 1024  # n; of a token's H*d values
_MULTIPLE = 32  # sizes of keys: oneDNN builds a kernel for each, so few different ones are used

aten = torch.ops.aten

# What follows takes the arguments of `causal_attention` in model/attention.py.


def _in_blocks(q, k, v, q_norm, k_norm, cos, sin, scaling, documents, dropout):
    batch, sequence, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    gains = torch.cat(
        ((q_norm.weight * scaling).expand(heads, head_dim), k_norm.weight.expand(kv_heads, head_dim))
    )  # the score's scale is one of the queries' weights
    q, k, v = (x.flatten(2).flatten(0, 1) for x in (q, k, v))  # (T, heads * d)
    cos, sin = (x.expand(batch, sequence, head_dim).flatten(0, 1) for x in (cos, sin))
    lengths = (sequence,) * batch if documents is None else tuple(documents.lengths)
    parts = _parts(lengths, sequence, heads // kv_heads, v.dtype)
    out = _BlockAttention.apply(q, k, v, gains, cos, sin, q_norm.eps, sequence, parts)
    return out.view(batch, sequence, heads, head_dim)


def _blocks_suit(q, k, v, q_norm, k_norm, cos, sin, scaling, documents, dropout):
    """Made for training with oneDNN's matmuls; with MKL's, torch's kernel is as fast."""
    return (
        q.is_cpu
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not dropout
        and q.dtype == k.dtype == v.dtype
        and compute_dtype(q) == q.dtype
        and onednn_multiplies(q.device, q.dtype)
        and untouched(q_norm, "MiniMoeRMSNorm")
        and untouched(k_norm, "MiniMoeRMSNorm")
        and q_norm.weight.dtype == k_norm.weight.dtype == cos.dtype == torch.float32  # in which it norms and rotates
        and q_norm.eps == k_norm.eps
        and ordinary(q, k, v, q_norm.weight, k_norm.weight, cos, sin)
        and not needs_gradient(cos, sin)
    )


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gains, cos, sin, eps, length, parts):
        out = torch.empty_like(q)
        kv_heads = k.shape[1] // gains.shape[1]
        kept: list[Tensor] = []
        keep = length <= _KEPT_LENGTH and out.shape[1] * out.itemsize <= _KEPT_BYTES
        for rows, blocks in parts:
            heads = prepare_heads(q[rows], k[rows], v[rows], gains, cos[rows], sin[rows], eps, length)
            attended = torch.empty_like(heads.q)
            for block in blocks:
                probabilities = _probabilities(heads, block, kv_heads)
                if keep:
                    kept.append(probabilities)
                torch.bmm(probabilities, heads.v[:, block.keys], out=attended[:, block.queries])
            out[rows] = ungroup(attended, kv_heads, length).flatten(1)
        ctx.save_for_backward(q, k, v, gains, cos, sin, *kept)
        ctx.eps, ctx.length, ctx.parts = eps, length, parts
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gains, cos, sin, *kept = ctx.saved_tensors
        kept_probabilities = iter(kept)
        head_dim, length = gains.shape[1], ctx.length
        kv_heads = k.shape[1] // head_dim
        grads, grad_gains = [torch.empty_like(x) for x in (q, k, v)], torch.zeros_like(gains)
        for rows, blocks in ctx.parts:
            inputs = (q[rows], k[rows], v[rows], gains, cos[rows], sin[rows], ctx.eps, length)
            heads = prepare_heads(*inputs)
            grad = group(grad_out[rows].unflatten(1, (-1, head_dim)), kv_heads, length)  # (C*K, n*R, d)
            grad_q = torch.empty_like(heads.q)
            grad_k, grad_v = (heads.k.new_zeros(heads.k.shape, dtype=gains.dtype) for _ in range(2))
            for block in blocks:
                keys, values, grad_block = heads.k[:, block.keys], heads.v[:, block.keys], grad[:, block.queries]
                probabilities = next(kept_probabilities) if kept else _probabilities(heads, block, kv_heads)
                grad_v[:, block.keys] += torch.bmm(probabilities.mT, grad_block)
                grad_scores = aten._softmax_backward_data(
                    torch.bmm(grad_block, values.mT), probabilities, -1, probabilities.dtype
                )
                torch.bmm(grad_scores, keys, out=grad_q[:, block.queries])
                grad_k[:, block.keys] += torch.bmm(grad_scores.mT, heads.q[:, block.queries])
            *parts, part_gains = prepare_heads_backward(*inputs, grad_q, grad_k, grad_v)
            for whole, part in zip(grads, parts, strict=True):
                whole[rows] = part
            grad_gains += part_gains
        return *grads, grad_gains, *[None] * 5


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
def _parts(documents: tuple[int, ...], length: int, queries_per_key: int, dtype: torch.dtype) -> list[_Part]:
    """What each part of the batch sees, for rows of n tokens and R query heads a key head."""
    lengths = torch.tensor(documents)
    starts = lengths.cumsum(0) - lengths
    first_keys = (starts % length).repeat_interleave(lengths).view(-1, length)  # (rows, n)
    parts, start = [], 0
    for first in first_keys.split(max(_TOGETHER // length, 1)):
        parts.append(_Part(slice(start, start + first.numel()), list(_blocks(first, queries_per_key, dtype))))
        start += first.numel()
    return parts


def _blocks(first: Tensor, queries_per_key: int, dtype: torch.dtype) -> Iterator[_Block]:
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
        yield _Block(slice(start * queries_per_key, end * queries_per_key), slice(low, end), mask)


def _probabilities(heads: Heads, block: _Block, kv_heads: int) -> Tensor:
    """(C*K, rows, m): softmax of a block's scores."""
    scores = torch.bmm(heads.q[:, block.queries], heads.k[:, block.keys].mT)
    _, size, masked = block.mask.shape
    split = scores.view(-1, kv_heads, size, scores.shape[1] // size, scores.shape[2])  # (C, K, size, R, m)
    split[..., scores.shape[2] - masked :] += block.mask[:, None, :, None]
    return scores.softmax(dim=-1)


def _by_documents(q, k, v, q_norm, k_norm, cos, sin, scaling, documents, dropout):
    """One causal call per document. In float32 under autocast: a CPU attends no faster in bf16."""
    batch, sequence, heads, head_dim = q.shape
    result = v.dtype
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else result
    q, k, v = (x.to(dtype) for x in (_normed(q, q_norm, cos, sin), _normed(k, k_norm, cos, sin), v))
    lengths = None if documents is None else documents.lengths
    if lengths is not None and len(lengths) > batch:
        # `split`, because its backward is one concatenation; slices would each allocate a full gradient.
        streams = [x.reshape(1, batch * sequence, -1, head_dim).split(lengths, dim=1) for x in (q, k, v)]
    else:
        streams = [(x,) for x in (q, k, v)]
    with torch.autocast("cpu", enabled=False):
        outputs = []
        for document in zip(*streams, strict=True):
            query, key, value = (x.transpose(1, 2) for x in document)  # (1 or B, heads, n, d) each
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=heads > k.shape[2]
            )
            outputs.append(attended.transpose(1, 2))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.reshape(batch, sequence, heads, head_dim).to(result)


def _normed(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotation (..., heads, d), in float32."""
    if torch.is_grad_enabled() and untouched(norm, "MiniMoeRMSNorm") and ordinary(norm.weight):
        return norm_and_rotate(x, norm.weight, norm.eps, cos, sin)
    return rotate(norm(x.float()), cos, sin)


def _documents_suit(q, k, v, q_norm, k_norm, cos, sin, scaling, documents, dropout):
    return (
        q.is_cpu
        and not torch.compiler.is_compiling()
        and ordinary(q, k, v, cos, sin)
        and compute_dtype(v) == v.dtype  # else autocast decides the output's
        and not needs_gradient(cos, sin)  # which the angles of fixed positions never do
    )


FORMS["causal_attention"] += [Form("cpu", _blocks_suit, _in_blocks), Form("cpu", _documents_suit, _by_documents)]
