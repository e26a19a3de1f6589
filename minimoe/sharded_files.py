"""Tensors in a folder of safetensors files, whole or in the parts that the ranks of a sharded run wrote.

The parts, and how they are put together on any other layout, are `torch.distributed.checkpoint`'s; it is imported when
it is needed. A part is called `shard-RANK-model-FILE-of-FILES.safetensors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def in_parts(folder: Path) -> bool:
    """Whether ranks wrote the tensors side by side."""
    whole = any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json"))
    return not whole and next(folder.glob("shard-*-model-*.safetensors"), None) is not None


def parts_of(folder: Path, rank: int) -> list[Path]:
    """The files that a rank wrote."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def write_parts(folder: Path, tensors: Mapping[str, Tensor], file_of: Mapping[str, int], group: Any) -> None:
    """Write what this rank holds, synced to the disk; what several hold is written once. A collective.

    Args:
        tensors: by name, the same names on every rank of the group; `DTensor` where ranks share a tensor out.
        file_of: for each name the number, from 1, of the rank's file that it goes into.

    Raises:
        OSError: a rank could not write; raised on all.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    writer = HuggingFaceStorageWriter(str(folder), dict(file_of), save_distributed=True)
    with _quietly():
        try:
            save(dict(tensors), storage_writer=writer, process_group=group)
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, OSError):
                raise OSError(cause.errno, f"{cause.strerror or cause} (rank {rank})") from error
            raise


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """The tensors of a folder, by name."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place. A `DTensor` gets this rank's part, which alone is read; nothing is sent.

    Raises:
        CheckpointException: a tensor is missing, or of another shape.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with _quietly(), torch.no_grad():
        load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """A model's state with tied tensors once, under their first name."""
    places = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        found.setdefault(places.get(name, name), (name, tensor))
    return dict(found.values())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a note that reading alone is meant, and one on a way of reading tensors that torch itself chose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
