"""The subjects: minimoe, its dense twin, `transformers`' Qwen3-MoE, and the literal loop.

Legend of the letters: T tokens, D hidden, k experts per token.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimoe import MiniMoeConfig, MiniMoeForCausalLM
from scripts.benchmark.shapes import Shape

PEERS = ("qwen3", "literal loop")  # are as `transformers` trains them; minimoe's loop has settings of its own


def either(*places: str) -> Any:
    """The first of these `module:name` that is there: another checkout may have it elsewhere."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"there is none of {', '.join(places)}")


class LiteralExperts(nn.Module):
    """The plainest MoE: a list of modules, and for each a boolean mask of the slots that chose it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for _ in range(shape.experts):
            sizes = {
                "gate_proj": (shape.hidden, shape.width),
                "up_proj": (shape.hidden, shape.width),
                "down_proj": (shape.width, shape.hidden),
            }
            self.experts.append(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}))

    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """tokens (T, D), expert_ids and weights (T, k) -> (T, D)."""
        num_tokens, num_slots = expert_ids.shape
        slots, flat = tokens.repeat_interleave(num_slots, dim=0), expert_ids.flatten()
        outputs = torch.empty_like(slots)
        for index, expert in enumerate(self.experts):
            rows = slots[flat == index]
            activated = F.silu(expert["gate_proj"](rows)) * expert["up_proj"](rows)  # type: ignore[index]
            outputs[flat == index] = expert["down_proj"](activated).to(outputs.dtype)  # type: ignore[index]
        outputs = outputs.view(num_tokens, num_slots, tokens.shape[1])
        return (outputs * weights[..., None]).sum(dim=1).to(tokens.dtype)


def minimoe_config(shape: Shape, **more: Any) -> MiniMoeConfig:
    return MiniMoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        moe_intermediate_size=shape.width,
        max_position_embeddings=2 * shape.sequence,
        **more,
    )


def build_model(subject: str, shape: Shape) -> Any:
    """An untrained model, the same architecture for every subject but `dense`."""
    torch.manual_seed(0)
    if subject.startswith("qwen3"):
        config = Qwen3MoeConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
            moe_intermediate_size=shape.width,
            norm_topk_prob=True,
            max_position_embeddings=2 * shape.sequence,
            tie_word_embeddings=True,
            output_router_logits=True,  # switches its balance loss on
            router_aux_loss_coef=0.01,
        )
        config._experts_implementation = "grouped_mm" if "grouped_mm" in subject else "eager"
        model = Qwen3MoeForCausalLM(config)
        if subject == "qwen3 literal loop":
            for layer in model.model.layers:
                layer.mlp.experts = LiteralExperts(shape)
        return model
    if subject == "dense":
        active = shape.k * shape.width
        return MiniMoeForCausalLM(minimoe_config(shape, first_k_dense_replace=shape.layers, intermediate_size=active))
    return MiniMoeForCausalLM(minimoe_config(shape))
