"""Writes checkpoints while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from minimoe.errors import MinimoeError
from minimoe.train import sharded_checkpoint
from minimoe.train.checkpoint import prune, save
from minimoe.train.sharded_checkpoint import Ranks
from minimoe.train.snapshot import Snapshot


class BackgroundSaver:
    """Writes snapshots to `root` on a thread of its own, one at a time, and prunes after each.

    A failed save is raised in the training loop by the next `check`, `submit`, `wait`, or the end of the `with`.

    Args:
        model, tokenizer: give the config and the file formats; the weights are the snapshot's.
        keep_last: newest verified checkpoints kept, beside the best one.
        ranks: of a sharded model, all of which save together; None saves alone.
    """

    def __init__(self, root: Path, model: Any, tokenizer: Any, keep_last: int, ranks: Ranks | None = None) -> None:
        self._root, self._model, self._tokenizer, self._keep_last = root, model, tokenizer, keep_last
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        # Otherwise the error that ends the run is the one to report, unless it is the echo of a save that failed: ranks
        # that have seen it are gone already, and what comes after fails on those that have not.
        if kind is None or not issubclass(kind, MinimoeError):
            self.wait()

    def submit(self, snapshot: Snapshot) -> None:
        """Start to write; first waits for the previous save, if that is still going on."""
        self.wait()
        self._saving = self._thread.submit(self._save, snapshot)

    @property
    def of_all_ranks(self) -> bool:
        """Whether every rank has a snapshot to write, and not the first alone."""
        return self._ranks is not None

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _save(self, snapshot: Snapshot) -> None:
        if self._ranks is None:
            save(self._root, snapshot, self._model, self._tokenizer)
        else:
            sharded_checkpoint.save(self._root, snapshot, self._model, self._tokenizer, self._ranks)
        if self._ranks is None or self._ranks.rank == 0:
            prune(self._root, self._keep_last, snapshot.state.best_step)
