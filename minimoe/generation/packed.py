"""The model laid out for generating on a CPU: the same function as its forward, several times as fast.

Decoding reads all active weights for a row or a few, so it can be as fast as memory is read. `F.linear` on so few
rows reaches a third of that speed or less. What comes near it:

- few rows go through `kernels.products`, which reads the model's own weights, each matrix once for all its rows,
- many go through weights that oneDNN has packed once into the blocks its kernels read.

The rest is fewer calls a layer: query, key and value in one product, heads that share keys attended as one, no
modules. The packed layouts are copies: with them the weights take about twice the memory.

With `weights="int8"` every matrix is rounded to 8 bits (see `rounded`); embeddings, routers and norms stay as they are.
Few rows then read a quarter of the bytes. Many are multiplied with the rounded numbers too, in the model's dtype: no
faster, but the same function, so that a completion does not depend on what else is in its batch.

B rows, n tokens fed a row, T tokens = B*n, D hidden, H query heads, K key/value heads, d head_dim, L positions in
the cache, E experts, k experts per token, I expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe import kernels
from minimoe.config import WeightsName
from minimoe.generation.cache import PreallocatedCache, PreallocatedLayer
from minimoe.model.attention import MiniMoeAttention
from minimoe.model.causal_attention import prepare_heads
from minimoe.model.decoder import MiniMoeDecoderLayer, MiniMoeForCausalLM, MiniMoeModel
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.moe import MoEFeedForward
from minimoe.model.norm import MiniMoeRMSNorm, unit_rms
from minimoe.model.rotary import MiniMoeRotaryEmbedding
from minimoe.model.router import TopKRouter

MAX_BYTES = 2**30  # of weights; larger models are not copied, which takes as much again
ROWS_HINT = 8  # rows that oneDNN picks its blocks for; measured as good from 1 to 128 rows
FEW_ROWS = 6  # a matrix, on average; oneDNN is faster from 8 on


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
    """What keeps a model from being packed; None when nothing does."""
    if type(model) is not MiniMoeForCausalLM:
        return f"{type(model).__name__} is not {MiniMoeForCausalLM.__name__}"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, not on a CPU"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        return f"its weights are {' and '.join(sorted(map(str, dtypes)))}"
    if torch.bfloat16 in dtypes and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 products"
    if sum(parameter.nbytes for parameter in model.parameters()) > MAX_BYTES:
        return f"copies of more than {MAX_BYTES / 2**30:.0f} GiB of weights would take too much memory"
    for name, module in model.named_modules():
        if type(module) not in KNOWN_MODULES or module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} is not as minimoe made it"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


def weights_version(model: Any) -> list[tuple[int, int, int]]:
    """Changes when weights do, in place or not: a packed copy of another version is out of date.

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
        self._head = PackedLinear(weights, model.lm_head.weight)

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
        return self._head(x[:, -1], norm=self._norm)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits (n, V) of all positions of one text."""
        ids = torch.tensor([token_ids])
        cache = PreallocatedCache(self._model.config, len(token_ids))
        x = self._hidden(ids, torch.arange(len(token_ids))[None], cache, None)
        return self._head(x[0], norm=self._norm)

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
        attention, self._mlp = layer.self_attn, _packed_feed_forward(layer.mlp, weights)
        config = attention.config
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._qkv = PackedLinear(weights, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self._output = PackedLinear(weights, attention.o_proj.weight)
        norms = [attention.q_norm] * self._heads + [attention.k_norm] * self._kv_heads
        self._gains = torch.stack([norm.weight.detach().float() for norm in norms])  # (H + K, d)
        self._eps = attention.q_norm.eps
        self._input_norm = PackedNorm(layer.input_layernorm)
        self._post_norm = PackedNorm(layer.post_attention_layernorm)

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
        qkv = self._qkv(x, norm=self._input_norm)
        heads = prepare_heads(qkv, self._gains, self._kv_heads, self._eps, cos, sin, num_tokens)
        k, v = (y.view(batch, self._kv_heads, num_tokens, -1) for y in (heads.k, heads.v))
        keys, values = cache.update(k, v)  # (B, K, L + n, d)
        q = heads.q.view(batch, self._kv_heads, num_tokens, -1, self._head_dim)
        if num_tokens == 1 and kernels.made_for(heads.q):
            row_bias = None if bias is None else bias.view(batch, -1).float()
            out = kernels.attend(q[:, :, 0], keys, values, row_bias, self._scaling)
        else:
            out = F.scaled_dot_product_attention(
                q.transpose(2, 3).flatten(1, 2),  # (B, H, n, d)
                keys,
                values,
                attn_mask=bias,
                is_causal=bias is None and num_tokens > 1,
                scale=self._scaling,
                enable_gqa=True,
            ).transpose(1, 2)  # (B, n, H, d)
        x = self._output(out.reshape(x.shape[0], -1), add=x)
        return self._mlp(self._post_norm(x), add=x)


class PackedMatrices:
    """Matrices (E, out, in): as our kernels read them, for few rows, and as oneDNN does, for many."""

    def __init__(self, matrices: Tensor, weights: WeightsName) -> None:
        matrices = matrices.detach().contiguous()
        self.dtype = matrices.dtype
        self.plain = kernels.Matrices(*rounded(matrices) if weights == "int8" else (matrices, None))

    def few(self, num_rows: int) -> bool:
        """Whether so many rows, spread over the matrices, are few."""
        return num_rows <= FEW_ROWS * len(self.plain.numbers) and kernels.why_not() is None

    def product(self, rows: Tensor, index: int = 0) -> Tensor:
        """Many rows (n, in), all for one matrix -> (n, out)."""
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed[index], None, "none", [], "")

    @cached_property
    def _packed(self) -> list[Tensor]:
        numbers, scales = self.plain
        matrices = numbers if scales is None else (numbers * scales.unsqueeze(-1)).to(self.dtype)
        return [torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_HINT) for matrix in matrices]


def rounded(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(..., out, in) -> int8 from -127 to 127 and a float32 scale an output (..., out): their product is about W."""
    matrices = matrices.float()
    scales = matrices.abs().amax(dim=-1).clamp_min(1e-30) / 127  # a row of zeros stays one
    return (matrices / scales.unsqueeze(-1)).round().to(torch.int8), scales


class PackedNorm:
    """RMS norm, with its weight in float32."""

    def __init__(self, norm: MiniMoeRMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach().float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        if kernels.made_for(x):
            return kernels.rms_norm(x.float(), self.weight, self.eps, torch.empty_like(x))
        return (unit_rms(x.float(), self.eps)[0] * self.weight).to(x.dtype)


class PackedLinear:
    """x -> x W^T on weights (out, in) that are stacked."""

    def __init__(self, weights: WeightsName, *parts: Tensor) -> None:
        self._matrix = PackedMatrices((torch.cat(parts) if len(parts) > 1 else parts[0])[None], weights)
        self._ids = torch.zeros(FEW_ROWS, dtype=torch.int64)

    def __call__(self, x: Tensor, norm: PackedNorm | None = None, add: Tensor | None = None) -> Tensor:
        """x (T, in), its norm before, if any -> (T, out), added to `add` in place, if any."""
        if self._matrix.few(len(x)):
            scaling = None if norm is None else (norm.weight, norm.eps)
            total = None if add is None else add.float()
            return kernels.products(self._matrix.plain, x, self._ids[: len(x)], 1, scaling, total).to(x.dtype)
        y = self._matrix.product(x if norm is None else norm(x))
        return y if add is None else add.add_(y)


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
        self._shared = None if block.shared_experts is None else _packed_feed_forward(block.shared_experts, weights)

    def __call__(self, tokens: Tensor, add: Tensor) -> Tensor:
        """tokens (T, D) -> `add` (T, D), changed in place."""
        add = self._experts(tokens, *self._router(tokens), add)
        return add if self._shared is None else self._shared(tokens, add)


class PackedSwiGLU:
    """The dense block: an expert that every token uses."""

    def __init__(self, block: SwiGLU, weights: WeightsName) -> None:
        gate_up = torch.cat((block.gate_proj.weight, block.up_proj.weight))
        self._expert = PackedExperts(gate_up[None], block.down_proj.weight[None], weights)

    def __call__(self, tokens: Tensor, add: Tensor) -> Tensor:
        """As `PackedMoE`."""
        ids = torch.zeros(len(tokens), 1, dtype=torch.int64)
        return self._expert(tokens, ids, torch.ones(len(tokens), 1), add)


class PackedExperts:
    """All experts of a layer."""

    def __init__(self, gate_up: Tensor, down: Tensor, weights: WeightsName) -> None:
        self._gate_up, self._down = PackedMatrices(gate_up, weights), PackedMatrices(down, weights)
        self._num_experts = len(down)

    def __call__(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor, add: Tensor) -> Tensor:
        """tokens (T, D), expert_ids (T, k), weights (T, k) float32 -> `add` (T, D), changed in place."""
        num_tokens, k = expert_ids.shape
        if self._down.few(num_tokens * k):
            matrices = (self._gate_up.plain, self._down.plain)
            return kernels.experts(*matrices, tokens, expert_ids, weights, add.float()).to(add.dtype)
        ids, order = expert_ids.flatten().sort(stable=True)
        counts = torch.bincount(ids, minlength=self._num_experts).tolist()
        parts = enumerate(tokens.index_select(0, order // k).split(counts))
        rows = torch.cat([self._expert(expert, part) for expert, part in parts if len(part)])
        outputs = torch.empty_like(rows).index_copy_(0, order, rows).view(num_tokens, k, -1).float()
        # (T, 1, k) @ (T, k, D), summed in float32 as the dispatch paths do
        return add.add_(torch.bmm(weights.unsqueeze(1), outputs).squeeze(1))

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        return self._down.product(kernels.swiglu(self._gate_up.product(rows, expert)), expert)


def _packed_feed_forward(module: nn.Module, weights: WeightsName) -> PackedMoE | PackedSwiGLU:
    if isinstance(module, MoEFeedForward):
        return PackedMoE(module, weights)
    assert isinstance(module, SwiGLU)
    return PackedSwiGLU(module, weights)


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
