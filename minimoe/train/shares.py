"""What each rank of a layout holds, and sends in an optimizer step: formulas.

docs/scale.md derives them and says how well they meet what was counted. R = replicate_size, F = fsdp_size, X =
expert_size; a ring of n ranks sends (n-1)/n of a tensor to gather it, as much to reduce and scatter it, and twice as
much to reduce it everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from minimoe.model.costs import head_dim, parameters_by_part
from minimoe.train.sharding import Layout


class Work(NamedTuple):
    """What a step of a run is, on all ranks together."""

    rows: int
    length: int  # tokens of a row
    micro_rows: int | None  # rows of one forward pass on a rank; None: all of a rank's
    optimizer: str  # adamw or muon
    recomputed: bool  # gradient checkpointing

    def on(self, ranks: int) -> tuple[int, int]:
        """Tokens of a micro-batch on a rank, and how many micro-batches a rank has."""
        rows = max(self.rows // ranks, 1)
        micro = min(self.micro_rows or rows, rows)
        return micro * self.length, -(-rows // micro)


class Traffic(NamedTuple):
    """Bytes that one rank sends in an optimizer step."""

    weights: float  # gathered and their gradients reduced, within a replica
    replicas: float  # gradients, between replicas
    tokens: float  # to their experts and back


def traffic(
    values: Mapping[str, Any],
    layout: Layout,
    tokens: int,
    micro_batches: int,
    activation_bytes: int,
    recomputed: bool = False,
) -> Traffic:
    """Of a layout (R, F, X).

    Args:
        tokens: of one micro-batch on one rank.
        activation_bytes: of a value that travels: 2 in bf16, 4 in fp32.
    """
    replicas, fsdp, shared = layout[:3]
    parts = parameters_by_part(values)
    experts = parts["routed experts"]
    dense = sum(parts.values()) - experts
    copies = fsdp // shared  # ranks that hold the same experts, and share them out
    kept = parts["embedding"] + parts["output head"]  # not gathered again in backward
    gathered = 3 * dense - kept
    weights = gathered * _ring(fsdp) + 3 * experts / shared * _ring(copies)
    between = 2 * (dense + experts) / fsdp * _ring(replicas)
    rounds = 1 if fsdp == 1 else micro_batches  # copies reduce the sum of their micro-batches
    moe_layers = values["num_hidden_layers"] - min(values["first_k_dense_replace"], values["num_hidden_layers"])
    passes = 6 if recomputed else 4  # to the experts and back, and both again in backward
    travelling = passes * moe_layers * tokens * values["num_experts_per_tok"] * values["hidden_size"] * _ring(shared)
    return Traffic(
        4.0 * micro_batches * weights,
        4.0 * rounds * between,
        float(micro_batches * activation_bytes * travelling),
    )


def held_by_gpu(held: Mapping[str, float], layout: Layout) -> dict[str, float]:
    """Of what a rank holds: all, or what its host does not keep for it."""
    kept = ("weights", "gradients", "moments") if layout.cpu_offload else ()
    return {kind: size for kind, size in held.items() if kind not in kept}


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def memory(
    values: Mapping[str, Any], work: Work, tokens: int, layout: Layout, activation_bytes: int
) -> dict[str, float]:
    """Bytes of one rank by kind; `tokens` of a micro-batch."""
    parts = parameters_by_part(values)
    total, experts, layers = sum(parts.values()), parts["routed experts"], values["num_hidden_layers"]
    ends = parts["embedding"] + parts["output head"]
    matrices = total - ends - parts["routers"] - parts["norms"]
    moments = 8 * total if work.optimizer == "adamw" else 4 * matrices + 8 * (total - matrices)
    layer = (total - experts - ends + experts / layout.expert_size) / layers
    shared_out = layout.fsdp_size > 1
    width, heads = values["hidden_size"], values["num_attention_heads"] + values["num_key_value_heads"]
    chosen = values["num_experts_per_tok"] + values["n_shared_experts"]
    # Two float32 residuals and two norms; queries, keys, values and their output; of each expert its input, gate, up
    # and their product.
    small = 2 * width + 2 * head_dim(values) * heads + chosen * (width + 3 * values["moe_intermediate_size"])
    inside = 8 * width + activation_bytes * small
    kept = 4 * width * layers + inside if work.recomputed else inside * layers
    return {
        "weights": 4 * total / layout.fsdp_size,
        "gradients": 4 * total / layout.fsdp_size,
        "moments": moments / layout.fsdp_size,
        # Two layers' weights, as the next is gathered meanwhile, and one's gradients; both ends' all along.
        "gathered": (3 * 4 * layer + 2 * 4 * ends) if shared_out else 0.0,
        "activations": float(kept * tokens),
    }
