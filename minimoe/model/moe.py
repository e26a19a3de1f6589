"""The MoE feed-forward block: a router, the experts it chooses for each token, and the experts that every token uses.

B batch, S sequence, T tokens = B*S, D hidden, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minimoe.model.config import MiniMoeConfig
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.router import ROUTERS, RouterOutput


class MoEFeedForward(nn.Module):
    """Sum of each token's k weighted experts, plus the shared experts."""

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.gate: Any = ROUTERS[config.router_type](config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size) if config.n_shared_experts else None
        )
        self.some_slots_are_open = self.gate.leaves_slots_open or config.num_zero_computation_experts > 0

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, RouterOutput]:
        """x (B, S, D) -> output (B, S, D) and what the router decided; `hash` routers want token ids (B, S)."""
        tokens = x.flatten(0, 1)  # (T, D)
        routing = self.gate(tokens, None if token_ids is None else token_ids.flatten())
        # By one of the two paths of dispatch.py.
        dispatch = self._fill_slots if self.some_slots_are_open else self.experts
        y = dispatch(tokens, routing.expert_ids, routing.weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view_as(x), routing

    def _fill_slots(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Experts for the slots that have one, each slot as a token of its own: what is open costs nothing.

        A zero-computation expert gives the token back as it is (the copy expert of MoE++, arXiv 2410.07348; LongCat-
        Flash, arXiv 2509.01322). An open slot has the weight 0.
        """
        computed = expert_ids < self.experts.config.num_experts  # (T, k)
        rows = computed.nonzero()[:, 0]  # the token of each computed slot
        slots = self.experts(tokens[rows], expert_ids[computed][:, None], weights[computed][:, None])
        copied = (weights * ~computed).sum(dim=-1, keepdim=True)  # (T, 1), float32
        y = (tokens * copied).to(torch.promote_types(tokens.dtype, weights.dtype))
        return y.index_add(0, rows, slots.to(y.dtype)).to(tokens.dtype)
