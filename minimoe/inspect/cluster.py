"""What a run would take on a cluster that is not here: memory, traffic and time of each GPU, from formulas.

None of it is measured. docs/scale.md derives the formulas and says how well they meet what is. R = replicate_size,
F = fsdp_size, X = expert_size; a ring of n ranks sends (n-1)/n of a tensor to gather it, as much to reduce and scatter
it, and twice as much to reduce it everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minimoe.errors import UserError
from minimoe.model.costs import head_dim, parameters_by_part, training_flops
from minimoe.train.sharding import Layout

PER_NODE = 8


class Gpu(NamedTuple):
    """As its maker states: dense bf16 operations a second, bytes of memory, one direction of its links."""

    flops: float
    memory: float
    inside: float  # bytes a second to the GPUs of the same node
    outside: float  # to other nodes


GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 180e9, 900e9, 50e9),
    "rtx4090": Gpu(165e12, 24e9, 25e9, 12e9),
}
UTILISATION = 0.35  # of those operations that a training step is taken to reach, without what it waits for


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
    replicas, fsdp, shared = layout
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


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


@dataclass
class Estimate:
    """Of one GPU and one optimizer step. Bytes and seconds."""

    gpus: int
    gpu: str
    layout: Layout
    memory: dict[str, float]  # by kind
    traffic: Traffic
    compute_seconds: float
    weights_seconds: float  # of traffic that overlaps with computing
    tokens_seconds: float  # of traffic that is waited for
    fits: bool

    @property
    def step_seconds(self) -> float:
        """Weights travel while the layers before them compute; tokens are waited for."""
        return max(self.compute_seconds, self.weights_seconds) + self.tokens_seconds

    @property
    def memory_bytes(self) -> float:
        """All kinds together."""
        return sum(self.memory.values())


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


def estimate(values: Mapping[str, Any], work: Work, gpus: int, gpu: str, layout: Layout) -> Estimate:
    """What each GPU would hold, send and take, with autocast to bf16 and float32 weights as trained here."""
    kind = GPUS[gpu]
    tokens, micros = work.on(gpus)
    sent = traffic(values, layout, tokens, micros, 2, work.recomputed)
    memory = _memory(values, work, tokens, layout)
    flops = training_flops(values, work.length) * (4 / 3 if work.recomputed else 1)
    # A group of ranks beyond one node sends as fast as the link between nodes.
    within = layout.fsdp_size <= PER_NODE
    weights = sent.weights / (kind.inside if within else kind.outside)
    replicas = sent.replicas / (kind.inside if gpus <= PER_NODE else kind.outside)
    return Estimate(
        gpus,
        gpu,
        layout,
        memory,
        sent,
        compute_seconds=flops * tokens * micros / (kind.flops * UTILISATION),
        weights_seconds=weights + replicas,
        tokens_seconds=sent.tokens / (kind.inside if layout.expert_size <= PER_NODE else kind.outside),
        fits=sum(memory.values()) <= 0.9 * kind.memory,
    )


def _memory(values: Mapping[str, Any], work: Work, tokens: int, layout: Layout) -> dict[str, float]:
    """Bytes of one rank."""
    parts = parameters_by_part(values)
    total, experts, layers = sum(parts.values()), parts["routed experts"], values["num_hidden_layers"]
    ends = parts["embedding"] + parts["output head"]
    matrices = total - ends - parts["routers"] - parts["norms"]
    moments = 8 * total if work.optimizer == "adamw" else 4 * matrices + 8 * (total - matrices)
    layer = (total - experts - ends + experts / layout.expert_size) / layers
    shared_out = layout.fsdp_size > 1
    width, heads = values["hidden_size"], values["num_attention_heads"] + values["num_key_value_heads"]
    chosen = values["num_experts_per_tok"] + values["n_shared_experts"]
    # Two float32 residuals and two norms in bf16; queries, keys, values and their output; of each expert its input,
    # gate, up and their product.
    inside = 12 * width + 4 * head_dim(values) * heads + 2 * chosen * (width + 3 * values["moe_intermediate_size"])
    kept = 4 * width * layers + inside if work.recomputed else inside * layers
    return {
        "weights": 4 * total / layout.fsdp_size,
        "gradients": 4 * total / layout.fsdp_size,
        "moments": moments / layout.fsdp_size,
        # Two layers' weights, as the next is gathered meanwhile, and one's gradients; both ends' all along.
        "gathered": (3 * 4 * layer + 2 * 4 * ends) if shared_out else 0.0,
        "activations": float(kept * tokens),
    }


def choose(values: Mapping[str, Any], work: Work, gpus: int, gpu: str) -> Estimate:
    """The layout with the least time of those that fit; if none does, the one with the least memory."""
    found = [estimate(values, work, gpus, gpu, layout) for layout in layouts(gpus, values["num_experts"])]
    fitting = [one for one in found if one.fits]
    if fitting:
        return min(fitting, key=lambda one: (one.step_seconds, one.memory_bytes))
    return min(found, key=lambda one: one.memory_bytes)


def layouts(gpus: int, num_experts: int) -> list[Layout]:
    """All that divide so many ranks; experts are shared out within a node."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    return [
        Layout(gpus // fsdp, fsdp, shared)
        for fsdp in sizes
        for shared in (1, 2, 4, 8)
        if fsdp % shared == 0 and num_experts % shared == 0
    ]


def check_cluster(gpus: int, gpu: str, rows: int) -> None:
    """Raises:
    UserError: no such GPU, or not a row for each.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu} is not known", fix=f"one of {', '.join(GPUS)}")
    if rows % gpus:
        raise UserError(
            f"train.batch_size {rows} is no multiple of {gpus} GPUs", fix=f"train.batch_size={-(-rows // gpus) * gpus}"
        )
