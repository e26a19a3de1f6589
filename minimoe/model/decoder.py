"""The decoder: pre-norm layers of attention and MoE (or dense) feed-forward, as `transformers` models.

B batch, S sequence, T tokens = B*S, D hidden, E experts, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from minimoe.model.attention import (
    DocumentLengths,
    MiniMoeAttention,
    document_ids,
    document_lengths,
)
from minimoe.model.config import MiniMoeConfig
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.losses import (
    IGNORE_INDEX,
    expert_counts,
    fused_next_token_loss,
    load_balancing_loss,
    next_token_loss,
    router_z_loss,
)
from minimoe.model.moe import MoEFeedForward
from minimoe.model.norm import MiniMoeRMSNorm
from minimoe.model.precision import compute_dtype
from minimoe.model.rotary import MiniMoeRotaryEmbedding
from minimoe.model.router import RouterOutput, TopKRouter

# As in transformers' own models: what a caller gives as `past_key_values` must not get lost among the other arguments.
_cache_by_its_old_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


class MiniMoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: MiniMoeConfig, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx < config.first_k_dense_replace
        self.self_attn = MiniMoeAttention(config, layer_idx)
        self.mlp: nn.Module = SwiGLU(config, config.intermediate_size) if dense else MoEFeedForward(config)
        self.input_layernorm = MiniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, RouterOutput | None]:
        """x (B, S, D) -> (B, S, D) and the router's decision; None in a dense layer."""
        dtype = compute_dtype(x.device, x.dtype)  # under autocast, every projection would cast its input again
        x = x + self.self_attn(self.input_layernorm(x, dtype), **kwargs)[0]
        y = self.mlp(self.post_attention_layernorm(x, dtype))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + y, routing


class MiniMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know to save, load and initialise these models."""

    config: MiniMoeConfig
    config_class = MiniMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MiniMoeDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["e_score_correction_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": OutputRecorder(MiniMoeDecoderLayer, index=0),
        "attentions": OutputRecorder(MiniMoeAttention, index=1),
    }

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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing or of another shape are an error.

        Raises:
            ValueError: transformers would only print a report and initialise them at random.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise ValueError(f"weights missing from the checkpoint or of another shape: {shown}")
        return (model, info) if wants_info else model


class MiniMoeModel(MiniMoePreTrainedModel):
    """Embedding, layers and final norm, without the language-model head."""

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MiniMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MiniMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiniMoeRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @_cache_by_its_old_name
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
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past_length = 0 if cache is None else cache.get_seq_length()
        mask, documents = self._masks(x, attention_mask, position_ids, cache, past_length)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + past_length
        position_embeddings = self.rotary_emb(x, position_ids)
        routings = []
        for layer in self.layers:
            x, routing = layer(
                x,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                documents=documents,
                cache=cache,
                **kwargs,
            )
            if routing is not None:
                routings.append(routing)
        return MiniMoeModelOutput(last_hidden_state=self.norm(x), cache=cache, routings=tuple(routings))

    def _masks(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past_length: int | Tensor,
    ) -> tuple[Tensor | None, DocumentLengths | None]:
        """How attention is masked: a 4-D mask, or document lengths, or neither (plain causal)."""
        shape = (x.shape[0], x.shape[1])
        block_ids = None
        if shape[1] > 1 and not past_length and (attention_mask is None or attention_mask.dim() == 2):
            if attention_mask is not None and attention_mask.shape[1] != shape[1]:
                raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit input {shape}")
            if x.device.type == "cpu":
                documents = document_lengths(position_ids, attention_mask, shape)
                packed = documents is not None
                if packed and self.config._attn_implementation == "sdpa":
                    return None, documents
            else:  # to look would make the host wait: whoever gives positions or a mask has a reason
                packed = position_ids is not None or attention_mask is not None
            if packed:
                # The general way: a mask that also forbids looking across documents.
                block_ids = document_ids(position_ids, attention_mask, shape)
            attention_mask = None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=None,
            and_mask_function=None if block_ids is None else _same_document(block_ids),
        )
        return mask, None


def _same_document(block_ids: Tensor) -> Any:
    """Mask function of transformers: a query sees a key of its own document only. block_ids is (B, S)."""

    def same(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # A static cache has more keys than the prompt has tokens; causality cuts those off.
        return block_ids[batch_idx, q_idx] == block_ids[batch_idx, kv_idx.clamp(max=block_ids.shape[1] - 1)]

    return same


@dataclass
class MiniMoeModelOutput(MoeModelOutputWithPast):
    """Adds what every MoE layer's router decided."""

    routings: tuple[RouterOutput, ...] | None = None


@dataclass
class MiniMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds every term of the loss, unscaled, and the experts' loads.

    `loss` = lm_loss + router_aux_loss_coef * load_balancing_loss + router_z_loss_coef * router_z_loss.
    """

    lm_loss: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    expert_counts: Tensor | None = None  # (L, E) int64: real tokens per expert of each MoE layer


class MiniMoeForCausalLM(MiniMoePreTrainedModel, GenerationMixin):
    """Decoder with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__(config)
        self.model = MiniMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @_cache_by_its_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> MiniMoeCausalLMOutput:
        """Logits and, with labels, the losses.

        Args:
            input_ids, attention_mask, position_ids: see `MiniMoeModel.forward`.
            labels: (B, S), unshifted; IGNORE_INDEX is not learned.
            output_router_logits: return the router logits and the balance loss also without labels.
            logits_to_keep: logits of the last so many positions only (0 = all), or of given positions.
            num_items_in_batch: learned tokens of the whole optimizer step. Losses are then this call's share of the
                step's mean, so that adding up micro-batches gives exactly the mean over all tokens.
            skip_logits: with labels, return no logits and hold a few rows of them at a time, on a CPU only of positions
                that are learned: less time and much less memory.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: MiniMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, S, D)
        result = MiniMoeCausalLMOutput(
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if not (skip_logits and labels is not None):
            # slice(-0, None) is everything
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = self.lm_head(hidden[:, kept])
        if labels is not None or output_router_logits:
            self._add_router_terms(result, outputs.routings or (), attention_mask, hidden.shape)
        if output_router_logits:
            result.router_logits = tuple(routing.logits for routing in outputs.routings or ())
        if labels is not None:
            self._add_losses(result, hidden, labels, num_items_in_batch)
        return result

    def _add_router_terms(
        self,
        result: MiniMoeCausalLMOutput,
        routings: tuple[RouterOutput, ...],
        attention_mask: Tensor | None,
        shape: torch.Size,
    ) -> None:
        """Balance loss, z-loss (each averaged over layers) and expert counts, of real tokens only."""
        if not routings:
            zero = torch.zeros((), device=self.device)
            result.load_balancing_loss = result.aux_loss = result.router_z_loss = zero
            result.expert_counts = torch.zeros(0, self.config.num_experts, dtype=torch.long, device=self.device)
            return
        batch, sequence, _ = shape
        mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -sequence:].bool().flatten()  # (T,)
        per_sequence = batch if self.config.router_aux_loss_type == "sequence" else None
        balance = [load_balancing_loss(r.probabilities, r.expert_ids, mask, per_sequence) for r in routings]
        result.load_balancing_loss = result.aux_loss = torch.stack(balance).mean()
        result.router_z_loss = torch.stack([router_z_loss(r.logits, mask) for r in routings]).mean()
        counts = [expert_counts(r.expert_ids, self.config.num_experts, mask) for r in routings]
        result.expert_counts = torch.stack(counts)

    def _add_losses(
        self,
        result: MiniMoeCausalLMOutput,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> None:
        """lm_loss and the total. Position t predicts label t + 1."""
        targets = labels[:, 1:].flatten()
        num_targets = (targets != IGNORE_INDEX).sum()
        num_items = num_targets if num_items_in_batch is None else num_items_in_batch
        if result.logits is not None and result.logits.shape[1] == labels.shape[1]:
            result.lm_loss = next_token_loss(result.logits[:, :-1].flatten(0, 1), targets, num_items)
        else:
            states = hidden[:, :-1].flatten(0, 1)  # (N, D)
            if states.device.type == "cpu":  # elsewhere the host would wait to know how many are learned
                learned = (targets != IGNORE_INDEX).nonzero().flatten()
                states, targets = states.index_select(0, learned), targets[learned]
            result.lm_loss = fused_next_token_loss(states, self.lm_head.weight, targets, num_items)
        # The router terms are means over this call's tokens; weigh them by its share of the step.
        share = num_targets / torch.as_tensor(num_items, device=targets.device).clamp(min=1)
        assert result.load_balancing_loss is not None
        assert result.router_z_loss is not None
        balance = self.config.router_aux_loss_coef * result.load_balancing_loss
        result.loss = result.lm_loss + share * (balance + self.config.router_z_loss_coef * result.router_z_loss)


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know minimoe; experts are split on disk."""
    AutoConfig.register("minimoe", MiniMoeConfig, exist_ok=True)
    AutoModel.register(MiniMoeConfig, MiniMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(MiniMoeConfig, MiniMoeForCausalLM, exist_ok=True)
    # Qwen2-MoE's mapping: mlp.experts.{e}.{gate,up,down}_proj.weight on disk, stacked in memory.
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("minimoe", mapping, overwrite=True)


register()
