"""`python -m scripts.scale`, under torchrun: count what one step sends, by rank, for each layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.distributed import expert_parallel

from minimoe.config.training import OptimizerConfig
from minimoe.model.config import MiniMoeConfig, with_defaults
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.train.optim import build_optimizers
from minimoe.train.sharding import Layout, shard
from minimoe.train.shares import Traffic, traffic

ARCHITECTURE = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
}  # fmt: skip
ROWS, LENGTH = 2, 256


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world = dist.get_world_size()
    layouts = [Layout(1, world, 1), Layout(1, world, world)]
    if world == 4:
        layouts += [Layout(1, 4, 2), Layout(2, 2, 1), Layout(2, 2, 2)]
    for layout in layouts:
        (counted, muon), expected = count(layout), traffic(with_defaults(ARCHITECTURE), layout, ROWS * LENGTH, 1, 4)
        total = torch.tensor([*counted, muon], dtype=torch.float64)
        dist.all_reduce(total)
        *kinds, muon = (total / world).tolist()
        mean = Traffic(*kinds)
        if dist.get_rank() == 0:
            found, wanted = sum(mean), sum(expected)
            print(f"| {world} ranks: {layout} | {found / 1e6:.2f} | {wanted / 1e6:.2f} | {wanted / found - 1:+.1%} |")
            parts = zip(Traffic._fields, mean, expected, strict=True)
            print("  " + ", ".join(f"{name} {a / 1e6:.2f} ({b / 1e6:.2f})" for name, a, b in parts), end="")
            print(f"; with Muon {muon / 1e6:.2f} more", flush=True)
    dist.destroy_process_group()


def count(layout: Layout) -> tuple[Traffic, float]:
    """What this rank sends in one step, and by Muon in addition.

    Rings send (n-1)/n of what is gathered, twice that of what is reduced.
    """
    torch.manual_seed(0)
    model = shard(MiniMoeForCausalLM(MiniMoeConfig(**ARCHITECTURE)), layout).train()
    sent = dict.fromkeys(Traffic._fields, 0.0)
    ids = torch.randint(0, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))

    def ring(tensor: Tensor, group: Any, turns: int) -> float:
        size = dist.get_world_size(group)
        return turns * tensor.numel() * tensor.element_size() * (size - 1) / size

    def counting(place: Any, name: str, kind: str, size: Callable[..., float]) -> None:
        original = getattr(place, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            sent[kind] += size(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(place, name, call)
        undo.append(lambda: setattr(place, name, original))

    undo: list[Callable[[], None]] = []
    for name in ("all_gather_single", "all_gather_into_tensor"):  # torch's newer name, and its older one
        if hasattr(dist, name):
            counting(
                dist, name, "weights",
                lambda *a, output_tensor=None, group=None, **k: ring(a[0] if a else output_tensor, group, 1),
            )  # fmt: skip
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            counting(
                dist, name, "weights",
                lambda *a, input=None, group=None, **k: ring(a[1] if len(a) > 1 else input, group, 1),
            )  # fmt: skip
    counting(dist, "all_reduce", "replicas", lambda tensor, *a, group=None, **k: ring(tensor, group, 2))
    rank = dist.get_rank

    def to_others(rows: Tensor, received: list[int], send: list[int], group: Any) -> float:
        mine = rank(group)
        others = sum(size for place, size in enumerate(send) if place != mine)
        back = sum(size for place, size in enumerate(received) if place != mine)  # the gradients of what came
        return (others + back) * rows.shape[1] * rows.element_size()

    counting(expert_parallel, "all_to_all_single_autograd", "tokens", to_others)
    try:
        model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    finally:
        for each in undo:
            each()
    return Traffic(**sent), _sent_by_muon(model)


def _sent_by_muon(model: Any) -> float:
    """Bytes that this rank sends in a step of the optimizer: rows of matrices to their owners, and back."""
    sent, original = 0.0, dist.all_to_all_single

    @functools.wraps(original)
    def call(received: Tensor, rows: Tensor, received_sizes: list[int], sizes: list[int], group: Any) -> Any:
        nonlocal sent
        mine = dist.get_rank(group)
        sent += rows.element_size() * sum(size for place, size in enumerate(sizes) if place != mine)
        return original(received, rows, received_sizes, sizes, group=group)

    setattr(dist, "all_to_all_single", call)  # noqa: B010  (mypy knows its type)
    try:
        for optimizer in build_optimizers(model, OptimizerConfig(name="muon")):
            optimizer.step()
    finally:
        setattr(dist, "all_to_all_single", original)  # noqa: B010
    return sent


if __name__ == "__main__":
    main()
