"""Models of a few thousand parameters, whose weights are large enough that every part shows in the output."""

from __future__ import annotations

from typing import Any

import torch

from minimoe.model.config import MiniMoeConfig
from minimoe.model.experts import Experts
from minimoe.model.language_model import MiniMoeForCausalLM


def tiny_config(**overrides: Any) -> MiniMoeConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "router_aux_loss_coef": 0.01,
    }
    return MiniMoeConfig(**(values | overrides))


def tiny_model(seed: int = 0, **overrides: Any) -> MiniMoeForCausalLM:
    torch.manual_seed(seed)
    model = MiniMoeForCausalLM(tiny_config(**overrides))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected value, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def tiny_experts(num_experts: int, hidden_size: int, width: int, std: float = 0.3) -> Experts:
    experts = Experts(tiny_config(num_experts=num_experts, hidden_size=hidden_size, moe_intermediate_size=width))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return experts
