"""A run on its device and its ranks: set up, gradients as of one batch on one of them, and the death of another."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from minimoe.adapters import adapts_experts
from minimoe.config import ParallelConfig, TrainConfig
from minimoe.device import has_bf16, pick_device
from minimoe.errors import StorageError, UserError
from minimoe.ops.onednn import float32_by_onednn
from minimoe.train.objectives import Objective, Step
from minimoe.train.sharding import is_sharded, resolve


def make_accelerator(train: TrainConfig, parallel: ParallelConfig | None = None) -> Accelerator:
    """Device, precision and process group, as the config says.

    Raises:
        UserError: the config asks for a device that this machine does not have, or for ranks that are not there, or
            accelerate was configured for something else than data-parallel training.
    """
    check_launcher(os.environ)
    device = pick_device(train.device, where="train.device")
    if parallel is not None and resolve(parallel, int(os.environ.get("WORLD_SIZE", "1"))).cpu_offload:
        begin_offload(device, parallel)
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        print(f"note: on a CPU, accelerate launch starts one process; for two: {_TORCHRUN}", file=sys.stderr)
    bf16 = train.precision == "bf16" or (train.precision == "auto" and has_bf16(device))
    timeout = [] if parallel is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=parallel.timeout_seconds))]
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        # Every rank computes the same selection bias itself; rank 0's copy must not overwrite it each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), *timeout],
    )


def begin_offload(device: torch.device, parallel: ParallelConfig) -> None:
    """A process group in which tensors of the GPU and of the host travel; `accelerate` would make one of the GPU's.

    Raises:
        UserError: the device is no GPU.
    """
    if device.type != "cuda":
        raise UserError(
            f"parallel.cpu_offload is for GPUs, and train.device is {device.type}", fix="leave parallel.cpu_offload out"
        )
    if not dist.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cuda:nccl,cpu:gloo", timeout=timedelta(seconds=parallel.timeout_seconds))


def check_launcher(environment: Mapping[str, str]) -> None:
    """What `accelerate launch` or its config file ask for, and this trainer does not do or is told elsewhere.

    Raises:
        UserError: naming the variable.
    """
    for variable, (unset, fix) in _NOT_OURS.items():
        value = environment.get(variable, unset)
        if value.lower() != unset:
            raise UserError(f"accelerate is configured with {variable}={value}", fix=fix)


_TORCHRUN = "torchrun --nproc_per_node 2 -m minimoe.cli pretrain CONFIG.yaml"
_DATA_PARALLEL = f"give the config a parallel: section to shard the model, and start it by {_TORCHRUN}"
_NOT_OURS = {  # the value that means unset, and what to do about another
    "ACCELERATE_USE_FSDP": ("false", _DATA_PARALLEL),
    "ACCELERATE_USE_DEEPSPEED": ("false", _DATA_PARALLEL),
    "ACCELERATE_USE_MEGATRON_LM": ("false", _DATA_PARALLEL),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", _DATA_PARALLEL),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "set train.micro_batch_size, and 1 step in accelerate's config"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "set train.compile, and no backend in accelerate's config"),
}


def wrap(model: Any, accelerator: Accelerator) -> Any:
    """The model as training calls it on several ranks."""
    if is_sharded(model):
        return model
    with warnings.catch_warnings():  # torch has a new name for it, which accelerate does not know yet
        warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)
        return accelerator.prepare(model)


def fast_float32(model: Any, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """oneDNN for float32 matmuls, where it is faster and the rows of a matmul come in few sizes.

    Experts with adapters go by the plain path, which gives each of them as many rows as chose it: oneDNN would keep a
    kernel for every number, by the gigabyte, and be slower.
    """
    return contextlib.nullcontext() if adapts_experts(model) else float32_by_onednn(device, model.config.hidden_size)


def forward_backward(
    model: Any, batch: Any, objective: Objective, micro_rows: int, accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor]:
    """Add up the gradients of this rank's rows.

    Args:
        model: as `accelerator.prepare` gave it.
        batch: this rank's part of the step's batch.

    Returns:
        The step's `loss` and its terms, and its expert counts (L, E); both over all ranks.
    """
    world = accelerator.num_processes
    batch = batch.to(accelerator.device)
    num_items, num_tokens = accelerator.reduce(torch.stack([batch.num_items(), batch.num_tokens()]))
    step = Step(num_items, num_tokens, accelerator.reduce, _CountsSoFar(accelerator))
    micros, sharded = list(batch.split(micro_rows)), is_sharded(model)
    values: dict[str, Tensor] = {}
    totals = counts = None
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        # A sharded model adds up the gradients of every micro-batch: kept until the last they would be whole.
        with contextlib.nullcontext() if last or sharded else accelerator.no_sync(model):
            with accelerator.autocast() if sharded else contextlib.nullcontext():  # a wrapped model has its own
                losses = objective(model, micro, step)
            # Training on several ranks averages gradients; the loss is already divided by the global count.
            accelerator.backward(losses.loss * world)
        values = {"loss": losses.loss, **losses.terms}
        flat = torch.cat([value.detach().flatten() for value in values.values()])
        totals = flat if totals is None else totals + flat
        counts = losses.expert_counts if counts is None else counts + losses.expert_counts
    assert totals is not None
    assert counts is not None
    if world > 1:
        totals, counts = accelerator.reduce(totals), accelerator.reduce(counts)
    parts = totals.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}, counts


class _CountsSoFar:
    """Adds up a step's expert counts over ranks and over micro-batches, in their order."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._counts: Tensor | None = None

    def __call__(self, counts: Tensor) -> Tensor:
        counts = self._accelerator.reduce(counts)
        self._counts = counts if self._counts is None else self._counts + counts
        return self._counts


@contextlib.contextmanager
def ranks_may_die(accelerator: Accelerator) -> Iterator[None]:
    """Name the cause when a collective fails because another rank has gone.

    Raises:
        StorageError: that is what happened.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not re.search(r"gloo|nccl|connection", str(error), re.IGNORECASE):
            raise
        first_line = str(error).strip().splitlines()[0]
        raise StorageError(
            f"another process of the run has died or no longer answers ({first_line})",
            fix="look at its output, then start the same command with --resume",
        ) from error
