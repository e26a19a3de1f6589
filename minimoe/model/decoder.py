"""The decoder: pre-norm layers of attention and MoE (or dense) feed-forward.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from minimoe.model.attention import MiniMoeAttention
from minimoe.model.config import MiniMoeConfig
from minimoe.model.documents import Documents
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.moe import MoEFeedForward
from minimoe.model.norm import MiniMoeRMSNorm
from minimoe.model.rotary import MiniMoeRotaryEmbedding
from minimoe.model.router import HashRouter, NoisyTopKRouter, RouterOutput, TopKRouter
from minimoe.ops import compute_dtype

# As in transformers' own models: what a caller gives as `past_key_values` must not get lost among the other arguments.
cache_by_its_old_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


class MiniMoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: MiniMoeConfig, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx < config.first_k_dense_replace
        self.self_attn = MiniMoeAttention(config, layer_idx)
        self.mlp: nn.Module = SwiGLU(config, config.intermediate_size) if dense else MoEFeedForward(config)
        self.input_layernorm = MiniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, token_ids: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, RouterOutput | None]:
        """x (B, S, D), of tokens (B, S) -> (B, S, D) and the router's decision; None in a dense layer."""
        dtype = compute_dtype(x)  # rounded once, where under autocast every projection would cast its input again
        x = x + self.self_attn(self.input_layernorm(x, dtype), **kwargs)[0]
        normed = self.post_attention_layernorm(x, dtype)
        y, routing = self.mlp(normed, token_ids) if isinstance(self.mlp, MoEFeedForward) else (self.mlp(normed), None)
        return x + y, routing


class MiniMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know to save, load and initialise these models."""

    config: MiniMoeConfig
    config_class = MiniMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    new_weights: ClassVar[tuple[str, ...]] = ()  # beginnings of names that a language model's folder does not have
    _no_split_modules: ClassVar[list[str]] = ["MiniMoeDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["e_score_correction_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "hidden_states": OutputRecorder(MiniMoeDecoderLayer, index=0),
        "attentions": OutputRecorder(MiniMoeAttention, index=1),
    }

    @property
    def device(self) -> torch.device:
        """Where it computes: with its rotary angles. Weights may be kept elsewhere until they are needed."""
        return self.base_model.rotary_emb.inv_freq.device

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Where none is asked for, `eager`: the dispatch paths of the config."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing is left to do: every folder names its classes, see `MiniMoeConfig.save_pretrained`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if "e_score_correction_bias" in module._buffers:
                init.zeros_(module.e_score_correction_bias)
            if isinstance(module, NoisyTopKRouter):
                init.zeros_(module.noise_weight)
        elif isinstance(module, HashRouter):
            init.copy_(module.experts_of_token, module.draw())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing or of another shape are an error.

        Raises:
            ValueError: transformers would only print a report and initialise them at random; weights of another shape
                it takes so with `ignore_mismatched_sizes=True`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = sorted(key for key in info["missing_keys"] if not key.startswith(cls.new_weights))
        if not kwargs.get("ignore_mismatched_sizes"):
            wrong += sorted(str(key) for key in info["mismatched_keys"])
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise ValueError(f"weights missing from the checkpoint or of another shape: {shown}")
        return (model, info) if wants_info else model


class MiniMoeModel(MiniMoePreTrainedModel):
    """Embedding, layers and final norm, without the language-model head."""

    moves_selection_bias = False  # set by the training loop that does, after each optimizer step

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MiniMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MiniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiniMoeRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @cache_by_its_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MiniMoeModelOutput:
        """Run the layers.

        Args:
            input_ids: (B, S); or inputs_embeds (B, S, D).
            attention_mask: (B, past + S), 0 for padding; padding may be on either side.
            position_ids: (B, S); positions that restart within a row begin a new document, which sees no other.
        """
        self._warn_of_a_still_bias()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and not isinstance(cache, Cache):
            # The paged cache of continuous batching knows many sequences, and comes with positions and a mask.
            past_length, mask, documents = 0, attention_mask, None
        else:
            past_length = 0 if cache is None else cache.get_seq_length()
            mask, documents = self._masks(x, attention_mask, position_ids, cache, past_length)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + past_length
        position_embeddings = self.rotary_emb(x, position_ids)
        routings = []
        for layer in self.layers[: self.config.num_hidden_layers]:  # generation that exits early lowers the number
            x, routing = layer(
                x,
                token_ids=input_ids,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                documents=documents,
                cache=cache,
                **kwargs,
            )
            if routing is not None:
                routings.append(routing)
        return MiniMoeModelOutput(last_hidden_state=self.norm(x), cache=cache, routings=tuple(routings))

    def _warn_of_a_still_bias(self) -> None:
        still = self.training and self.config.router_bias_update_rate and not self.moves_selection_bias
        if still and not torch.compiler.is_compiling():  # a warning is no part of a graph
            warnings.warn(
                "router_bias_update_rate has no effect in this training; a Trainer needs "
                "callbacks=[SelectionBiasCallback()], from minimoe.train.callback",
                stacklevel=2,
            )

    def _masks(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past_length: int | Tensor,
    ) -> tuple[Tensor | None, Documents | None]:
        """How attention is masked: a 4-D mask, or documents, or neither (plain causal)."""
        batch, sequence, _ = x.shape
        documents = None
        if sequence > 1 and not past_length and (attention_mask is None or attention_mask.dim() == 2):
            if position_ids is not None or attention_mask is not None:
                documents = Documents(position_ids, attention_mask, (batch, sequence))
            if cache is None and self.config._attn_implementation == "sdpa":
                return None, documents
            attention_mask = None  # padding is a document of its own
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=None,
            and_mask_function=None if documents is None else documents.mask_function(),
        )
        return mask, None


def real_tokens(attention_mask: Tensor | None, sequence: int) -> Tensor | None:
    """Which of the B*S tokens are no padding, (T,) bool, where a mask (B, past + S) says so."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -sequence:].bool().flatten()


@dataclass
class MiniMoeModelOutput(MoeModelOutputWithPast):
    """Adds what every MoE layer's router decided."""

    routings: tuple[RouterOutput, ...] | None = None
