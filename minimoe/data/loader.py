"""Batches as a pure function of (seed, step, rank): resuming a run is one integer.

Row g = step * batch_size + i of a run is row g % rows_per_epoch of epoch g // rows_per_epoch. Rank r of W
takes the rows i of a batch with i % W == r, so another number of processes sees the same rows in the same
global order.

Weighted sources are mixed row by row: in each block of 1024 rows every source has its share (largest
remainder, at least one row) at places permuted by (seed, block), and walks through its own epochs. Example:
weights 3 and 1 give 768 and 256 rows of every block. An epoch of a mixture is as many rows as all sources
have together. Where the weights change at a step, blocks begin anew with its first row, and every source goes on
where it was.

Held-out documents are chosen by a hash of (seed, source, document index): appending documents to a source
moves none that was there between training and validation.

B batch, S sequence.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.config import DataConfig, Encoding, SourceConfig
from minimoe.data.batch import Batch as Batch
from minimoe.data.packing import Documents, PackedRow, Packing, SplitPacking, WholePacking, numbers
from minimoe.data.pairs import PairPacking
from minimoe.data.shards import Corpus, prepare
from minimoe.data.sources import describe
from minimoe.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BLOCK_ROWS = 1024
_BLOCK = 1 << 20  # documents hashed at a time


class Batches:
    """What a stage learns from: it gives `rows_per_epoch` and `batch`, and the rest where it has more to say."""

    rows_per_epoch: int

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rank's part of batch `step`: a pure function of its arguments, and where a stage says so of the model."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Of the last batch, for the metrics; with `tokens` where these are not the step's rows times their length."""
        return {}

    def state_tensors(self, step: int) -> dict[str, torch.Tensor]:
        """What the batches from `step` on cannot be made of anew, for a checkpoint."""
        return {}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of `state_tensors`."""


class TrainLoader(Batches):
    """`Batches` of packed documents, without end.

    Args:
        packings: one pool of rows, or one for each weighted source.
        weights: their shares; None for a single pool.
        phases: (step, shares) from later steps on, in their order.
    """

    def __init__(
        self,
        packings: Sequence[Packing],
        weights: Sequence[float] | None,
        seed: int,
        phases: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        self.packings, self.seed = packings, seed
        self.rows_per_epoch = sum(packing.num_rows for packing in packings)
        mixed = weights is not None and len(packings) > 1
        shares = [(0, weights), *phases] if mixed else []
        self._mixtures = [(step, Mixture(share or (), seed, n)) for n, (step, share) in enumerate(shares)]

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rank's part of batch `step`: ceil((batch_size - rank) / world_size) rows."""
        first = step * batch_size
        return self.packings[0].stack([self.row(first + i, batch_size) for i in range(rank, batch_size, world_size)])

    def row(self, number: int, batch_size: int = 1) -> PackedRow:
        """Row `number` of the endless global order, in batches of so many."""
        source, number = self.locate(number, batch_size)
        epoch, index = divmod(number, self.packings[source].num_rows)
        return self.packings[source].row(epoch, index)

    def locate(self, number: int, batch_size: int = 1) -> tuple[int, int]:
        """The packing of a global row, and its row number within that packing's endless order."""
        if not self._mixtures:
            return 0, number
        before = np.zeros(len(self.packings), np.int64)  # rows of each source in earlier phases
        for (step, mixture), later in zip(self._mixtures, [*self._mixtures[1:], None], strict=True):
            length = None if later is None else (later[0] - step) * batch_size
            if length is None or number < length:
                source, index = mixture.locate(number)
                return source, int(before[source]) + index
            before += mixture.count(length)
            number -= length
        raise AssertionError("the last phase has no end")


class Mixture:
    """Which source a row is from: blocks of `BLOCK_ROWS` rows, in which every source has its share.

    Args:
        weights: of the sources; 0 leaves one out.
        phase: number of the mixture within the run.
    """

    def __init__(self, weights: Sequence[float], seed: int, phase: int) -> None:
        present = np.flatnonzero(np.asarray(weights) > 0)
        self.quotas = np.zeros(len(weights), np.int64)  # rows of a block
        self.quotas[present] = apportion([weights[index] for index in present.tolist()], BLOCK_ROWS)
        self._seed = [seed] if phase == 0 else [seed, phase]
        self._cached_block = -1

    def locate(self, number: int) -> tuple[int, int]:
        """The source of a row of the mixture, and how many rows of it came before."""
        block, place = divmod(number, BLOCK_ROWS)
        self._lay_out(block)
        source = int(self._owners[place])
        return source, block * int(self.quotas[source]) + int(self._ranks[place])

    def count(self, number: int) -> np.ndarray:
        """How many of the first `number` rows each source has."""
        block, place = divmod(number, BLOCK_ROWS)
        self._lay_out(block)
        return block * self.quotas + np.bincount(self._owners[:place], minlength=len(self.quotas))

    def _lay_out(self, block: int) -> None:
        if block == self._cached_block:
            return
        owners = np.repeat(np.arange(len(self.quotas)), self.quotas)
        self._owners = np.random.default_rng([*self._seed, block]).permutation(owners)
        # ranks[p]: how many earlier places of the block have the same owner
        ones = self._owners[:, None] == np.arange(len(self.quotas))
        self._ranks = np.cumsum(ones, axis=0)[np.arange(BLOCK_ROWS), self._owners] - 1
        self._cached_block = block


class Validation:
    """Held-out documents, each scored exactly once, in a fixed order."""

    def __init__(self, documents: Documents, packing: Packing, ignored: Mapping[str, int] | None = None) -> None:
        self.packing, self.num_rows = packing, packing.num_rows
        self.ignored = ignored or {}  # as in `Data`
        self.num_documents = len(documents)
        self.num_bytes = documents.total_bytes()  # denominator of bits per byte

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The rank's rows, every world_size-th; the last batch may be smaller."""
        mine = range(rank, self.num_rows, world_size)
        for start in range(0, len(mine), batch_size):
            yield self.packing.stack([self.packing.row(0, index) for index in mine[start : start + batch_size]])


@dataclass(frozen=True)
class Data:
    train: Batches
    validation: Any  # what the stage's `evaluate` takes, with `num_documents`; None: nothing is held out
    counts: Mapping[str, int]  # of the training sources, see shards.Corpus, and train_ and validation_documents
    fingerprint: str  # of everything that decides the batches, but the seed
    ignored: Mapping[str, int] = field(default_factory=dict)  # rows with a column that their format does not read


def open_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    seed: int,
    annotate: Callable[[Corpus], Corpus] = lambda corpus: corpus,
) -> Data:
    """Tokenise what is not cached, split and pack.

    Args:
        annotate: adds to every corpus what a stage wants to know of its documents.

    Raises:
        UserError: unusable data, or no row to train on.
    """
    corpora = [annotate(prepare(source, data, tokenizer, encoding)) for source in data.train]
    chosen = [numbers(corpus.num_documents) for corpus in corpora]
    validation: Validation | None = None
    validation_fingerprints: list[str] = []
    if data.validation is not None:
        validation, validation_fingerprints = _open_validation(data.validation, data, tokenizer, encoding, annotate)
    elif data.validation_fraction > 0:
        chosen, held_out = split_documents([len(ids) for ids in chosen], data, seed)
        if sum(map(len, held_out)):
            documents = Documents.select(corpora, held_out)
            validation = Validation(documents, _pack(documents, data, tokenizer, encoding, 0, shuffle=False))

    weights = [source.weight for source in data.train if source.weight is not None]
    pools = [Documents.select([corpus], [ids]) for corpus, ids in zip(corpora, chosen, strict=True)]
    if not weights:
        pools = [Documents.select(corpora, chosen)]
    packings = [_pack(pool, data, tokenizer, encoding, seed) for pool in pools]
    if not all(packing.num_rows for packing in packings):
        sources = ", ".join(describe(source) for source in data.train)
        tokens = sum(int(pool.lengths.sum(dtype=np.int64)) for pool in pools)
        raise UserError(
            f"0 rows to train on: {sum(map(len, pools))} documents, {tokens} tokens",
            where=sources,
            fix="give every source a document of at least 2 tokens, or lower data.validation_fraction",
        )
    counts = {key: sum(corpus.counts[key] for corpus in corpora) for key in corpora[0].counts}
    counts["train_documents"] = sum(map(len, pools))
    counts["validation_documents"] = validation.num_documents if validation else 0
    return Data(
        train=TrainLoader(packings, weights or None, seed, [(phase.from_step, phase.weights) for phase in data.phases]),
        validation=validation,
        counts=counts,
        ignored=_ignored(corpora),
        fingerprint=_fingerprint(corpora, validation_fingerprints, data, encoding),
    )


def open_validation(
    sources: Sequence[SourceConfig], data: DataConfig, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Validation:
    """Every document of the sources, for `minimoe evaluate`; `data` gives sequence length and cache."""
    return _open_validation(sources, data.model_copy(update={"max_validation_documents": None}), tokenizer, encoding)[0]


def _open_validation(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    annotate: Callable[[Corpus], Corpus] = lambda corpus: corpus,
) -> tuple[Validation, list[str]]:
    corpora = [annotate(prepare(source, data, tokenizer, encoding)) for source in sources]
    chosen = [numbers(corpus.num_documents) for corpus in corpora]
    hashes = [document_hashes(len(ids), 0, number) for number, ids in enumerate(chosen)]
    documents = Documents.select(corpora, _cap(chosen, hashes, data.max_validation_documents))
    packing = _pack(documents, data, tokenizer, encoding, 0, shuffle=False)
    return Validation(documents, packing, _ignored(corpora)), [corpus.fingerprint for corpus in corpora]


def _ignored(corpora: Sequence[Corpus]) -> Counter[str]:
    return sum((Counter(corpus.ignored) for corpus in corpora), Counter())


def split_documents(
    num_documents: Sequence[int], data: DataConfig, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Indices of each source's training documents, and of the held-out ones that are scored.

    At least one document is held out if there are two or more, and every source keeps at least one for
    training.
    """
    hashes = [document_hashes(count, seed, number) for number, count in enumerate(num_documents)]
    held = [values < data.validation_fraction for values in hashes]
    for values, mask in zip(hashes, held, strict=True):
        if mask.all():
            mask[np.argmax(values)] = False
    largest = int(np.argmax(num_documents))
    if not any(mask.any() for mask in held) and num_documents[largest] >= 2:
        held[largest][np.argmin(hashes[largest])] = True
    train = [numbers(len(mask))[~mask] for mask in held]
    return train, _cap([np.flatnonzero(mask) for mask in held], hashes, data.max_validation_documents)


def document_hashes(count: int, seed: int, source: int) -> np.ndarray:
    """A number in [0, 1) for each document index, (count,) float64: splitmix64, which mixes bits."""
    start = np.random.default_rng([seed, source]).integers(1 << 63, dtype=np.uint64)
    hashes = np.empty(count)
    for first in range(0, count, _BLOCK):
        x = np.arange(first, min(first + _BLOCK, count), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        hashes[first : first + _BLOCK] = (x >> np.uint64(11)) / float(1 << 53)
    return hashes


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` split in proportion to the weights by largest remainder, each at least 1; (N,) int64."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    missing = total - int(quotas.sum())
    quotas[by_remainder[: max(missing, 0)]] += 1
    while quotas.sum() > total:  # the minimum of 1 gave too many: the largest pay
        quotas[np.argmax(quotas)] -= 1
    return quotas


def _cap(chosen: list[np.ndarray], hashes: list[np.ndarray], limit: int | None) -> list[np.ndarray]:
    """The `limit` chosen documents with the smallest hashes over all sources."""
    values = np.concatenate([hashes[number][indices] for number, indices in enumerate(chosen)])
    if limit is None or len(values) <= limit:
        return chosen
    threshold = np.sort(values)[limit - 1]
    return [indices[hashes[number][indices] <= threshold] for number, indices in enumerate(chosen)]


def _pack(
    documents: Documents,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    seed: int,
    shuffle: bool = True,
) -> Packing:
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    strategy: type[SplitPacking | WholePacking] = SplitPacking
    if encoding != "pretrain":
        strategy = WholePacking if encoding == "sft" else PairPacking
    return strategy(documents, data.sequence_length, seed, pad_id, shuffle)


def _fingerprint(corpora: Sequence[Corpus], validation: Sequence[str], data: DataConfig, encoding: Encoding) -> str:
    parts = [
        [corpus.fingerprint for corpus in corpora],
        [source.weight for source in data.train] + [(phase.from_step, phase.weights) for phase in data.phases],
        list(validation),
        None if validation else data.validation_fraction,
        data.sequence_length,
        encoding,
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
