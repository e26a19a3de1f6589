"""What one optimizer step learns from.

B batch, S sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from minimoe.model.losses import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Four int64 tensors (B, S); labels are unshifted. A stage's own batch adds tensors with B rows."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def stack(cls, rows: Sequence[tuple[np.ndarray, ...]]) -> Batch:
        return cls(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return type(self)(*(tensor.to(device) for tensor in self.tensors().values()))

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most `rows` rows."""
        pieces = zip(*(tensor.split(rows) for tensor in self.tensors().values()), strict=True)
        return (type(self)(*piece) for piece in pieces)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is in it, by name."""
        return dict(vars(self))

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward."""
        return {field.name: getattr(self, field.name) for field in fields(Batch)}

    def num_items(self) -> torch.Tensor:
        """What a mean loss divides by: the learned tokens. An int64 scalar."""
        return (self.labels[:, 1:] != IGNORE_INDEX).sum()

    def num_tokens(self) -> torch.Tensor:
        """Real tokens, learned or not. An int64 scalar."""
        return (self.attention_mask != 0).sum()

    def digest(self) -> str:
        """A hash of the contents, for metrics and resume tests."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in self.tensors().values():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
