"""What a run would take on a cluster that is not here: memory, traffic and time of each GPU, from formulas.

None of it is measured. What a rank holds and sends is in train/shares.py; here are the machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minimoe.errors import UserError
from minimoe.model.costs import training_flops
from minimoe.train.sharding import Layout
from minimoe.train.shares import Traffic, Work, held_by_gpu, memory, traffic

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
HOST_LINK = 25e9  # bytes a second between a GPU and its host: PCIe 4.0 with 16 lanes, of 32 in theory
UTILISATION = 0.35  # of those operations that a training step is taken to reach, without what it waits for


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
        """All kinds together that the GPU holds."""
        return sum(held_by_gpu(self.memory, self.layout).values())


def estimate(values: Mapping[str, Any], work: Work, gpus: int, gpu: str, layout: Layout) -> Estimate:
    """What each GPU would hold, send and take, with autocast to bf16 and float32 weights as trained here."""
    kind = GPUS[gpu]
    tokens, micros = work.on(gpus)
    sent = traffic(values, layout, tokens, micros, 2, work.recomputed)
    held = memory(values, work, tokens, layout, 2)
    flops = training_flops(values, work.length) * (4 / 3 if work.recomputed else 1)
    # A group of ranks beyond one node sends as fast as the link between nodes.
    within = layout.fsdp_size <= PER_NODE
    weights = sent.weights / (kind.inside if within else kind.outside)
    if layout.cpu_offload:  # fetched for both passes, and gradients back
        weights += micros * (2 * held["weights"] + held["gradients"]) / HOST_LINK
    replicas = sent.replicas / (kind.inside if gpus <= PER_NODE else kind.outside)
    return Estimate(
        gpus,
        gpu,
        layout,
        held,
        sent,
        compute_seconds=flops * tokens * micros / (kind.flops * UTILISATION),
        weights_seconds=weights + replicas,
        tokens_seconds=sent.tokens / (kind.inside if layout.expert_size <= PER_NODE else kind.outside),
        fits=sum(held_by_gpu(held, layout).values()) <= 0.9 * kind.memory,
    )


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
