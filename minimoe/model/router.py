"""Routers: which experts a token uses, and with what weight. `model.router_type` names one of `ROUTERS`.

T tokens, D hidden, E experts, k experts per token, R router outputs = E + zero-computation experts, V vocabulary.

Scores: `softmax`, Switch/Mixtral/Qwen3-MoE style probabilities; `sigmoid`, independent affinities with a per-expert
selection bias that picks experts but never weighs them (DeepSeek-V3, arXiv 2412.19437; aux-loss-free balancing,
arXiv 2408.15664). All but `top_k` take softmax scores alone, and are for research: other programs do not know them.

A router that leaves some of a token's slots open gives them the id R and the weight 0.
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

    logits: Tensor  # (T, R)
    probabilities: Tensor  # (T, R), rows sum to 1: what the balance loss looks at
    expert_ids: Tensor  # (T, k) int64; E and above compute nothing
    weights: Tensor  # (T, k): what the expert outputs are multiplied by


class TopKRouter(nn.Module):
    """Every token picks the k experts with the largest scores. Float32 logits, autocast or not."""

    leaves_slots_open = False

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.num_outputs = config.num_router_outputs
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_outputs, config.hidden_size))
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(self.num_outputs, dtype=torch.float32))

    def forward(self, tokens: Tensor, token_ids: Tensor | None = None) -> RouterOutput:
        """Route tokens (T, D); their ids (T,) are for `HashRouter`."""
        with without_autocast(tokens):
            logits = self.compute_logits(tokens)
            if self.scoring_func == "softmax":
                scores = selection = probabilities = logits.softmax(dim=-1)
            else:
                scores = logits.sigmoid()
                selection = scores + self.get_buffer("e_score_correction_bias")
                probabilities = scores / scores.sum(dim=-1, keepdim=True)
            expert_ids = self.choose(selection)
            if self.leaves_slots_open:
                scores = F.pad(scores, (0, 1))  # 0 for the id R
            weights = scores.gather(1, expert_ids)
            if self.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            weights = weights * self.routed_scaling_factor
        return RouterOutput(logits, probabilities, expert_ids, weights)

    def compute_logits(self, tokens: Tensor) -> Tensor:
        """(T, D) -> (T, R)."""
        return router_logits(tokens, self.weight)

    def choose(self, selection: Tensor) -> Tensor:
        """Scores (T, R) -> expert ids (T, k)."""
        return selection.topk(self.num_experts_per_tok, dim=-1).indices

    @torch.no_grad()
    def update_selection_bias(self, counts: Tensor, rate: float) -> None:
        """Make overloaded experts less likely to be picked, and idle ones more.

        Args:
            counts: (R,) tokens per expert of one optimizer step, summed over micro-batches and processes.
            rate: step size, in units of the sigmoid score.
        """
        load = counts.to(torch.float32)
        bias = self.get_buffer("e_score_correction_bias")
        bias += rate * torch.sign(load.mean() - load)
        bias -= bias.mean()  # what all have in common changes no choice, and would drift


class NoisyTopKRouter(TopKRouter):
    """Top-k of logits with noise of a learned size, in training (Shazeer et al., arXiv 1701.06538, equations 3 to 5).

    With `norm_topk_prob` the weights are the paper's: the softmax over the k largest logits.
    """

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__(config)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    def compute_logits(self, tokens: Tensor) -> Tensor:
        logits = super().compute_logits(tokens)
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(router_logits(tokens, self.noise_weight))


class TopPRouter(TopKRouter):
    """As few experts as together have the probability `router_top_p`, and k at most (Huang et al., arXiv 2403.07652,
    equations 3 and 4): a token that the router is sure of costs less. The paper's weights are those without
    `norm_topk_prob`."""

    leaves_slots_open = True

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__(config)
        self.top_p = config.router_top_p

    def choose(self, selection: Tensor) -> Tensor:
        probabilities, expert_ids = selection.topk(self.num_experts_per_tok, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # of the experts that come first; 0 for the first
        return expert_ids.masked_fill(before >= self.top_p, self.num_outputs)


class ExpertChoiceRouter(TopKRouter):
    """Every expert picks the T*k/E tokens that score it highest, so that all have equal work (Zhou et al., arXiv
    2202.09368). The paper's weights are those without `norm_topk_prob`.

    In training alone: which tokens are picked depends on all tokens of the call, later ones too, and such a choice
    cannot be made while generating. In evaluation every token picks its k experts.
    """

    leaves_slots_open = True

    def choose(self, selection: Tensor) -> Tensor:
        if not self.training:
            return super().choose(selection)
        num_tokens, num_experts = selection.shape
        capacity = -(-num_tokens * self.num_experts_per_tok // num_experts)  # rounded up
        picked = torch.zeros_like(selection, dtype=torch.bool)
        picked.scatter_(0, selection.topk(capacity, dim=0).indices, True)  # (T, E)
        most = int(picked.sum(dim=1).max())  # experts that picked the same token
        scores, expert_ids = selection.masked_fill(~picked, -1.0).topk(most, dim=-1)
        return expert_ids.masked_fill(scores < 0, self.num_outputs)


class HashRouter(nn.Module):
    """A fixed choice by the token's id: k different experts, drawn once for each entry of the vocabulary and for each
    layer, each weighted 1/k (Roller et al., arXiv 2106.04426, its random hash). Nothing is learned."""

    leaves_slots_open = False

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.num_outputs = config.num_experts
        self.routed_scaling_factor = config.routed_scaling_factor
        self.register_buffer(
            "experts_of_token", torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
        )

    def draw(self) -> Tensor:
        """A new table (V, k): every row k different experts."""
        size, k = self.get_buffer("experts_of_token").shape
        return torch.rand(size, self.num_outputs).topk(k, dim=-1).indices

    def forward(self, tokens: Tensor, token_ids: Tensor | None = None) -> RouterOutput:
        """Route tokens (T, D) by their ids (T,)."""
        if token_ids is None:
            raise ValueError("router_type: hash chooses by token ids; give input_ids, not inputs_embeds")
        expert_ids = self.get_buffer("experts_of_token")[token_ids]
        weights = torch.full(expert_ids.shape, self.routed_scaling_factor / expert_ids.shape[1], device=tokens.device)
        logits = torch.zeros(len(tokens), self.num_outputs, device=tokens.device)
        probabilities = logits.scatter(1, expert_ids, 1 / expert_ids.shape[1])
        return RouterOutput(logits, probabilities, expert_ids, weights)


ROUTERS: dict[str, type[TopKRouter] | type[HashRouter]] = {
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "top_p": TopPRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
}


@accelerated
def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens (T, D), weight (R, D) -> (T, R) in float32, whatever their dtypes."""
    return F.linear(tokens.float(), weight.float())
