from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from minimoe.data.loader import Batch, apportion, document_hashes, open_data, open_validation, split_documents
from minimoe.errors import UserError
from minimoe.model.losses import IGNORE_INDEX


@pytest.fixture
def open_texts(write_jsonl, data_config, tiny_tokenizer):
    def run(count=60, stage="pretrain", seed=0, name="rows.jsonl", **values):
        rows = [{"text": f"story {number} of a cat and a boat " * (1 + number % 3)} for number in range(count)]
        if stage == "sft":
            rows = [{"prompt": "Hi", "completion": row["text"][:20]} for row in rows]
        return open_data(data_config(str(write_jsonl(rows, name)), **values), tiny_tokenizer, stage, seed)

    return run


def assert_batches_equal(left: Batch, right: Batch) -> None:
    for name in ("input_ids", "labels", "position_ids", "attention_mask"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def labels_of(batches) -> Counter:
    return Counter(int(x) for batch in batches for x in batch.labels.flatten() if x != IGNORE_INDEX)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_batch_is_a_pure_function_of_seed_and_step(open_texts, stage):
    first, second = open_texts(stage=stage).train, open_texts(stage=stage).train
    forward = [first.batch(step, 4) for step in range(20)]
    for step in reversed(range(20)):
        assert_batches_equal(second.batch(step, 4), forward[step])
        assert second.batch(step, 4).digest() == forward[step].digest()
    assert forward[0].input_ids.shape == (4, 32)
    assert forward[0].input_ids.dtype == torch.int64
    assert len({batch.digest() for batch in forward}) == 20
    assert open_texts(stage=stage, seed=1).train.batch(0, 4).digest() != forward[0].digest()


@pytest.mark.parametrize("batch_size", [4, 6, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_another_number_of_processes_sees_the_same_rows_in_the_same_order(open_texts, batch_size, world_size):
    loader = open_texts().train
    for step in (0, 11):
        whole = loader.batch(step, batch_size)
        for rank in range(world_size):
            part = loader.batch(step, batch_size, rank, world_size)
            assert torch.equal(part.input_ids, whole.input_ids[rank::world_size])


def test_an_epoch_visits_every_row_once(open_texts):
    loader = open_texts().train
    for epoch in (0, 1):
        rows = [loader.row(epoch * loader.rows_per_epoch + index) for index in range(loader.rows_per_epoch)]
        assert len({row.input_ids.tobytes() + row.labels.tobytes() for row in rows}) == loader.rows_per_epoch


def test_fewer_rows_than_a_batch_wrap_into_the_next_epoch(open_texts):
    loader = open_texts(count=2, validation_fraction=0).train
    assert loader.rows_per_epoch < 8
    assert loader.batch(0, 8).input_ids.shape == (8, 32)


def test_validation_scores_every_held_out_byte_once_and_training_none(open_texts, tiny_tokenizer):
    data = open_texts(validation_fraction=0.2, sequence_length=16)
    training = [data.train.batch(step, 1) for step in range(data.train.rows_per_epoch)]
    held_out = list(data.validation.batches(4))
    everything = open_texts(validation_fraction=0, sequence_length=16).train
    all_rows = [everything.batch(step, 1) for step in range(everything.rows_per_epoch)]
    assert labels_of(training) + labels_of(held_out) == labels_of(all_rows)
    assert data.counts["validation_documents"] == data.validation.num_documents > 0
    assert data.counts["train_documents"] + data.validation.num_documents == 60
    ids = [int(x) for batch in held_out for x in batch.labels.flatten() if x != IGNORE_INDEX]
    assert data.validation.num_bytes == len(tiny_tokenizer.decode(ids, skip_special_tokens=True).encode())


def test_ranks_share_the_validation_rows(open_texts):
    validation = open_texts(validation_fraction=0.5).validation
    parts = [labels_of(validation.batches(3, rank, 3)) for rank in range(3)]
    assert sum(parts, Counter()) == labels_of(validation.batches(4))


def test_validation_sources_are_used_whole(open_texts, write_jsonl):
    path = write_jsonl([{"text": "held out one"}, {"text": "held out two"}], "validation.jsonl")
    data = open_texts(validation=str(path))
    assert data.validation.num_bytes == 24
    assert data.counts["train_documents"] == 60


def test_evaluation_covers_a_source_beyond_the_validation_limit(write_jsonl, data_config, tiny_tokenizer):
    path = write_jsonl([{"text": f"text {number}"} for number in range(10)])
    data = data_config(str(path), max_validation_documents=3)
    validation = open_validation(data.train, data, tiny_tokenizer, "pretrain")
    assert (validation.num_documents, validation.num_bytes) == (10, 60)


def test_the_split_is_seeded_stable_and_never_empty(data_config):
    data = data_config("x", validation_fraction=0.1, max_validation_documents=None)
    train, held = split_documents([1000], data, seed=0)
    assert 70 < len(held[0]) < 130
    assert sorted([*train[0], *held[0]]) == list(range(1000))
    _, more = split_documents([2000], data, seed=0)
    assert set(held[0]) == {index for index in more[0] if index < 1000}  # appending moves nothing
    assert set(held[0]) != set(split_documents([1000], data, seed=1)[1][0])

    for fraction in (0.001, 0.5, 0.999):
        for count in (2, 3):
            train, held = split_documents([count], data.model_copy(update={"validation_fraction": fraction}), 0)
            assert len(train[0]) >= 1
            assert len(held[0]) >= 1
    assert [len(part[0]) for part in split_documents([1], data, 0)] == [1, 0]


def test_held_out_documents_beyond_the_limit_stay_unused(data_config):
    data = data_config("x", validation_fraction=0.5, max_validation_documents=7)
    train, held = split_documents([100, 50], data, seed=0)
    assert sum(map(len, held)) == 7
    assert 40 < sum(map(len, train)) < 110


def test_document_hashes_are_uniform():
    values = document_hashes(100_000, 0, 0)
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert abs(counts - 10_000).max() < 500  # five standard deviations of a binomial are 474


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ((3, 1), [768, 256]),
        ((1, 1, 1), [342, 341, 341]),
        ((1, 1e-9), [1023, 1]),
        ((1e-9, 1e-9, 1), [1, 1, 1022]),
    ],
)
def test_shares_of_a_block_follow_the_weights(weights, quotas):
    assert apportion(weights, 1024).tolist() == quotas


def open_mixture(write_jsonl, data_config, tiny_tokenizer, weights, seed=0):
    sources = []
    for name, weight in zip("ab", weights, strict=True):
        rows = [{"text": f"{name * 60} {number}"} for number in range(30)]
        sources.append({"path": str(write_jsonl(rows, f"{name}.jsonl")), "weight": weight})
    return open_data(data_config(sources, validation_fraction=0), tiny_tokenizer, "pretrain", seed)


def test_a_weighted_mixture_has_the_shares_and_walks_each_source(write_jsonl, data_config, tiny_tokenizer):
    loader = open_mixture(write_jsonl, data_config, tiny_tokenizer, (3, 1)).train
    assert loader.rows_per_epoch == sum(packing.num_rows for packing in loader.packings)
    numbers = [loader.locate(row) for row in range(3 * 1024)]
    for block in range(3):
        owners = Counter(source for source, _ in numbers[block * 1024 : (block + 1) * 1024])
        assert owners == {0: 768, 1: 256}
    for source in (0, 1):
        assert [row for owner, row in numbers if owner == source] == list(range(3 * (768, 256)[source]))
    assert loader.locate(5) == numbers[5]
    again = open_mixture(write_jsonl, data_config, tiny_tokenizer, (3, 1)).train
    assert again.batch(300, 4).digest() == loader.batch(300, 4).digest()


def test_unweighted_sources_form_one_pool(write_jsonl, data_config, tiny_tokenizer):
    loader = open_mixture(write_jsonl, data_config, tiny_tokenizer, (None, None)).train
    assert len(loader.packings) == 1
    rows = [tiny_tokenizer.decode(loader.row(index).input_ids) for index in range(loader.rows_per_epoch)]
    assert any("aaa" in row and "bbb" in row for row in rows)


def test_the_fingerprint_follows_data_and_packing_but_not_the_seed(open_texts):
    first = open_texts()
    assert first.fingerprint == open_texts(seed=3).fingerprint
    others = [open_texts(count=61), open_texts(sequence_length=64), open_texts(validation_fraction=0.3)]
    assert len({first.fingerprint, *(data.fingerprint for data in others)}) == 4


def test_no_row_to_train_on_is_a_user_error(open_texts, monkeypatch):
    from minimoe.data.packing import SplitPacking

    build = SplitPacking.__init__

    def build_empty(self, *values):
        build(self, *values)
        self.num_rows = 0

    monkeypatch.setattr(SplitPacking, "__init__", build_empty)
    with pytest.raises(UserError, match="0 rows to train on"):
        open_texts()
