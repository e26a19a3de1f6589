"""Documents -> rows of `sequence_length` tokens.

Two strategies, chosen by the stage:

`SplitPacking` (pretraining). Each epoch the documents are permuted, laid end to end and cut into rows with
one token of overlap: row r holds tokens r*(S-1) ... r*(S-1)+S-1 of that stream. Example, S = 4: a b c d | d e
f g. A row's first token is never predicted, so with the overlap every token but the documents' first ones is
predicted exactly once an epoch, and nothing is padded but the end of the last row. Price: a document that is
cut continues without what stood before the cut.

`WholePacking` (SFT, and preferences, whose documents are pairs). Documents are never cut: best-fit decreasing puts
each, longest first, into the fullest row that still has room. Rows are planned once, visited in another order each
epoch, and padded on the right.

For both, the number of rows is the same every epoch and `row(epoch, index)` is a pure function of the seed.

A row is four int64 arrays (S,):
    input_ids
    labels          unshifted, as in transformers (the model shifts); IGNORE_INDEX for the first token of
                    every document or part of one, for tokens that are not learned and for padding
    position_ids    restart at 0 with every document or part of one, and with the padding
    attention_mask  0 on padding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from minimoe.data.batch import Batch
from minimoe.data.shards import Corpus
from minimoe.model.losses import IGNORE_INDEX

_BLOCK = 1 << 20


class PackedRow(NamedTuple):
    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray


class Packing(Protocol):
    """What both strategies offer."""

    num_rows: int
    documents: Documents

    def row(self, epoch: int, index: int) -> PackedRow: ...

    def stack(self, rows: Sequence[Any]) -> Batch: ...


@dataclass(frozen=True)
class Documents:
    """A selection of N documents out of several corpora: a few bytes for each, as there may be tens of millions."""

    corpora: Sequence[Corpus]
    corpus_ids: np.ndarray  # (N,) which corpus
    indices: np.ndarray  # (N,) which of its documents
    lengths: np.ndarray  # (N,)

    @classmethod
    def select(cls, corpora: Sequence[Corpus], chosen: Sequence[np.ndarray]) -> Documents:
        """The documents `chosen[c]` (indices) of each corpus c."""
        return cls(
            corpora=corpora,
            corpus_ids=np.repeat(np.arange(len(corpora), dtype=np.uint16), [len(indices) for indices in chosen]),
            indices=np.concatenate(chosen),
            lengths=np.concatenate([_lengths(corpus, ids) for corpus, ids in zip(corpora, chosen, strict=True)]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def num_bytes(self, document: int) -> int:
        """UTF-8 bytes of what is predicted of a document."""
        return int(self.corpora[self.corpus_ids[document]].num_bytes[self.indices[document]])

    def total_bytes(self) -> int:
        """UTF-8 bytes of what is predicted of all."""
        own = (self.indices[self.corpus_ids == number] for number in range(len(self.corpora)))
        return sum(int(corpus.num_bytes[indices].sum()) for corpus, indices in zip(self.corpora, own, strict=True))

    def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens start ... stop-1 of a document, and which of them are learned (None: all)."""
        corpus = self.corpora[self.corpus_ids[document]]
        first = int(corpus.offsets[self.indices[document]])
        piece = slice(first + start, first + stop)
        return corpus.tokens[piece], None if corpus.learned is None else corpus.learned[piece]

    def parts(self, document: int) -> list[tuple[int, int]]:
        """(start, stop) of what attends to itself alone: the document, or each of its two parts."""
        splits, length = self.corpora[self.corpus_ids[document]].splits, int(self.lengths[document])
        if splits is None:
            return [(0, length)]
        split = int(splits[self.indices[document]])
        return [(0, split), (split, length)]


def _lengths(corpus: Corpus, indices: np.ndarray) -> np.ndarray:
    """Tokens of the documents `indices` (N,): (N,) int32, a block at a time."""
    lengths = np.empty(len(indices), np.int32)
    for start in range(0, len(indices), _BLOCK):
        block = indices[start : start + _BLOCK]
        lengths[start : start + _BLOCK] = corpus.offsets[block + 1] - corpus.offsets[block]
    return lengths


class SplitPacking:
    """Documents laid end to end and cut; `shuffle=False` keeps their order."""

    def __init__(
        self, documents: Documents, sequence_length: int, seed: int, pad_id: int = 0, shuffle: bool = True
    ) -> None:
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self.pad_id, self.shuffle = pad_id, shuffle
        self.stride = sequence_length - 1
        num_tokens = int(documents.lengths.sum(dtype=np.int64))
        self.num_rows = -(-max(num_tokens - 1, 0) // self.stride)
        self._cached_epoch = -1

    def row(self, epoch: int, index: int) -> PackedRow:
        if epoch != self._cached_epoch:
            self._lay_out(epoch)
        start = int(self._row_order[index]) * self.stride
        stop = min(start + self.sequence_length, int(self._ends[-1]))
        fragments = []
        position = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[position])
            document = int(self._order[position])
            length = int(self.documents.lengths[document])
            # the document lies at end-length ... end-1 of the stream
            fragments.append((document, start - (end - length), min(stop, end) - (end - length)))
            start, position = end, position + 1
        return _assemble(self.documents, fragments, self.sequence_length, self.pad_id)

    stack = staticmethod(Batch.stack)

    def _lay_out(self, epoch: int) -> None:
        count = len(self.documents)
        self._order, self._row_order = numbers(count), numbers(self.num_rows)
        if self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            rng.shuffle(self._order)
            rng.shuffle(self._row_order)
        self._ends = np.cumsum(self.documents.lengths[self._order], dtype=np.int64)
        self._cached_epoch = epoch


class WholePacking:
    """Whole documents in rows planned by best-fit decreasing; `shuffle=False` keeps the planned order."""

    def __init__(
        self, documents: Documents, sequence_length: int, seed: int, pad_id: int = 0, shuffle: bool = True
    ) -> None:
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self.pad_id, self.shuffle = pad_id, shuffle
        order = np.random.default_rng(seed).permutation(len(documents))  # mixes documents of equal length
        order = order[np.argsort(-documents.lengths[order], kind="stable")]
        row_of = best_fit(documents.lengths[order].tolist(), sequence_length)
        self.num_rows = max(row_of, default=-1) + 1
        self._documents = order[np.argsort(row_of, kind="stable")]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=self.num_rows))]).astype(np.int64)
        self._cached_epoch = -1

    def row(self, epoch: int, index: int) -> PackedRow:
        fragments = [
            (int(document), start, stop)
            for document in self.members(epoch, index)
            for start, stop in self.documents.parts(int(document))
        ]
        return _assemble(self.documents, fragments, self.sequence_length, self.pad_id)

    stack = staticmethod(Batch.stack)

    def members(self, epoch: int, index: int) -> np.ndarray:
        """The documents of a row, in their order."""
        if epoch != self._cached_epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._row_order = rng.permutation(self.num_rows) if self.shuffle else np.arange(self.num_rows)
            self._cached_epoch = epoch
        planned = int(self._row_order[index])
        return self._documents[self._bounds[planned] : self._bounds[planned + 1]]

    @property
    def most_members(self) -> int:
        """Documents of the fullest row."""
        return int(np.diff(self._bounds).max(initial=0))


def numbers(count: int) -> np.ndarray:
    """0 ... count-1, in half the bytes where they suffice."""
    return np.arange(count, dtype=np.int32 if count < 1 << 31 else np.int64)


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The row of every document: the fullest one with room for it, or a new one. O(1) big-integer steps each.

    Bit c of `free` is set while some row has exactly c tokens left. Example: rows with 3 and 9 left are
    0b1000001000; a document of 5 looks at the bits from 5 on, and the lowest one set is 9: the fullest row
    that has room.
    """
    free = 0
    rows_with: dict[int, list[int]] = {}
    result: list[int] = []
    num_rows = 0
    for length in lengths:
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into {capacity}")
        roomy = free >> length
        if roomy:
            left = length + (roomy & -roomy).bit_length() - 1
            row = rows_with[left].pop()
            if not rows_with[left]:
                free &= ~(1 << left)
        else:
            left, row = capacity, num_rows
            num_rows += 1
        result.append(row)
        if left > length:
            rows_with.setdefault(left - length, []).append(row)
            free |= 1 << (left - length)
    return result


def _assemble(
    documents: Documents, fragments: Sequence[tuple[int, int, int]], sequence_length: int, pad_id: int
) -> PackedRow:
    """A row of fragments (document, start, stop), padded on the right."""
    input_ids = np.full(sequence_length, pad_id, np.int64)
    labels = np.full(sequence_length, IGNORE_INDEX, np.int64)
    position_ids = np.zeros(sequence_length, np.int64)
    attention_mask = np.zeros(sequence_length, np.int64)
    count = np.arange(sequence_length)
    at = 0
    for document, start, stop in fragments:
        tokens, learned = documents.read(document, start, stop)
        end = at + len(tokens)
        input_ids[at:end] = tokens
        targets = input_ids[at + 1 : end]  # int64: IGNORE_INDEX would wrap in the shard's unsigned tokens
        labels[at + 1 : end] = targets if learned is None else np.where(learned[1:], targets, IGNORE_INDEX)
        position_ids[at:end] = count[: end - at]
        at = end
    attention_mask[:at] = 1
    position_ids[at:] = count[: sequence_length - at]
    return PackedRow(input_ids, labels, position_ids, attention_mask)
