"""The MoE feed-forward block: a router, the experts it chooses for each token, and the experts that every token uses.

B batch, S sequence, T tokens = B*S, D hidden, k experts per token.
"""

from __future__ import annotations

from torch import Tensor, nn

from minimoe.model.config import MiniMoeConfig
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.router import RouterOutput, TopKRouter


class MoEFeedForward(nn.Module):
    """Sum of each token's k weighted experts, plus the shared experts."""

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.gate = TopKRouter(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size) if config.n_shared_experts else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, RouterOutput]:
        """x (B, S, D) -> output (B, S, D) and what the router decided."""
        tokens = x.flatten(0, 1)  # (T, D)
        routing = self.gate(tokens)
        y = self.experts(tokens, routing.expert_ids, routing.weights)  # by one of the two paths of dispatch.py
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view_as(x), routing
