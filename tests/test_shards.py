from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from minimoe import tokenizer as tok
from minimoe.config import SourceConfig
from minimoe.data import encode, shards
from minimoe.errors import StorageError, UserError

TEXTS = ["The cat sat.", "Grüße 日本", "hello <|im_end|> there", "e\u0301 is one letter after NFC"]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, cat!"}]


@pytest.fixture
def prepare(data_config, tiny_tokenizer):
    def run(path, stage="pretrain", tokenizer=tiny_tokenizer, **values):
        data = data_config(str(path), **values)
        return shards.prepare(data.train[0], data, tokenizer, stage)

    return run


def documents_of(corpus: shards.Corpus) -> list[list[int]]:
    pairs = zip(corpus.offsets, corpus.offsets[1:], strict=False)
    return [corpus.tokens[start:stop].tolist() for start, stop in pairs]


def folders(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_shard_holds_every_document_and_its_bytes(prepare, write_jsonl, tiny_tokenizer):
    corpus = prepare(write_jsonl([{"text": text} for text in TEXTS]))
    assert documents_of(corpus) == [tok.document_ids(tiny_tokenizer, text) for text in TEXTS]
    assert corpus.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.learned is None
    assert corpus.counts["documents"] == len(TEXTS)
    assert corpus.counts["tokens"] == len(corpus.tokens)
    assert corpus.counts["bytes"] == corpus.num_bytes.sum()


def test_a_large_vocabulary_takes_four_bytes_a_token(prepare, write_jsonl, tiny_tokenizer_dir):
    tokenizer = tok.load_tokenizer(tiny_tokenizer_dir)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(1 << 16)])
    corpus = prepare(write_jsonl([{"text": "a <extra65535> b"}]), tokenizer=tokenizer)
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.max() == len(tokenizer) - 1 > 1 << 16


def test_sft_learns_assistant_turns_and_counts_their_bytes(prepare, write_jsonl, tiny_tokenizer):
    corpus = prepare(write_jsonl([{"messages": CHAT}]), "sft", sequence_length=64)
    ids, learned = tok.encode_chat(tiny_tokenizer, CHAT)
    assert corpus.tokens.tolist() == ids
    assert corpus.learned.tolist() == learned
    assert corpus.num_bytes.tolist() == [len("Hello, cat!")]


def test_pretraining_renders_conversations_and_learns_all_of_them(prepare, write_jsonl, tiny_tokenizer):
    corpus = prepare(write_jsonl([{"messages": CHAT}]))
    boundary = tok.boundary_id(tiny_tokenizer)
    ids = tok.encode_chat(tiny_tokenizer, CHAT)[0]
    assert corpus.tokens.tolist() == [boundary, *ids, boundary]
    assert corpus.learned is None


def test_overlong_conversations_are_truncated_and_empty_ones_dropped(prepare, write_jsonl):
    rows = [
        {"prompt": "Hi", "completion": "hello " * 200},  # truncated
        {"prompt": "Hi " * 200, "completion": "hello"},  # no answer left
        {"prompt": "Hi", "completion": " "},  # empty answer
        {"messages": [{"role": "user", "content": "Hi"}]},  # no answer
        {"prompt": "Hi", "completion": "hello"},
    ]
    corpus = prepare(write_jsonl(rows), "sft")
    assert corpus.counts["documents"] == 2
    assert corpus.counts["truncated"] == 1
    assert corpus.counts["dropped"] == 3
    assert np.diff(corpus.offsets).max() == 32


def test_nothing_to_learn_at_all_is_a_user_error(prepare, write_jsonl, tmp_path):
    with pytest.raises(UserError, match="nothing to learn"):
        prepare(write_jsonl([{"prompt": "Hi", "completion": ""}]), "sft")
    assert folders(tmp_path) == []


def test_plain_text_for_sft_is_a_user_error_that_names_the_formats(prepare, write_jsonl):
    with pytest.raises(UserError) as caught:
        prepare(write_jsonl([{"text": "a"}]), "sft")
    assert "prompt_completion" in caught.value.fix


def test_the_shard_is_the_same_whatever_the_number_of_processes(prepare, write_jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "CHUNKS_IN_PROCESS", 2)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 200)
    path = write_jsonl([{"text": f"document number {number} about a cat"} for number in range(100)])
    one = prepare(path, num_processes=1, cache_dir=str(tmp_path / "one"))
    two = prepare(path, num_processes=2, cache_dir=str(tmp_path / "two"))
    assert one.fingerprint == two.fingerprint
    assert documents_of(one) == documents_of(two)
    assert one.num_bytes.tolist() == two.num_bytes.tolist()
    assert one.counts == two.counts


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("sleep:999", "silent for 2 s"),
        ("raise", "failed: ValueError: a failpoint"),
        ("kill", "process died"),
    ],
)
def test_a_tokenisation_process_that_fails_names_the_cause_and_the_rows(
    prepare, write_jsonl, monkeypatch, tmp_path, action, message
):
    monkeypatch.setattr(encode, "CHUNKS_IN_PROCESS", 0)
    if "sleep" in action:
        monkeypatch.setattr(encode, "TIMEOUT", 2)
    monkeypatch.setenv("MINIMOE_FAILPOINTS", f"tokenise.chunk={action}")
    path = write_jsonl([{"text": text} for text in TEXTS])
    with pytest.raises(StorageError, match=message) as caught:
        prepare(path, num_processes=2)
    assert caught.value.where == f"{path}:1 to {path}:{len(TEXTS)}"
    assert folders(tmp_path) == []


def test_a_conversation_that_cannot_be_rendered_is_named(prepare, write_jsonl, tiny_tokenizer_dir):
    tokenizer = tok.load_tokenizer(tiny_tokenizer_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if m.content != 'Hm' else 1 / 0 }}{% endfor %}"
    path = write_jsonl([{"messages": CHAT}, {"messages": [{"role": "user", "content": "Hm"}]}])
    with pytest.raises(UserError, match="division by zero") as caught:
        prepare(path, tokenizer=tokenizer)
    assert caught.value.where == f"{path}:2"


def test_the_cache_is_used_again_and_follows_data_tokenizer_and_settings(
    prepare, write_jsonl, monkeypatch, tiny_tokenizer_dir
):
    built = []
    encode_all = shards.encode_all
    monkeypatch.setattr(shards, "encode_all", lambda *values: built.append(1) or encode_all(*values))
    rows = [{"text": text} for text in TEXTS]
    first = prepare(write_jsonl(rows))
    again = prepare(write_jsonl(rows), sequence_length=64, num_processes=2)  # neither matters for pretraining
    assert len(built) == 1
    assert documents_of(first) == documents_of(again)

    other = tok.load_tokenizer(tiny_tokenizer_dir)
    other.add_tokens(["<x>"])
    seen = {first.fingerprint}
    for corpus in (
        prepare(write_jsonl(rows), tokenizer=other),
        prepare(write_jsonl(rows), max_documents=2),
        prepare(write_jsonl(rows), on_bad_rows="skip"),
        prepare(write_jsonl([*rows, {"text": "one more"}])),
    ):
        assert corpus.fingerprint not in seen
        seen.add(corpus.fingerprint)
    assert len(built) == 5


@pytest.mark.parametrize("damage", ["truncate", "delete", "meta"])
def test_a_damaged_shard_is_built_again(prepare, write_jsonl, tmp_path, damage):
    path = write_jsonl([{"text": text} for text in TEXTS])
    expected = documents_of(prepare(path))
    (folder,) = folders(tmp_path)
    if damage == "truncate":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    elif damage == "delete":
        (folder / "offsets.bin").unlink()
    else:
        (folder / "meta.json").write_text("{")
    assert documents_of(prepare(path)) == expected


def test_an_interrupted_build_leaves_nothing(prepare, write_jsonl, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = write_jsonl([{"text": "a"}])
    monkeypatch.setattr(shards, "encode_all", fail)
    with pytest.raises(StorageError, match="No space left"):
        prepare(path)
    assert folders(tmp_path) == []


def test_a_token_id_outside_the_vocabulary_names_the_document(prepare, write_jsonl, tmp_path):
    path = write_jsonl([{"text": text} for text in TEXTS])
    corpus = prepare(path)
    (folder,) = folders(tmp_path)
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    tokens[corpus.offsets[2] + 1] = 60_000
    tokens.tofile(folder / "tokens.bin")
    with pytest.raises(UserError, match="document 2 has token id 60000"):
        prepare(path)


def test_every_sample_becomes_a_shard(prepare, tmp_path):
    samples = sorted((Path(__file__).parents[1] / "data" / "samples").iterdir())
    import pyarrow
    import pyarrow.parquet

    copies = tmp_path / "samples"
    copies.mkdir()
    for sample in samples:
        shutil.copy(sample, copies)
    rows = [json.loads(line) for line in (copies / "messages.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), copies / "messages.parquet")
    (copies / "prompts.jsonl").unlink()  # which a stage reads that tokenises nothing
    for name, encoding in (("preference.jsonl", "pairs"), ("label.jsonl", "labels")):
        corpus = prepare(copies / name, encoding, sequence_length=256)
        assert corpus.counts["documents"] == len(corpus.splits) == 2
        (copies / name).unlink()
    for sample in sorted(copies.iterdir()):
        assert prepare(sample).counts["documents"] in (1, 2), sample
        if not sample.name.startswith("text"):
            corpus = prepare(sample, "sft", sequence_length=256)
            assert corpus.counts["documents"] == 2, sample
            assert 0 < corpus.learned.mean() < 1


def test_a_corpus_is_immutable(prepare, write_jsonl):
    corpus = prepare(write_jsonl([{"text": "a"}]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        corpus.fingerprint = "x"
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_max_documents_and_skipped_rows_are_counted(prepare, write_jsonl):
    rows = [{"text": "a"}, {"text": 1}, {"text": ""}, {"text": "b"}, {"text": "c"}]
    counts = prepare(write_jsonl(rows), on_bad_rows="skip", max_documents=2).counts
    assert (counts["documents"], counts["bad_rows"], counts["empty_rows"]) == (2, 1, 1)


def test_sources_fit_a_source_config_from_yaml(data_config):
    assert data_config(["a.txt", {"hub": "b/c"}]).train == (
        SourceConfig(path="a.txt"),
        SourceConfig(hub="b/c"),
    )


def test_columns_that_are_not_read_are_counted(tiny_tokenizer, data_config, write_jsonl):
    rows = [{"text": "a b", "id": number, "score": number or None} for number in range(3)]
    path = write_jsonl(rows)
    for _ in range(2):  # built, and from the cache
        corpus = shards.prepare(SourceConfig(path=str(path)), data_config(str(path)), tiny_tokenizer, "pretrain")
        assert corpus.ignored == {"id": 3, "score": 2}


def test_what_a_killed_process_was_building_is_swept_and_what_another_builds_is_not(
    tiny_tokenizer, data_config, write_jsonl
):
    path = str(write_jsonl([{"text": "a b"}]))
    cache = Path(data_config(path).cache_dir)
    dead, living = cache / "dead.building-x", cache / "living.building-x"
    for folder in (dead, living):
        folder.mkdir(parents=True)
    with FileLock(cache / "living.lock"):
        shards.prepare(SourceConfig(path=path), data_config(path), tiny_tokenizer, "pretrain")
    assert not dead.exists()
    assert living.exists()
