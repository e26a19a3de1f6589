"""A model sharded over ranks: who holds what, and what training must do differently then.

The engine is `transformers`' (`DistributedConfig`: FSDP2, HSDP and expert parallelism on torch's DTensor), not ours.
R ranks = replicate_size x fsdp_size. Every rank has its own rows of the batch. The ranks of a replica share out the
weights; with `expert_size` experts stay on their ranks, E / expert_size on each, and tokens travel to them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from minimoe.config import ParallelConfig, TrainConfig
from minimoe.errors import UserError


class Layout(NamedTuple):
    """Sizes that multiply to the number of ranks, and how many ranks share out the experts."""

    replicate_size: int
    fsdp_size: int
    expert_size: int
    cpu_offload: bool = False

    def __str__(self) -> str:
        if self.fsdp_size == 1:
            return f"{self.replicate_size} copies"
        parts = [f"{self.replicate_size} replicas" if self.replicate_size > 1 else "", f"sharded over {self.fsdp_size}"]
        parts.append(f"experts over {self.expert_size}" if self.expert_size > 1 else "")
        parts.append("kept by the host" if self.cpu_offload else "")
        return ", ".join(part for part in parts if part)


def resolve(parallel: ParallelConfig, world: int) -> Layout:
    """The sizes for so many ranks.

    Raises:
        UserError: they do not fit, with those that would.
    """
    replicas = parallel.replicate_size
    if world % replicas:
        raise UserError(
            f"parallel.replicate_size {replicas} does not divide the {world} ranks",
            fix=f"set it to one of {_divisors(world)}",
        )
    fsdp = world // replicas if parallel.fsdp_size == "auto" else parallel.fsdp_size
    if replicas * fsdp != world:
        raise UserError(
            f"parallel.replicate_size {replicas} x parallel.fsdp_size {fsdp} are not the {world} ranks",
            fix=f"set parallel.fsdp_size to {world // replicas} or auto, or start {replicas * fsdp} ranks",
        )
    if fsdp % parallel.expert_size:
        raise UserError(
            f"parallel.expert_size {parallel.expert_size} does not divide parallel.fsdp_size {fsdp}",
            fix=f"set it to one of {_divisors(fsdp)}",
        )
    if parallel.cpu_offload and world > 1 and (fsdp == 1 or parallel.expert_size > 1):
        raise UserError(
            "parallel.cpu_offload is for weights that ranks share out and gather, which "
            + ("copies do not" if fsdp == 1 else f"experts over {parallel.expert_size} ranks are not"),
            fix="set parallel.fsdp_size to more than 1 and parallel.expert_size to 1, or leave cpu_offload out",
        )
    if world == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # what is left of an elastic run goes on alone
        raise UserError(
            "parallel: is for several ranks, and there is one",
            fix="start it by torchrun --nproc_per_node N -m minimoe.cli, or leave the section out",
        )
    return Layout(replicas, fsdp, parallel.expert_size, parallel.cpu_offload and world > 1)


def check_sharding(layout: Layout, model_config: Any, train: TrainConfig) -> None:
    """Whether model and batch can be shared out.

    Raises:
        UserError: not evenly, or some experts are to be left alone.
    """
    world, experts = layout.replicate_size * layout.fsdp_size, model_config.num_experts
    if experts % layout.expert_size:
        raise UserError(
            f"parallel.expert_size {layout.expert_size} does not divide model.num_experts {experts}",
            fix=f"set it to one of {[size for size in _divisors(layout.fsdp_size) if experts % size == 0]}",
        )
    fewest, most = train.batch_size // world, -(-train.batch_size // world)  # rows of a rank
    micro = train.micro_rows(world)
    if not fewest or -(-fewest // micro) != -(-most // micro):
        raise UserError(
            f"train.batch_size {train.batch_size} gives some of the {world} ranks more micro-batches than others",
            fix=f"set it to {most * world}, or leave train.micro_batch_size out",
        )
    if model_config.frozen_experts:
        raise UserError("frozen_experts are not kept in sharded training", fix="leave parallel: out")


def distributed_config(layout: Layout) -> DistributedConfig | None:
    """What `transformers` calls a layout; None for one rank."""
    if layout.replicate_size * layout.fsdp_size == 1:
        return None
    return DistributedConfig(
        fsdp_size=layout.fsdp_size,
        dp_replicate_size=layout.replicate_size,
        ep_size=layout.expert_size,
        fsdp_cpu_offload=layout.cpu_offload,
    )


def shard(model: Any, layout: Layout) -> Any:
    """Shard a model in place; every rank has the same weights, or none yet, and keeps its part."""
    if layout.replicate_size * layout.fsdp_size == 1:
        return model
    config, _, mesh = type(model).prepare_distribute_model(distributed_config(layout))
    model = type(model).maybe_distribute_model(model, config, mesh)
    model.tie_weights()
    del model.config.distributed_config  # of this run, and not of the model that it saves
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether other ranks hold parts of it: a forward pass is then a collective."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Let ranks call a sharded model different numbers of times, without gradients.

    A forward pass is a collective. A rank that is done goes along, with passes of one token, until all are done.
    """
    if not is_sharded(model):
        yield
        return
    device = model.device

    def any_goes_on(mine: bool) -> bool:
        count = torch.tensor(int(mine), device=device)
        dist.all_reduce(count)
        return bool(count)

    def announce(*_: Any) -> None:
        any_goes_on(True)

    @torch.no_grad()
    def one_token() -> None:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)

    one_token()  # FSDP keeps the memory of its first pass, and that of inference mode would be refused in training
    hook = model.register_forward_pre_hook(announce, prepend=True)  # before the weights are asked for
    try:
        yield
    finally:
        hook.remove()
    while any_goes_on(False):
        one_token()


def is_shared_out(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks share out; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Put values in place; of a tensor that ranks share out each keeps its part, and nothing is sent."""
    if not isinstance(target, DTensor):
        target.copy_(values)
        return
    part = values
    # Dimension by dimension of the mesh, from the innermost: FSDP shards what expert parallelism has left on the rank.
    mesh = target.device_mesh
    for dim in _order_of_sharding(target):
        placement = target.placements[dim]
        if (cut := getattr(placement, "dim", None)) is not None:
            size, place = mesh.size(dim), mesh.get_local_rank(dim)
            chunks = list(part.chunk(size, cut))
            part = chunks[place] if place < len(chunks) else part.narrow(cut, 0, 0)
    target.to_local().copy_(part)


def _order_of_sharding(tensor: DTensor) -> list[int]:
    """Mesh dimensions, outermost cut first: a strided placement was cut after the plain ones."""
    strided = [dim for dim, placement in enumerate(tensor.placements) if type(placement).__name__ == "_StridedShard"]
    return [dim for dim in range(tensor.device_mesh.ndim) if dim not in strided] + strided


def on_owners(
    sharded: Sequence[Tensor], parts: Sequence[Tensor], function: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """A function of whole matrices whose rows the ranks of a replica share out: each rank computes those that it owns.

    Two exchanges, in which a rank sends its share of the matrices once there and once back; an all-gather would send
    as many times more as there are ranks, and all would compute the same.

    Args:
        sharded: parameters (rows, columns), shared out by their rows over one mesh.
        parts: what this rank has of each matrix.
        function: of the matrices that a rank owns; the results have their shapes.

    Returns:
        What this rank has of each result.
    """
    mesh, placements = sharded[0].device_mesh, sharded[0].placements  # type: ignore[attr-defined]
    (dim,) = (place for place, placement in enumerate(placements) if placement.is_shard())
    group, ranks, me = mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)
    rows = [[len(chunk) for chunk in torch.arange(len(p)).chunk(ranks)] for p in sharded]
    rows = [sizes + [0] * (ranks - len(sizes)) for sizes in rows]  # of each matrix on each rank
    owned = [[n for n in range(len(parts)) if n % ranks == rank] for rank in range(ranks)]
    columns = [p.shape[1] for p in sharded]

    def exchange(sent: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
        flat = [torch.cat([parts[0].new_empty(0), *(x.flatten() for x in to)]) for to in sent]
        received = parts[0].new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(flat), sizes, [len(x) for x in flat], group=group)
        return list(received.split(sizes))

    # To the owners: from each rank its rows of my matrices.
    sizes = [sum(rows[n][rank] * columns[n] for n in owned[me]) for rank in range(ranks)]
    found = exchange([[parts[n] for n in owned[rank]] for rank in range(ranks)], sizes)
    pieces = [x.split([rows[n][rank] * columns[n] for n in owned[me]]) for rank, x in enumerate(found)]
    whole_ones = [
        torch.cat([piece[place].view(-1, columns[n]) for piece in pieces]) for place, n in enumerate(owned[me])
    ]
    results = [
        result.to(parts[0].dtype).split(rows[n]) for n, result in zip(owned[me], function(whole_ones), strict=True)
    ]
    # Back: to each rank its rows of my results.
    back = [[result[rank] for result in results] for rank in range(ranks)]
    sizes = [sum(rows[n][me] * columns[n] for n in owned[rank]) for rank in range(ranks)]
    mine: dict[int, Tensor] = {}
    for rank, x in enumerate(exchange(back, sizes)):
        for n, piece in zip(owned[rank], x.split([rows[n][me] * columns[n] for n in owned[rank]]), strict=True):
            mine[n] = piece.view(-1, columns[n])
    return [mine[n] for n in range(len(parts))]


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm`; returns the norm before. A collective.

    torch's own cannot take the norm over several meshes: one norm each, then theirs.
    """
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[getattr(parameter.grad, "device_mesh", None)].append(parameter.grad)
    norms = [whole(nn.utils.get_total_norm(grads)) for grads in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grads in by_mesh.values():
        torch._foreach_mul_([local(grad) for grad in grads], scale)  # as torch's own does
    return float(total)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
