"""The language model: the decoder with its head, its losses, and what `transformers` needs to know of it.

B batch, S sequence, T tokens = B*S, D hidden, E experts, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import _LazyModule

from minimoe.model.config import MiniMoeConfig
from minimoe.model.decoder import (
    MiniMoeModel,
    MiniMoeModelOutput,
    MiniMoePreTrainedModel,
    cache_by_its_old_name,
    real_tokens,
)
from minimoe.model.losses import (
    IGNORE_INDEX,
    expert_counts,
    hidden_loss,
    load_balancing_loss,
    mean_probabilities,
    next_token_loss,
    router_confidence,
    router_entropy_loss,
    router_z_loss,
    token_logprobs,
)
from minimoe.model.router import RouterOutput

__all__ = [
    "MiniMoeConfig",
    "MiniMoeForCausalLM",
    "MiniMoeForSequenceClassification",
    "MiniMoeForTokenClassification",
    "MiniMoeModel",
]


@dataclass
class MiniMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds every term of the loss, unscaled, and the experts' loads.

    In training, `loss` = lm_loss + router_aux_loss_coef * load_balancing_loss + router_z_loss_coef * router_z_loss +
    router_entropy_loss_coef * router_entropy_loss; in evaluation it is lm_loss, whose exponential is the perplexity.
    """

    lm_loss: Tensor | None = None
    load_balancing_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    router_entropy_loss: Tensor | None = None  # where its coefficient is not 0
    expert_counts: Tensor | None = None  # (L, E) int64: real tokens per expert of each MoE layer
    router_confidence: Tensor | None = None  # (L,) mean over real tokens of the largest probability
    token_logprobs: Tensor | None = None  # (B, S) of the label that each position predicts; 0 where there is none
    expert_probabilities: Tensor | None = None  # (L, E) "global" only: their mean probabilities, with gradient


class MiniMoeForCausalLM(MiniMoePreTrainedModel, GenerationMixin):
    """Decoder with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__(config)
        self.model = MiniMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @cache_by_its_old_name
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
        logprob_temperature: float | None = None,
        **kwargs: Any,
    ) -> MiniMoeCausalLMOutput:
        """Logits and, with labels, the losses.

        Args:
            input_ids, attention_mask, position_ids: see `MiniMoeModel.forward`.
            labels: (B, S), unshifted; IGNORE_INDEX is not learned.
            shift_labels: (B, S), the same shifted already, so that position t predicts the t-th; in place of `labels`.
            output_router_logits: return the router logits and the balance loss also without labels.
            logits_to_keep: logits of the last so many positions only (0 = all), of given positions, or of those that
                are True in a (B, S) bool tensor: then they are (N, V).
            num_items_in_batch: learned tokens of the whole optimizer step. Losses are then this call's share of the
                step's mean, so that adding up micro-batches gives exactly the mean over all tokens.
            skip_logits: with labels, return no logits, which need not be held all at once then: less time and much
                less memory.
            logprob_temperature: with labels, return `token_logprobs`, under softmax(logits / temperature). They carry
                gradient, and lm_loss is made of them.
        """
        # Not in the signature, where `Trainer` would take it for a second set of labels that every batch must have.
        shift_labels = kwargs.pop("shift_labels", None)
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
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        result = MiniMoeCausalLMOutput()
        if not (skip_logits and shift_labels is not None):
            # slice(-0, None) is everything
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            chosen = isinstance(kept, Tensor) and kept.dtype == torch.bool and kept.ndim == 2
            result.logits = self.lm_head(hidden[kept] if chosen else hidden[:, kept])
        if shift_labels is not None or output_router_logits:
            self._add_router_terms(result, outputs.routings or (), attention_mask, hidden.shape)
        if output_router_logits:
            result.router_logits = tuple(routing.logits for routing in outputs.routings or ())
        if shift_labels is not None:
            self._add_losses(result, hidden, shift_labels, num_items_in_batch, logprob_temperature)
        result.cache, result.hidden_states, result.attentions = outputs.cache, outputs.hidden_states, outputs.attentions
        # As a tuple it has the order of its fields, however it was filled.
        return MiniMoeCausalLMOutput(**result)

    def _add_router_terms(
        self,
        result: MiniMoeCausalLMOutput,
        routings: tuple[RouterOutput, ...],
        attention_mask: Tensor | None,
        shape: torch.Size,
    ) -> None:
        """Balance loss, z-loss, entropy (each averaged over layers) and expert counts, of real tokens only."""
        if not routings:
            zero = torch.zeros((), device=self.device)
            result.load_balancing_loss = result.aux_loss = result.router_z_loss = zero
            result.expert_counts = torch.zeros(0, self.config.num_router_outputs, dtype=torch.long, device=self.device)
            result.router_confidence = zero.new_zeros(0)
            return
        batch, sequence, _ = shape
        mask = real_tokens(attention_mask, sequence)
        per_sequence = batch if self.config.router_aux_loss_type == "sequence" else None
        balance = [load_balancing_loss(r.probabilities, r.expert_ids, mask, per_sequence) for r in routings]
        result.load_balancing_loss = result.aux_loss = torch.stack(balance).mean()
        result.router_z_loss = torch.stack([router_z_loss(r.logits, mask) for r in routings]).mean()
        if self.config.router_entropy_loss_coef:
            entropies = [router_entropy_loss(r.probabilities, mask) for r in routings]
            result.router_entropy_loss = torch.stack(entropies).mean()
        counts = [expert_counts(r.expert_ids, self.config.num_router_outputs, mask) for r in routings]
        result.expert_counts = torch.stack(counts)
        result.router_confidence = torch.stack([router_confidence(r.probabilities, mask) for r in routings])
        if self.config.router_aux_loss_type == "global":  # for whoever knows the counts of the other parts of the step
            result.expert_probabilities = torch.stack([mean_probabilities(r.probabilities, mask) for r in routings])

    def _add_losses(
        self,
        result: MiniMoeCausalLMOutput,
        hidden: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: Tensor | int | None,
        logprob_temperature: float | None,
    ) -> None:
        """lm_loss and the total."""
        targets = shift_labels.flatten()
        num_targets = (targets != IGNORE_INDEX).sum()
        num_items = num_targets if num_items_in_batch is None else num_items_in_batch
        if logprob_temperature is not None:
            logprobs = token_logprobs(hidden.flatten(0, 1), self.lm_head, targets, logprob_temperature)
            result.token_logprobs = logprobs.view_as(shift_labels)
            result.lm_loss = -logprobs.sum() / torch.as_tensor(num_items, device=targets.device).clamp(min=1)
        elif result.logits is not None and result.logits.shape[:-1] == shift_labels.shape:
            result.lm_loss = next_token_loss(result.logits.flatten(0, 1), targets, num_items)
        else:
            result.lm_loss = hidden_loss(hidden.flatten(0, 1), self.lm_head, targets, num_items)
        result.loss = result.lm_loss
        if not self.training:
            return
        # The router terms are means over this call's tokens; weigh them by its share of the step.
        share = num_targets / torch.as_tensor(num_items, device=targets.device).clamp(min=1)
        assert result.load_balancing_loss is not None
        assert result.router_z_loss is not None
        terms = self.config.router_aux_loss_coef * result.load_balancing_loss
        terms = terms + self.config.router_z_loss_coef * result.router_z_loss
        if result.router_entropy_loss is not None:
            terms = terms + self.config.router_entropy_loss_coef * result.router_entropy_loss
        result.loss = result.loss + share * terms


class MiniMoeForSequenceClassification(GenericForSequenceClassification, MiniMoePreTrainedModel):
    """The decoder with a score for each class of a text, from its last token."""

    new_weights = ("score.",)


class MiniMoeForTokenClassification(GenericForTokenClassification, MiniMoePreTrainedModel):
    """The decoder with a score for each class of each token."""

    new_weights = ("score.",)


def register() -> None:
    """Make `transformers`' Auto classes know minimoe; experts are split on disk."""
    # By its class name here `Trainer` knows that labels are to be shifted, and a pipeline what a model is for.
    for names, model in (
        (MODEL_MAPPING_NAMES, MiniMoeModel),
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MiniMoeForCausalLM),
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MiniMoeForSequenceClassification),
        (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, MiniMoeForTokenClassification),
    ):
        names["minimoe"] = model.__name__
        # `transformers serve` looks them up in the package. That puts a second module in its own place while it loads,
        # so they are given to all of its lazy modules.
        setattr(_LazyModule, model.__name__, model)
    AutoConfig.register("minimoe", MiniMoeConfig, exist_ok=True)
    AutoModel.register(MiniMoeConfig, MiniMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(MiniMoeConfig, MiniMoeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(MiniMoeConfig, MiniMoeForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(MiniMoeConfig, MiniMoeForTokenClassification, exist_ok=True)
    # Qwen2-MoE's mapping: mlp.experts.{e}.{gate,up,down}_proj.weight on disk, stacked in memory.
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("minimoe", mapping, overwrite=True)


register()
