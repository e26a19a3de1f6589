"""Causal self-attention: rotary positions, per-head QK-norm, grouped queries, and packed documents.

B batch, S sequence, H query heads, K key/value heads, d head_dim, D hidden.

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

from minimoe.model.config import MiniMoeConfig
from minimoe.model.documents import Documents
from minimoe.model.norm import MiniMoeRMSNorm
from minimoe.model.rotary import norm_and_rotate
from minimoe.ops import accelerated, without_autocast


class MiniMoeAttention(nn.Module):
    """Grouped-query attention, with QK-norm unless the config has none."""

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
        self.q_norm, self.k_norm = (
            MiniMoeRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D) -> output (B, S, D) and, with eager attention, the probabilities (B, H, S, S).

        Args:
            position_embeddings: cos and sin, (B, S, d) each.
            attention_mask: 4-D mask of transformers, or None for plain causal.
            documents: packed documents, in place of a mask.
            cache: keys and values of earlier positions; updated in place.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (projection(x).view(heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.attention_dropout if self.training else 0.0
        probabilities = None
        if cache is None and attention_mask is None and self.config._attn_implementation == "sdpa":
            norms = (self.q_norm, self.k_norm, *position_embeddings)
            out = causal_attention(q, k, v, *norms, self.scaling, documents, dropout)
        else:
            q = norm_and_rotate(q, self.q_norm, *position_embeddings)
            k = norm_and_rotate(k, self.k_norm, *position_embeddings)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, S, d)
            keys, values = (k, v) if cache is None else cache.update(k, v, self.layer_idx, kwargs=kwargs)
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
            with without_autocast(q):
                out, probabilities = attend(
                    self, q, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
                )  # (B, S, H, d)
        return self.o_proj(out.flatten(2)), probabilities


@accelerated
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: nn.Module,
    k_norm: nn.Module,
    cos: Tensor,
    sin: Tensor,
    scaling: float,
    documents: Documents | None,
    dropout: float,
) -> Tensor:
    """Attention of whole rows to themselves, each token to the earlier ones of its document.

    Args:
        q, k, v: (B, S, H, d), and (B, S, K, d) twice.
        q_norm, k_norm: of a head's d values, before the rotation.
        cos, sin: (B, S, d), of each token's position.
        scaling: what scores are multiplied by.
        documents: None if every row is one document.
        dropout: of the probabilities.

    Returns:
        (B, S, H, d).
    """
    q, k = norm_and_rotate(q, q_norm, cos, sin), norm_and_rotate(k, k_norm, cos, sin)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, S, d) each
    mask, grouped = None if documents is None else documents.mask, q.shape[1] > k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


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
    """Plain matmuls; returns the output (B, S, H, d) and the probabilities (B, H, S, S)."""
    k = k.repeat_interleave(module.num_key_value_groups, dim=1)
    v = v.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = q @ k.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), dropout, module.training)
    return (probabilities @ v).transpose(1, 2), probabilities
