"""Checkpoints of a sharded run: every rank writes what it holds, and none ever holds the whole.

The folder is that of `checkpoint.py`, with the weights and moments in the ranks' parts instead of `model.safetensors`
and `optimizer.safetensors` (which keeps what is small: random generators, the data's state). The first rank publishes
it by one rename when all have written and synced; what fails on one rank fails on all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from minimoe.errors import MinimoeError, StorageError, disk_errors
from minimoe.failpoints import failpoint
from minimoe.loading import quiet_transformers
from minimoe.sharded_files import parts_of, write_parts
from minimoe.train import checkpoint
from minimoe.train.checkpoint import MANIFEST
from minimoe.train.sharding import whole
from minimoe.train.snapshot import Snapshot, check_finite, trained

T = TypeVar("T")
_PART_BYTES = 512 << 20  # of a rank's files, about: each is made in memory before it is written
_FILE_BYTES = 4 << 30  # of a plain model folder's files, which one rank holds while it writes them


class Ranks:
    """The ranks that write a checkpoint together, with connections of their own: training goes on meanwhile.

    Making it is a collective.
    """

    def __init__(self, timeout_seconds: int) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def together(self, work: Callable[[], T]) -> list[T]:
        """What every rank's work gave, in their order; where it failed on one, its error is raised on all."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        failed = (type(error), error.what, error.where, error.fix) if isinstance(error, MinimoeError) else repr(error)
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, (result, failed if error else None), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(found):
            if isinstance(failure, tuple):
                kind, what, where, fix = failure
                raise kind(f"rank {rank}: {what}", where=where, fix=fix)
            if failure is not None:
                raise RuntimeError(f"rank {rank}: {failure}")
        return [result for result, _ in found]

    def on_first(self, work: Callable[[], Any]) -> None:
        """Work of the first rank, for which the others wait."""
        self.together(work if self.rank == 0 else lambda: None)


def save(root: Path, snapshot: Snapshot, model: Any, tokenizer: Any, ranks: Ranks) -> Path:
    """`checkpoint.save` of all ranks together; a collective, for a thread of its own.

    Raises:
        StorageError: disk full, permission denied, a folder that the ranks do not share; the older ones are untouched.
        NonFiniteError: a weight or moment is NaN or infinite; nothing was written.
    """
    target = root / f"step-{snapshot.state.step:08d}"
    temporary = checkpoint.temporary_of(target)
    ranks.together(lambda: check_finite(snapshot))
    try:
        ranks.on_first(lambda: checkpoint.begin(target))
        failpoint("save.begin")
        manifest: dict[str, Any] = {}
        for entries in ranks.together(lambda: _write_own(temporary, snapshot, ranks)):
            manifest |= entries
        failpoint("save.shards")
        ranks.on_first(lambda: _publish(target, manifest, snapshot, model, tokenizer))
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _write_own(folder: Path, snapshot: Snapshot, ranks: Ranks) -> dict[str, Any]:
    """This rank's files; their entries of the manifest."""
    file_of = _numbered(snapshot.weights, ranks, 1)
    file_of |= _numbered(snapshot.optimizer, ranks, max(file_of.values()) + 1)
    with disk_errors(folder.name, folder):
        write_parts(folder, snapshot.weights | snapshot.optimizer, file_of, ranks.group)
        failpoint("save.shard")
        return {file.name: checkpoint.manifest_entry(file) for file in parts_of(folder, ranks.rank)}


def _numbered(tensors: Mapping[str, Tensor], ranks: Ranks, first: int) -> dict[str, int]:
    """The number of each rank's file that a tensor goes into; the same on all."""
    found, number, size = {}, first, 0.0
    for name, tensor in tensors.items():
        share = tensor.nbytes / ranks.count
        if size and size + share > _PART_BYTES:
            number, size = number + 1, 0.0
        found[name], size = number, size + share
    return found


def _publish(target: Path, manifest: dict[str, Any], snapshot: Snapshot, model: Any, tokenizer: Any) -> None:
    """The small files, the manifest of all, and the rename."""
    folder = checkpoint.temporary_of(target)
    with disk_errors(target.name, target):
        for name, entry in manifest.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                raise StorageError(
                    f"{name}, which another rank wrote, is not in {folder.parent}",
                    fix="give an output_dir that all hosts share",
                )
        checkpoint.save_configs(model, tokenizer, folder)
        checkpoint.save_state(folder, snapshot, {})
        others = (file for file in sorted(folder.iterdir()) if file.name not in manifest)
        manifest |= {file.name: checkpoint.manifest_entry(file) for file in others}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        failpoint("save.manifest")
        checkpoint.publish(target)


def save_model(model: Any, tokenizer: Any, target: Path | None) -> None:
    """Write a sharded model as a plain model folder, file by file, or with LoRA as an adapter folder. A collective.

    Args:
        target: the folder; None on all ranks but the first.
    """
    groups = list(_in_files(trained(model).items()))
    if target is None:
        for _ in _gathered(groups):
            pass
        return
    with checkpoint.written_whole(target) as folder:
        if len(groups) == 1:
            checkpoint.save_weights(model, tokenizer, folder, next(_gathered(groups)))
            return
        places: dict[str, str] = {}
        for number, tensors in enumerate(_gathered(groups), 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            with tempfile.TemporaryDirectory(dir=folder) as part, quiet_transformers():
                model.save_pretrained(part, state_dict=tensors, max_shard_size=2 * _FILE_BYTES)
                (written,) = Path(part).glob("*.safetensors")
                written.rename(folder / name)
            with safe_open(folder / name, "pt") as file:
                places |= dict.fromkeys(file.keys(), name)
        size = sum(tensor.nbytes for group in groups for tensor in group.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        checkpoint.save_configs(model, tokenizer, folder)


def _in_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """In their order, as many a file as it has room for."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > _FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def _gathered(groups: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Each group whole, on the CPU of the first rank; the others help and keep nothing."""
    first = dist.get_rank() == 0
    for group in groups:
        found = {}
        for name, tensor in group.items():
            gathered = whole(tensor.detach())
            if first:
                found[name] = gathered.cpu().contiguous()
        yield found
