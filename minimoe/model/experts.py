"""The experts of one MoE layer: SwiGLU networks (arXiv 2002.05202) whose weights are stacked in two tensors.

T tokens, n rows, D hidden, E experts, k experts per token, I expert width.

A stack keeps every expert in the graph whether or not a token chose it, so an idle expert cannot hang data-parallel
training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from minimoe.model.config import MiniMoeConfig
from minimoe.model.dispatch import DISPATCHES


class Experts(nn.Module):
    """E functions of rows, and the dispatch path to them. `gate_up_proj` (E, 2I, D) has gate first, `down_proj` is
    (E, D, I)."""

    # What transformers' experts backends ask of the layout of the weights.
    has_gate, has_bias, has_post_expert_norm, is_transposed, is_concatenated = True, False, False, False, True
    _is_expert_parallel = False  # set on a module whose experts are shared out

    def __init__(self, config: MiniMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts  # on this rank: expert parallelism sets the local number
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.train_dispatch = DISPATCHES[config.train_dispatch]
        self.eval_dispatch = DISPATCHES[config.eval_dispatch]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, D), top_k_index and top_k_weights (T, k) -> each token's weighted experts (T, D).

        The signature is the one that `transformers`' expert parallelism and experts backends look for.
        """
        backend = self.config._experts_implementation
        if backend not in (None, "eager"):  # asked for by its name, in place of the two paths
            return ALL_EXPERTS_FUNCTIONS[backend](self, hidden_states, top_k_index, top_k_weights)
        dispatch = self.train_dispatch if self.training else self.eval_dispatch
        return dispatch(hidden_states, top_k_index, top_k_weights, self)

    @staticmethod
    def _apply_gate(gate_up: Tensor) -> Tensor:
        """(n, 2I) -> (n, I), for those backends."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        # One `unbind` a stack: its backward stacks all gradients once, where `stack[e]` would make a stack for each.
        for gate_up, down in zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True):
            yield partial(swiglu, gate_up=gate_up, down=down)


def swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on its rows: (n, D), (2I, D), (D, I) -> (n, D)."""
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
