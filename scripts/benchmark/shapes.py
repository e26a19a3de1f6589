"""The models and batches that are measured."""

from __future__ import annotations

from dataclasses import dataclass

from minimoe.model.config import with_defaults
from minimoe.model.costs import training_flops


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    experts: int = 4
    width: int = 1408  # of one expert
    k: int = 2  # experts per token
    vocabulary: int = 6400
    batch: int = 8
    sequence: int = 512
    kv_heads: int = 2
    head_dim: int = 64

    def active_matrix_parameters(self) -> int:
        """Matrix entries that one token is multiplied with."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        feed_forward = self.k * 3 * self.hidden * self.width + self.experts * self.hidden
        return self.layers * (attention + feed_forward) + self.vocabulary * self.hidden

    def step_flops(self) -> float:
        """Floating-point operations of forward and backward."""
        values = {"vocab_size": self.vocabulary, "hidden_size": self.hidden, "num_hidden_layers": self.layers}
        values |= {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        values |= {"num_experts": self.experts, "num_experts_per_tok": self.k, "moe_intermediate_size": self.width}
        return self.batch * self.sequence * training_flops(with_defaults(values), self.sequence)


SHAPES = {
    "few": Shape(),
    "fine": Shape(experts=32, width=256, k=4),
    "tiny": Shape(layers=4, hidden=256, heads=4, experts=8, width=384, vocabulary=4096),
}
# The model of configs/quickstart/pretrain.yaml
QUICKSTART = Shape(layers=4, hidden=192, heads=4, experts=8, width=128, vocabulary=2048, batch=4)
GPU_SHAPES = {
    "gpu-768": Shape(hidden=768, heads=12, width=2048, k=1, batch=64, kv_heads=4),
    "gpu-fine": Shape(hidden=1024, heads=16, experts=64, width=512, k=8, batch=64, kv_heads=4),
}
