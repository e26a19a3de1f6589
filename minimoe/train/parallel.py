"""Device, precision and process group of a run, and what its log says when another rank dies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from minimoe.config import TrainConfig
from minimoe.device import has_bf16, pick_device
from minimoe.errors import StorageError


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Device, precision and process group, as the config says.

    Raises:
        UserError: the config asks for a device that this machine does not have.
    """
    device = pick_device(train.device, where="train.device")
    bf16 = train.precision == "bf16" or (train.precision == "auto" and has_bf16(device))
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        # Every rank computes the same selection bias itself; rank 0's copy must not overwrite it each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


@contextmanager
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
            mend="look at its output, then start the same command with --resume",
        ) from error
