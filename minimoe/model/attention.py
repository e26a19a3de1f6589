"""Causal self-attention: rotary positions, per-head QK-norm, grouped queries, and packed documents.

B batch, S sequence, H query heads, K key/value heads, d head_dim, D hidden.

Packed documents: several documents share a row and must not see each other. A block-diagonal mask is exact but
slow on a CPU, where every document getting a scaled-dot-product call of its own is 3 to 4 times as fast; so the
batch is laid out as one stream of B*S tokens and cut at the document starts (`DocumentLengths`). Training on a CPU has
a function of its own where oneDNN multiplies (`causal_attention.py`).

Sources: GQA arXiv 2305.13245; of positions and QK-norm see `rotary.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minimoe.model.causal_attention import causal_attention
from minimoe.model.config import MiniMoeConfig
from minimoe.model.norm import MiniMoeRMSNorm, is_plain
from minimoe.model.precision import compute_dtype, onednn_multiplies
from minimoe.model.rotary import norm_and_rotate

DocumentLengths = list[int]  # lengths of consecutive documents of a stream of B*S tokens; they sum to B*S


class MiniMoeAttention(nn.Module):
    """Grouped-query attention with QK-norm."""

    is_causal = True  # read by transformers' attention functions

    def __init__(self, config: MiniMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        assert config.head_dim is not None  # filled in by the config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = MiniMoeRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = MiniMoeRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        documents: DocumentLengths | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D) -> output (B, S, D) and, with eager attention, the probabilities (B, H, S, S).

        Args:
            position_embeddings: cos and sin, (B, S, d) each.
            attention_mask: 4-D mask of transformers, or None for plain causal.
            documents: lengths of packed documents; replaces the mask and needs an empty cache.
            cache: keys and values of earlier positions; updated in place.
        """
        batch, sequence, _ = x.shape
        if self._blocks_pay(x, attention_mask, cache):
            return self.o_proj(self._attend_in_blocks(x, position_embeddings, documents)), None
        heads = (batch, sequence, -1, self.head_dim)
        q = norm_and_rotate(self.q_proj(x).view(heads), self.q_norm, *position_embeddings)
        k = norm_and_rotate(self.k_proj(x).view(heads), self.k_norm, *position_embeddings)
        v = self.v_proj(x).view(heads)  # (B, S, K, d)
        # A CPU attends no faster in bf16, and its backward is slower: under autocast attention stays in float32.
        dtype = torch.float32 if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") else v.dtype
        q, k, v = (y.to(dtype).transpose(1, 2) for y in (q, k, v))  # (B, heads, S, d)
        keys, values = (k, v) if cache is None else cache.update(k, v, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):
            if documents is not None:
                out, probabilities = self._attend_within_documents(q, k, v, documents, dropout), None
            else:
                attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                    self.config._attn_implementation, eager_attention
                )
                out, probabilities = attend(
                    self, q, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
                )  # (B, S, H, d)
        return self.o_proj(out.reshape(batch, sequence, -1)), probabilities

    def _blocks_pay(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> bool:
        """Whether `causal_attention` can and should be used: it is made for training with oneDNN's products.

        Measured on 2 cores, forward and backward of the whole block beside torch's kernel, which computes in float32:
        in bf16 1.05 to 1.4 times its speed, in float32 level to 1.1 times. (torch's kernel must not get oneDNN's
        products: every length of a document would be a new size.)
        """
        return (
            x.device.type == "cpu"
            and torch.is_grad_enabled()
            and attention_mask is None
            and cache is None
            and onednn_multiplies(x.device, compute_dtype(x.device, x.dtype))
            and self.q_norm.weight.dtype == torch.float32  # in which it norms and rotates
            and is_plain(self.q_norm, MiniMoeRMSNorm)
            and is_plain(self.k_norm, MiniMoeRMSNorm)
            and self.config._attn_implementation == "sdpa"
            and not (self.training and self.attention_dropout)
        )

    def _attend_in_blocks(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], documents: DocumentLengths | None
    ) -> Tensor:
        """(B, S, D) -> (B, S, H * d), by the function written for this case."""
        batch, sequence, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if all(is_plain(projection, nn.Linear) and projection.bias is None for projection in projections):
            qkv = F.linear(x, torch.cat([projection.weight for projection in projections]))
        else:
            qkv = torch.cat([projection(x) for projection in projections], dim=-1)
        qkv = qkv.flatten(0, 1)  # (T, (H + 2K) * d)
        heads = self.config.num_attention_heads
        gains = torch.cat(
            (
                (self.q_norm.weight * self.scaling).expand(heads, self.head_dim),
                self.k_norm.weight.expand(heads // self.num_key_value_groups, self.head_dim),
            )
        )
        cos, sin = (y.expand(batch, sequence, self.head_dim).flatten(0, 1) for y in position_embeddings)
        kv_heads = heads // self.num_key_value_groups
        out = causal_attention(qkv, gains, kv_heads, self.q_norm.eps, cos, sin, sequence, documents)
        return out.view(batch, sequence, heads * self.head_dim)

    def _attend_within_documents(
        self, q: Tensor, k: Tensor, v: Tensor, documents: DocumentLengths, dropout: float
    ) -> Tensor:
        """(B, heads, S, d) each -> (B, S, H, d): one causal attention call per document of the stream."""
        batch, heads, sequence, head_dim = q.shape
        # `split`, because its backward is one concatenation; slices would each allocate a full gradient.
        streams = [
            x.transpose(1, 2).reshape(1, batch * sequence, -1, head_dim).split(documents, dim=1) for x in (q, k, v)
        ]
        outputs = [
            F.scaled_dot_product_attention(
                query.transpose(1, 2),  # (1, H, n, d)
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                dropout_p=dropout,
                scale=self.scaling,
                enable_gqa=self.num_key_value_groups > 1,
            ).transpose(1, 2)  # (1, n, H, d)
            for query, key, value in zip(*streams, strict=True)
        ]
        return torch.cat(outputs, dim=1).view(batch, sequence, heads, head_dim)


def eager_attention(
    module: MiniMoeAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain matrix products; returns the output (B, S, H, d) and the probabilities (B, H, S, S)."""
    k = k.repeat_interleave(module.num_key_value_groups, dim=1)
    v = v.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = q @ k.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), dropout, module.training)
    return (probabilities @ v).transpose(1, 2), probabilities


def document_ids(position_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Which document each token belongs to, from positions that restart and a padding mask.

    A document starts at column 0, wherever a position is not its left neighbour's plus one, and wherever padding
    begins or ends. So padding is a document of its own, and nothing real attends to it.

    Args:
        position_ids: (B or 1, S) or None.
        attention_mask: (B, S), nonzero for real tokens, or None; one of the two is given.
        shape: (B, S).

    Returns:
        (B, S) int64, counted along the flattened stream from 0.
    """
    given = [x for x in (position_ids, attention_mask) if x is not None]
    starts = torch.zeros(shape, dtype=torch.bool, device=given[0].device)
    starts[:, 0] = True
    if position_ids is not None:
        starts[:, 1:] |= position_ids.diff(dim=1) != 1
    if attention_mask is not None:
        starts[:, 1:] |= attention_mask.bool().diff(dim=1)
    return starts.flatten().cumsum(0).sub_(1).view(shape)


def document_lengths(
    position_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int]
) -> DocumentLengths | None:
    """Lengths of the documents in the order of the stream; None when every row is one document.

    Arguments as in `document_ids`, both may be None. The host waits for the device.
    """
    if position_ids is None and attention_mask is None:
        return None
    lengths = document_ids(position_ids, attention_mask, shape).flatten().bincount().tolist()
    return None if len(lengths) == shape[0] else lengths
