"""What an architecture costs, by arithmetic alone: parameters and floating-point operations, part by part.

Operations count a multiplication and an addition as two, as the field does (PaLM, arXiv 2204.02311, appendix B). The
backward pass takes twice those of the forward pass. Attention counts the half of its scores that the causal mask
leaves. Norms, rotary angles, softmaxes and the embedding's lookup are left out: below 1 % of any model here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINING = 3  # forward, and backward at twice its cost


def head_dim(values: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]


def parameters_by_part(values: Mapping[str, Any], *, active: bool = False) -> dict[str, int]:
    """Parameters of each part over all layers.

    Args:
        values: a whole architecture, defaults filled in.
        active: of the routed experts only those that a token chooses, at most.
    """
    hidden, layers = values["hidden_size"], values["num_hidden_layers"]
    heads = values["num_attention_heads"] + values["num_key_value_heads"]
    dense = min(values["first_k_dense_replace"], layers)
    expert = 3 * hidden * values["moe_intermediate_size"]
    embedding = values["vocab_size"] * hidden
    head_norms = 2 * head_dim(values) if values["use_qk_norm"] else 0
    return {
        "embedding": embedding,
        "output head": 0 if values["tie_word_embeddings"] else embedding,
        "attention": layers * 2 * hidden * head_dim(values) * heads,
        "routed experts": (layers - dense) * values["num_experts_per_tok" if active else "num_experts"] * expert,
        "shared experts": (layers - dense) * values["n_shared_experts"] * expert,
        "routers": (layers - dense) * hidden * _router_rows(values),
        "dense feed-forward": dense * 3 * hidden * values["intermediate_size"],
        "norms": layers * (2 * hidden + head_norms) + hidden,
    }


def _router_rows(values: Mapping[str, Any]) -> int:
    """Rows of a router's matrices: a noisy one has two, a hash has none."""
    matrices = {"noisy_top_k": 2, "hash": 0}.get(values["router_type"], 1)
    return matrices * (values["num_experts"] + values["num_zero_computation_experts"])


def flops_by_part(values: Mapping[str, Any], sequence_length: int) -> dict[str, int]:
    """Operations of one token's forward pass in a document as long as the row."""
    parts = parameters_by_part(values, active=True)
    matmuls = {name: 2 * parts[name] for name in parts if name not in ("embedding", "output head", "norms")}
    width = values["num_attention_heads"] * head_dim(values)
    # Scores and their sum of values: two matmuls with the (S + 1) / 2 positions that a token sees on average.
    scores = values["num_hidden_layers"] * 2 * 2 * width * (sequence_length + 1) // 2
    return matmuls | {"attention scores": scores, "output head": 2 * values["vocab_size"] * values["hidden_size"]}


def training_flops(values: Mapping[str, Any], sequence_length: int) -> int:
    """Operations of training on one token."""
    return TRAINING * sum(flops_by_part(values, sequence_length).values())
