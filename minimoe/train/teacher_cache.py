"""What a teacher says of rows, on disk: the likeliest tokens of every position.

A file of records of one size, only ever appended to: the row's key, its payload, a checksum. A record that a kill has
torn, or that is damaged, is computed again. Every rank writes a file of its own and reads all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minimoe.errors import disk_errors

_DIGEST = 16  # bytes of a key and of a checksum


class TeacherCache:
    """Rows of one teacher, one length and one number of tokens kept.

    Args:
        folder: of this teacher and these settings; another's rows have other records.
        length: positions S of a row.
        top_k: tokens K of each position.
    """

    def __init__(self, folder: Path, length: int, top_k: int, rank: int) -> None:
        self._folder, self._shape, self._own = folder, (length, top_k), folder / f"rank-{rank}.bin"
        self._payload = length * top_k * (4 + 4)
        self._record = _DIGEST + self._payload + _DIGEST
        self._places: dict[bytes, tuple[Path, int]] = {}
        with disk_errors("what the teacher says", folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("rank-*.bin")):
                self._index(file)
            if self._own.exists():  # what a kill has torn at its end goes
                with self._own.open("r+b") as stream:
                    stream.truncate(self._own.stat().st_size // self._record * self._record)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> tuple[Tensor, Tensor] | None:
        """The ids (S, K) int64 and log-probabilities (S, K) float32 of a row; None where it is not there."""
        if key not in self._places:
            return None
        file, offset = self._places[key]
        with file.open("rb") as stream:
            stream.seek(offset)
            record = stream.read(self._record)
        if len(record) < self._record or _checksum(record[:-_DIGEST]) != record[-_DIGEST:]:
            del self._places[key]
            return None
        payload = record[_DIGEST:-_DIGEST]
        half = len(payload) // 2
        ids = np.frombuffer(payload[:half], np.int32).reshape(self._shape).astype(np.int64)
        logprobs = np.frombuffer(payload[half:], np.float32).reshape(self._shape).copy()
        return torch.from_numpy(ids), torch.from_numpy(logprobs)

    def put(self, key: bytes, ids: Tensor, logprobs: Tensor) -> None:
        """Keep a row.

        Raises:
            StorageError: the disk is full.
        """
        body = key + ids.to(torch.int32).cpu().numpy().tobytes() + logprobs.float().cpu().numpy().tobytes()
        with disk_errors("what the teacher says", self._own), self._own.open("ab") as stream:
            offset = stream.tell()
            stream.write(body + _checksum(body))
        self._places[key] = (self._own, offset)

    def _index(self, file: Path) -> None:
        with file.open("rb") as stream:
            for offset in range(0, file.stat().st_size // self._record * self._record, self._record):
                stream.seek(offset)
                self._places[stream.read(_DIGEST)] = (file, offset)


def row_key(row: dict[str, Tensor]) -> bytes:
    """A hash of all that a teacher's answer depends on: tokens, positions and padding of a row."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for name in ("input_ids", "position_ids", "attention_mask"):
        digest.update(row[name].cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()
