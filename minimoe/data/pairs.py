"""Batches of documents of two parts: preferences, and judgements (see `preferences.py`).

A row holds whole pairs, packed as SFT packs conversations, so that little is padding. The token of each position knows
which part of which pair it belongs to; with that, sums over an answer's tokens are one `scatter_add`.

B batch, S sequence, P pairs of the fullest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimoe.data.batch import Batch
from minimoe.data.packing import WholePacking


@dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs. A row with fewer than P pairs is filled up with pairs that are not real."""

    parts: Tensor  # (B, S) int64: 1 + 2p for the first part of pair p, 2 + 2p for its second, 0 for padding
    real: Tensor  # (B, P) bool
    wanted: Tensor  # (B, P) bool: the label of a judgement, True for a preference
    reference: Tensor  # (B, P, 2) float32: log-probabilities of both parts under the reference, 0 without one

    def num_items(self) -> Tensor:
        """Pairs."""
        return self.real.sum()

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each part of what is known of the token that a position predicts: (B, S) -> (B, P, 2)."""
        ahead = torch.nn.functional.pad(self.parts[:, 1:], (0, 1))  # the part of the next token
        slots = values.new_zeros(len(values), 2 * self.real.shape[1] + 1)
        return slots.scatter_add(1, ahead, values)[:, 1:].unflatten(1, (-1, 2))


class PairRow(NamedTuple):
    """One row of `PairBatch`, as arrays."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray
    parts: np.ndarray
    real: np.ndarray
    wanted: np.ndarray
    reference: np.ndarray


class PairPacking(WholePacking):
    """`WholePacking` whose rows know their pairs."""

    def row(self, epoch: int, index: int) -> PairRow:  # type: ignore[override]
        plain = super().row(epoch, index)
        members = self.members(epoch, index)
        room = self.most_members
        parts = np.zeros(self.sequence_length, np.int64)
        real, wanted = np.zeros(room, bool), np.ones(room, bool)
        reference = np.zeros((room, 2), np.float32)
        at = 0
        for pair, document in enumerate(members.tolist()):
            for side, (start, stop) in enumerate(self.documents.parts(document)):
                parts[at : at + stop - start] = 1 + 2 * pair + side
                at += stop - start
            corpus = self.documents.corpora[self.documents.corpus_ids[document]]
            place = int(self.documents.indices[document])
            real[pair] = True
            if corpus.wanted is not None:
                wanted[pair] = corpus.wanted[place]
            if corpus.reference is not None:
                reference[pair] = corpus.reference[place]
        return PairRow(*plain, parts, real, wanted, reference)

    @staticmethod
    def stack(rows: Sequence[PairRow]) -> PairBatch:  # type: ignore[override]
        """A batch of rows, of one packing or of several with other numbers of pairs."""
        room = max(len(row.real) for row in rows)
        columns = []
        for name in PairRow._fields:
            values = [getattr(row, name) for row in rows]
            if name in ("real", "wanted", "reference"):
                values = [np.pad(v, [(0, room - len(v))] + [(0, 0)] * (v.ndim - 1)) for v in values]
            columns.append(torch.from_numpy(np.stack(values)))
        return PairBatch(*columns)
