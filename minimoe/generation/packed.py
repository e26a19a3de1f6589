"""The model laid out for generating on a CPU: the same function as its forward, several times as fast.

Decoding reads all active weights for a row or a few, so it can be as fast as memory is read; `F.linear` on so few rows
reaches a third of that speed or less. Here

- few rows read the model's own weights, each matrix once for all its rows, if there is a compiled form,
- many go through copies that oneDNN has repacked once into the panels that its kernels read,
- and a layer makes fewer calls: query, key and value in one matmul, heads that share keys attended as one, no modules.

With the copies the weights take about twice the memory.

With `weights="int8"` every matrix is rounded to 8 bits (see `rounded`); embeddings, routers and norms stay as they are.
Few rows then read a quarter of the bytes. Many are multiplied with the rounded weights too, in the model's dtype: no
faster, but the same function, so that a completion does not depend on what else is in its batch.

B rows, n tokens fed a row, T tokens = B*n, D hidden, H query heads, K key/value heads, d head_dim, L positions in
the cache, E experts, k experts per token, I expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import WeightsName
from minimoe.generation.cache import PreallocatedCache, PreallocatedLayer
from minimoe.model.attention import MiniMoeAttention
from minimoe.model.decoder import MiniMoeDecoderLayer, MiniMoeModel
from minimoe.model.dispatch import grouped
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.moe import MoEFeedForward
from minimoe.model.norm import MiniMoeRMSNorm, rms_norm
from minimoe.model.rotary import MiniMoeRotaryEmbedding
from minimoe.model.router import TopKRouter
from minimoe.ops import accelerated, enabled
from minimoe.ops.heads import prepare_heads, rotate_heads
from minimoe.ops.moe import weighted_swiglu

MAX_BYTES = 2**30  # of weights; larger models are not copied, which takes as much again
ROWS_HINT = 8  # rows that oneDNN picks its blocks for; good from 1 to 128 rows


# A model made of anything else (adapters, quantised layers) is left alone.
KNOWN_MODULES = {
    MiniMoeForCausalLM,
    MiniMoeModel,
    MiniMoeDecoderLayer,
    MiniMoeAttention,
    MiniMoeRMSNorm,
    MiniMoeRotaryEmbedding,
    MoEFeedForward,
    TopKRouter,
    Experts,
    SwiGLU,
    nn.Linear,
    nn.Embedding,
    nn.ModuleList,
}


def why_not_packed(model: Any) -> str | None:
    """What keeps a model from being repacked; None when nothing does."""
    if not enabled():
        return "plain torch is asked for"
    if type(model) is not MiniMoeForCausalLM:
        return f"{type(model).__name__} is not {MiniMoeForCausalLM.__name__}"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, not on a CPU"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if model.config.num_zero_computation_experts:
        return "it has zero-computation experts"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        return f"its weights are {' and '.join(sorted(map(str, dtypes)))}"
    if torch.bfloat16 in dtypes and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 matmuls"
    if sum(parameter.nbytes for parameter in model.parameters()) > MAX_BYTES:
        return f"copies of more than {MAX_BYTES / 2**30:.0f} GiB of weights would take too much memory"
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if type(module) not in KNOWN_MODULES or hooked:
            return f"{name or 'the model'} is not as minimoe made it"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


def weights_version(model: Any) -> list[tuple[int, int, int]]:
    """Changes when weights do, in place or not: a repacked copy of another version is out of date.

    torch's count of changes misses fused optimizers, so all weights are read: 1 ms for 7 MB.
    """
    tensors = [*model.parameters(), *model.buffers()]
    hashes = torch.stack([torch.hash_tensor(t.detach()).view(torch.int64) for t in tensors]).tolist()
    versions = (0 if t.is_inference() else t._version for t in tensors)
    return list(zip((t.data_ptr() for t in tensors), versions, hashes, strict=True))


class PackedModel:
    """A copy of the weights, rounded or not, and the step over them."""

    def __init__(self, model: MiniMoeForCausalLM, weights: WeightsName = "exact") -> None:
        self._model = model
        self._layers = [PackedLayer(layer, weights) for layer in model.model.layers]
        self._norm = PackedNorm(model.model.norm)
        self._head = PackedMatrix(weights, model.lm_head.weight)

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, cache: PreallocatedCache, mask: Tensor | None = None
    ) -> Tensor:
        """Feed tokens (B, n) at their positions (B, n) and return the logits (B, V) of the last of each row.

        Args:
            cache: earlier keys and values; updated in place.
            mask: (B, L + n), nonzero for what is not padding; None where nothing is.
        """
        x = self._hidden(input_ids, position_ids, cache, mask)
        return linear(x[:, -1], self._head, self._norm, None)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits (n, V) of all positions of one text."""
        ids = torch.tensor([token_ids])
        cache = PreallocatedCache(self._model.config, len(token_ids))
        x = self._hidden(ids, torch.arange(len(token_ids))[None], cache, None)
        return linear(x[0], self._head, self._norm, None)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, cache: PreallocatedCache, mask: Tensor | None) -> Tensor:
        """As `__call__`, -> (B, n, D) before the last norm."""
        batch, num_tokens = input_ids.shape
        x = self._model.model.embed_tokens(input_ids)  # (B, n, D)
        cos, sin = (part.flatten(0, 1) for part in self._model.model.rotary_emb(x.float(), position_ids))  # (T, d)
        bias = _attention_bias(mask, num_tokens, cache.get_seq_length(), x.dtype)
        x = x.flatten(0, 1)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            x = layer(x, (batch, num_tokens), cos, sin, bias, layer_cache)
        return x.view(batch, num_tokens, -1)


class PackedLayer:
    """One decoder layer."""

    def __init__(self, layer: nn.Module, weights: WeightsName) -> None:
        assert isinstance(layer, MiniMoeDecoderLayer)
        attention = layer.self_attn
        config = attention.config
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._widths = [self._head_dim * heads for heads in (self._heads, self._kv_heads, self._kv_heads)]
        self._qkv = PackedMatrix(weights, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self._output = PackedMatrix(weights, attention.o_proj.weight)
        norms: list[Any] = [attention.q_norm] * self._heads + [attention.k_norm] * self._kv_heads
        gains = [norm.weight.detach().float() for norm in norms if config.use_qk_norm]
        self._gains = torch.stack(gains) if gains else None  # (H + K, d)
        self._eps = config.rms_norm_eps
        self._input_norm = PackedNorm(layer.input_layernorm)
        self._post_norm = PackedNorm(layer.post_attention_layernorm)
        self._mlp = (
            PackedMoE(layer.mlp, weights) if isinstance(layer.mlp, MoEFeedForward) else _dense(layer.mlp, weights)
        )

    def __call__(
        self,
        x: Tensor,
        shape: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        bias: Tensor | None,
        cache: PreallocatedLayer,
    ) -> Tensor:
        """x (T, D) -> (T, D); cos, sin (T, d)."""
        batch, num_tokens = shape
        q, k, v = linear(x, self._qkv, self._input_norm, None).split(self._widths, dim=1)
        if self._gains is not None:
            heads = prepare_heads(q, k, v, self._gains, cos, sin, self._eps, num_tokens)
        else:
            heads = rotate_heads(q, k, v, cos, sin, num_tokens)
        k, v = (y.view(batch, self._kv_heads, num_tokens, -1) for y in (heads.k, heads.v))
        keys, values = cache.update(k, v)  # (B, K, L + n, d)
        q = heads.q.view(batch, self._kv_heads, num_tokens, -1, self._head_dim)
        x = linear(cached_attention(q, keys, values, bias, self._scaling), self._output, None, x)
        return x + self._mlp(self._post_norm(x))


@accelerated
def cached_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of the newest n tokens to all positions of a cache.

    Args:
        q: (B, K, n, H / K, d).
        keys, values: (B, K, L, d), the newest tokens included.
        bias: (B or 1, 1, n, L), added to the scores, or None: a token sees itself and what is before it.

    Returns:
        (T, H * d).
    """
    batch, _, num_tokens, _, _ = q.shape
    causal = bias is None and num_tokens > 1
    q = q.transpose(2, 3).flatten(1, 2)  # (B, H, n, d)
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=bias, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(batch * num_tokens, -1)


@accelerated
def linear(x: Tensor, matrix: PackedMatrix, norm: PackedNorm | None, add: Tensor | None) -> Tensor:
    """x (T, in), its norm before, if any -> (T, out), plus `add`, if any."""
    y = matrix.multiply(x if norm is None else norm(x))
    return y if add is None else add + y


class PackedMatrix:
    """A matrix (out, in), or parts of one below each other, as it is stored and as oneDNN has repacked it."""

    def __init__(self, weights: WeightsName, *parts: Tensor) -> None:
        self.stored = stored(torch.cat(parts) if len(parts) > 1 else parts[0], weights)
        self._dtype = parts[0].dtype

    def multiply(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        return _multiply(rows, self._packed)

    @cached_property
    def _packed(self) -> Tensor:
        return _pack(*self.stored, self._dtype)


def stored(matrices: Tensor, weights: WeightsName) -> tuple[Tensor, Tensor | None]:
    """Matrices (..., out, in) as few rows read them: exact, or rounded with their scales (..., out)."""
    matrices = matrices.detach().contiguous()
    return rounded(matrices) if weights == "int8" else (matrices, None)


def rounded(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(..., out, in) -> int8 from -127 to 127 and float32 scales (..., out): W is about values * scales."""
    matrices = matrices.float()
    scales = matrices.abs().amax(dim=-1).clamp_min(1e-30) / 127  # a row of zeros stays one
    return (matrices / scales.unsqueeze(-1)).round().to(torch.int8), scales


def _pack(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    matrix = values if scales is None else (values * scales.unsqueeze(-1)).to(dtype)
    return torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_HINT)


def _multiply(rows: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


class PackedNorm:
    """RMS norm, with its weight in float32."""

    def __init__(self, norm: MiniMoeRMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach().float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, x.dtype)


class PackedRouter:
    """The model's router without what only training looks at, the probabilities of all experts."""

    def __init__(self, router: TopKRouter) -> None:
        self._router = router
        self._few_calls = router.scoring_func == "softmax" and router.norm_topk_prob

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (T, D) -> expert_ids (T, k), weights (T, k) in float32."""
        router = self._router
        if not self._few_calls:
            routing = router(tokens)
            return routing.expert_ids, routing.weights
        logits = F.linear(tokens.float(), router.weight.float())
        chosen, expert_ids = logits.topk(router.num_experts_per_tok, dim=-1)
        weights = chosen.softmax(dim=-1)  # the softmax of all, divided by its sum over the chosen
        return expert_ids, weights if router.routed_scaling_factor == 1 else weights * router.routed_scaling_factor


class PackedMoE:
    """The MoE block."""

    def __init__(self, block: MoEFeedForward, weights: WeightsName) -> None:
        self._router = PackedRouter(block.gate)
        self._experts = PackedExperts(block.experts.gate_up_proj, block.experts.down_proj, weights)
        self._shared = None if block.shared_experts is None else _dense(block.shared_experts, weights)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (T, D) -> (T, D)."""
        y = grouped(tokens, *self._router(tokens), self._experts)
        return y if self._shared is None else y + self._shared(tokens)


class PackedExperts:
    """The experts of a layer as functions of rows; few rows read the weights as they are stored."""

    def __init__(self, gate_up: Tensor, down: Tensor, weights: WeightsName) -> None:
        self.gate_up_proj, self.gate_up_scales = stored(gate_up, weights)
        self.down_proj, self.down_scales = stored(down, weights)
        self._dtype = down.dtype

    def __len__(self) -> int:
        return self.down_proj.shape[0]

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (partial(_expert, gate_up, down) for gate_up, down in self._packed)

    @cached_property
    def _packed(self) -> list[tuple[Tensor, Tensor]]:
        stacks = []
        for values, scales in ((self.gate_up_proj, self.gate_up_scales), (self.down_proj, self.down_scales)):
            each = [None] * len(values) if scales is None else scales.unbind(0)
            stacks.append([_pack(*one, self._dtype) for one in zip(values.unbind(0), each, strict=True)])
        return list(zip(*stacks, strict=True))


def _expert(gate_up: Tensor, down: Tensor, rows: Tensor) -> Tensor:
    return _multiply(weighted_swiglu(_multiply(rows, gate_up), None), down) if len(rows) else rows


def _dense(block: nn.Module, weights: WeightsName) -> Callable[[Tensor], Tensor]:
    """The dense block: an expert that every token uses."""
    assert isinstance(block, SwiGLU)
    gate_up = torch.cat((block.gate_proj.weight, block.up_proj.weight))
    expert = PackedExperts(gate_up[None], block.down_proj.weight[None], weights)

    def call(tokens: Tensor) -> Tensor:
        return grouped(tokens, torch.zeros(len(tokens), 1, dtype=torch.int64), torch.ones(len(tokens), 1), expert)

    return call


def _attention_bias(mask: Tensor | None, num_tokens: int, past: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, (B or 1, 1, n, L); None for one token that sees all, and for a plain prompt."""
    if mask is None and (num_tokens == 1 or past == 0):
        return None
    total = past + num_tokens
    allowed = torch.ones(num_tokens, total, dtype=torch.bool).tril(past)[None, None]  # (1, 1, n, L)
    if mask is not None:
        # Padding sees itself, so that no row is empty.
        itself = torch.eye(num_tokens, total, dtype=torch.bool).roll(past, 1)
        allowed = allowed & mask.bool()[:, None, None] | itself
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
