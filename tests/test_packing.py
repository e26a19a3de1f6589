from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from minimoe.data.packing import Documents, PackedRow, SplitPacking, WholePacking, best_fit
from minimoe.data.shards import Corpus
from minimoe.model.losses import IGNORE_INDEX

PAD = 0


def make_documents(lengths, learned: bool = False, num_corpora: int = 1, seed: int = 0) -> Documents:
    """Documents whose tokens are all different: document d has 1000 * d + 1, 1000 * d + 2, ..."""
    rng = np.random.default_rng(seed)
    corpora = []
    for part in np.array_split(np.arange(len(lengths)), num_corpora):
        tokens = [1000 * d + 1 + np.arange(lengths[d]) for d in part]
        flat = np.concatenate(tokens).astype(np.uint32)
        corpora.append(
            Corpus(
                tokens=flat,
                learned=rng.random(len(flat)) < 0.5 if learned else None,
                offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
                num_bytes=np.array([4 * len(t) for t in tokens]),
                fingerprint="",
                counts={},
            )
        )
    return Documents.select(corpora, [np.arange(corpus.num_documents) for corpus in corpora])


def slow_row(fragments, sequence_length: int) -> PackedRow:
    """The obvious row of fragments [(token, learned), ...], token by token."""
    columns = ([], [], [], [])
    for fragment in fragments:
        for position, (token, learned) in enumerate(fragment):
            values = (token, token if learned and position else IGNORE_INDEX, position, 1)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    for position in range(sequence_length - len(columns[0])):
        for column, value in zip(columns, (PAD, IGNORE_INDEX, position, 0), strict=True):
            column.append(value)
    return PackedRow(*(np.array(column) for column in columns))


def assert_rows_equal(row: PackedRow, expected: PackedRow) -> None:
    for name, left, right in zip(PackedRow._fields, row, expected, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)
        assert left.dtype == np.int64


def tokens_of(documents: Documents, index: int):
    tokens, learned = documents.read(index, 0, int(documents.lengths[index]))
    return list(zip(tokens.tolist(), [True] * len(tokens) if learned is None else learned.tolist(), strict=True))


LENGTHS = [2, 30, 3, 8, 1, 17, 5, 5, 2, 9]


@pytest.mark.parametrize("num_corpora", [1, 3])
@pytest.mark.parametrize("sequence_length", [4, 8, 100])
def test_split_rows_are_the_stream_cut_with_one_token_of_overlap(num_corpora, sequence_length):
    documents = make_documents(LENGTHS, num_corpora=num_corpora)
    packing = SplitPacking(documents, sequence_length, seed=0, pad_id=PAD, shuffle=False)
    stream = [(d, item) for d in range(len(LENGTHS)) for item in tokens_of(documents, d)]
    for index in range(packing.num_rows):
        start = index * (sequence_length - 1)
        piece = stream[start : start + sequence_length]
        fragments = [[item for d, item in piece if d == document] for document in range(len(LENGTHS))]
        assert_rows_equal(packing.row(0, index), slow_row(fragments, sequence_length))


def predicted(rows) -> Counter:
    return Counter(int(label) for row in rows for label in row.labels if label != IGNORE_INDEX)


@pytest.mark.parametrize("sequence_length", [2, 5, 8, 64])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_token_but_document_starts_is_predicted_exactly_once_an_epoch(sequence_length, epoch):
    documents = make_documents(LENGTHS)
    packing = SplitPacking(documents, sequence_length, seed=1)
    rows = [packing.row(epoch, index) for index in range(packing.num_rows)]
    expected = Counter(1000 * d + 1 + p for d, length in enumerate(LENGTHS) for p in range(1, length))
    assert predicted(rows) == expected
    assert sum(int((row.attention_mask == 0).any()) for row in rows) <= 1


@pytest.mark.parametrize("strategy", [SplitPacking, WholePacking])
def test_rows_are_a_pure_function_of_seed_epoch_and_index(strategy):
    documents = make_documents(LENGTHS * 3)
    first, second = strategy(documents, 32, seed=5), strategy(documents, 32, seed=5)
    order = [(epoch, index) for epoch in (2, 0, 1) for index in range(first.num_rows)]
    rows = {key: first.row(*key) for key in order}
    for key in reversed(order):
        assert_rows_equal(second.row(*key), rows[key])
    other = strategy(documents, 32, seed=6)

    def epoch_of(packing, epoch):
        return [packing.row(epoch, index).input_ids.tolist() for index in range(packing.num_rows)]

    assert epoch_of(first, 0) != epoch_of(first, 1)
    assert epoch_of(first, 0) != epoch_of(other, 0)


def test_whole_rows_hold_every_document_once_and_uncut():
    lengths = np.random.default_rng(0).integers(1, 33, 200).tolist()
    documents = make_documents(lengths, learned=True, num_corpora=2)
    packing = WholePacking(documents, 32, seed=0, pad_id=PAD)
    for epoch in (0, 1):
        seen = []
        for index in range(packing.num_rows):
            row = packing.row(epoch, index)
            starts = np.flatnonzero((row.position_ids == 0) & (row.attention_mask == 1))
            members = [int(row.input_ids[start]) // 1000 for start in starts]
            assert_rows_equal(row, slow_row([tokens_of(documents, member) for member in members], 32))
            seen += members
        assert sorted(seen) == list(range(len(lengths)))


def slow_best_fit(lengths, capacity):
    left, result = [], []
    for length in lengths:
        fitting = [room for room in left if room >= length]
        if fitting:
            result.append(min(fitting))
            left.remove(min(fitting))
            left.append(min(fitting) - length)
        else:
            result.append(capacity)
            left.append(capacity - length)
    return result, len(left)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_takes_the_fullest_row_with_room(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 300).tolist()
    rows = best_fit(lengths, 64)
    left: dict[int, int] = {}
    rooms = []
    for length, row in zip(lengths, rows, strict=True):
        rooms.append(left.get(row, 64))
        left[row] = left.get(row, 64) - length
        assert left[row] >= 0
    assert (rooms, len(left)) == slow_best_fit(lengths, 64)


def test_best_fit_refuses_a_document_that_fits_nowhere():
    with pytest.raises(ValueError, match="65 tokens"):
        best_fit([65], 64)


def test_whole_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(5, 200, 2000).tolist()
    packing = WholePacking(make_documents(lengths), 512, seed=0)
    assert sum(lengths) / (packing.num_rows * 512) > 0.98


def test_a_document_takes_a_few_bytes_of_memory():
    documents = make_documents([3] * 1000)
    tables = (documents.corpus_ids, documents.indices, documents.lengths)
    packing = SplitPacking(documents, 8, seed=0)
    packing.row(0, 0)
    assert sum(table.nbytes for table in tables) <= 14 * len(documents)  # indices as int64 here
    assert packing._order.nbytes + packing._ends.nbytes <= 12 * len(documents)


def test_documents_can_be_selected():
    documents = make_documents(LENGTHS)
    chosen = Documents.select(documents.corpora, [np.array([1, 3])])
    assert chosen.lengths.tolist() == [30, 8]
    assert [chosen.num_bytes(place) for place in (0, 1)] == [120, 32]
    assert chosen.total_bytes() == 152
    assert chosen.read(1, 2, 4)[0].tolist() == [3003, 3004]
