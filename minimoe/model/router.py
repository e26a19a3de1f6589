"""Top-k router: which experts a token uses, and with what weight.

T tokens, D hidden, E experts, k experts per token.

`softmax`: Switch/Mixtral/Qwen3-MoE style probabilities. `sigmoid`: independent affinities with a per-expert
selection bias that picks experts but never weighs them (DeepSeek-V3, arXiv 2412.19437; aux-loss-free balancing,
arXiv 2408.15664).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model.config import MiniMoeConfig
from minimoe.ops import accelerated, without_autocast


class RouterOutput(NamedTuple):
    """What one layer's router decided. Everything is float32 but the ids."""

    logits: Tensor  # (T, E)
    probabilities: Tensor  # (T, E), rows sum to 1: what the balance loss looks at
    expert_ids: Tensor  # (T, k) int64
    weights: Tensor  # (T, k): what the expert outputs are multiplied by


class TopKRouter(nn.Module):
    """Linear router over float32 logits, autocast or not."""

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> RouterOutput:
        """Route tokens (T, D)."""
        with without_autocast(tokens):
            logits = router_logits(tokens, self.weight)
            if self.scoring_func == "softmax":
                scores = selection = probabilities = logits.softmax(dim=-1)
            else:
                scores = logits.sigmoid()
                selection = scores + self.get_buffer("e_score_correction_bias")
                probabilities = scores / scores.sum(dim=-1, keepdim=True)
            expert_ids = selection.topk(self.num_experts_per_tok, dim=-1).indices
            weights = scores.gather(1, expert_ids)
            if self.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            weights = weights * self.routed_scaling_factor
        return RouterOutput(logits, probabilities, expert_ids, weights)

    @torch.no_grad()
    def update_selection_bias(self, counts: Tensor, rate: float) -> None:
        """Make overloaded experts less likely to be picked, and idle ones more.

        Args:
            counts: (E,) tokens per expert of one optimizer step, summed over micro-batches and processes.
            rate: step size, in units of the sigmoid score.
        """
        load = counts.to(torch.float32)
        bias = self.get_buffer("e_score_correction_bias")
        bias += rate * torch.sign(load.mean() - load)
        bias -= bias.mean()  # what all have in common changes no choice, and would drift


@accelerated
def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens (T, D), weight (E, D) -> (T, E) in float32, whatever their dtypes."""
    return F.linear(tokens.float(), weight.float())
