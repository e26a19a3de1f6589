"""The MoE feed-forward block: router, one of two dispatch paths chosen by `self.training`, shared experts.

B batch, S sequence, T tokens = B*S, D hidden, k experts per token.
"""

from __future__ import annotations

from torch import Tensor, nn

from minimoe.model.config import MiniMoeConfig
from minimoe.model.dispatch import DISPATCHES
from minimoe.model.experts import Experts
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.router import RouterOutput, TopKRouter


class MoEFeedForward(nn.Module):
    """Sum of each token's k weighted experts, plus the shared experts that every token uses."""

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.gate = TopKRouter(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = (
            SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size) if config.n_shared_experts else None
        )
        self.train_dispatch = DISPATCHES[config.train_dispatch]
        self.eval_dispatch = DISPATCHES[config.eval_dispatch]

    def forward(self, x: Tensor) -> tuple[Tensor, RouterOutput]:
        """x (B, S, D) -> output (B, S, D) and what the router decided."""
        tokens = x.flatten(0, 1)  # (T, D)
        routing = self.gate(tokens)
        dispatch = self.train_dispatch if self.training else self.eval_dispatch
        y = dispatch(tokens, routing.expert_ids, routing.weights, self.experts)  # (T, D)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view_as(x), routing
