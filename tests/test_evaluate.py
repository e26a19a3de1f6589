from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from minimoe.data import shards
from minimoe.data.loader import open_validation
from minimoe.errors import StorageError, UserError
from minimoe.evaluate.perplexity import Evaluation, evaluate_model, evaluate_source, run
from minimoe.tokenizer import document_ids

TEXTS = ["The cat sat on the mat.", "Once upon a time there was a boat, a very long boat indeed, and it sailed.", "Hi."]


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    model = tiny_model(vocab_size=448).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def test_bits_per_byte_is_the_surprise_of_every_token_over_the_bytes_of_the_text(
    folder, tiny_tokenizer, write_jsonl, data_config
):
    _, model = folder
    data = data_config(str(write_jsonl([{"text": text} for text in TEXTS])), sequence_length=64)
    validation = open_validation(data.train, data, tiny_tokenizer, "pretrain")
    result = evaluate_model(model.train(), validation, batch_size=2)
    assert model.training  # the mode is given back
    model.eval()
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([document_ids(tiny_tokenizer, text)])
        nats += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result.num_tokens == tokens
    assert result.num_bytes == num_bytes
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_the_command_scores_a_folder_and_prints_json(folder, write_jsonl, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of tokenised data
    path = write_jsonl([{"text": text, "id": 1} for text in TEXTS])
    run(str(folder[0]), str(path), json_output=True, batch_size=2, device="cpu")
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert f"ignored columns: id ({len(TEXTS)} rows)" in err
    result = evaluate_source(str(folder[0]), str(path), batch_size=3, device="cpu")
    assert printed["num_bytes"] == result.num_bytes
    assert printed["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-5)


def test_answers_only_counts_what_the_assistant_says(folder, write_jsonl, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [{"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "On the mat."}]}]
    path = write_jsonl(rows)
    answers = evaluate_source(str(folder[0]), str(path), answers_only=True, device="cpu")
    whole = evaluate_source(str(folder[0]), str(path), device="cpu")
    assert answers.num_bytes == len("On the mat.")
    assert answers.num_tokens < whole.num_tokens
    assert whole.num_bytes == len("Where?") + len("On the mat.")  # the chat's markup is nobody's text


def test_how_documents_are_read_is_written_as_in_a_config(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Hi."}\nno row\n')
    words = (str(folder[0]), str(path))
    with pytest.raises(UserError, match="malformed JSON") as caught:
        evaluate_source(*words, device="cpu", overrides=[f"data.cache_dir={tmp_path}"])
    assert "data.on_bad_rows: skip" in caught.value.fix
    skipping = [f"data.cache_dir={tmp_path}", "data.on_bad_rows=skip"]
    assert evaluate_source(*words, device="cpu", overrides=skipping).num_bytes == len("Hi.")
    with pytest.raises(UserError, match="every document is scored"):
        evaluate_source(*words, device="cpu", overrides=["data.validation_fraction=0.1"])
    with pytest.raises(UserError, match=r"data.sequence_length is given twice"):
        evaluate_source(*words, device="cpu", sequence_length=16, overrides=["data.sequence_length=8"])


def test_a_cache_that_cannot_be_written_is_named_as_it_was_given(folder, write_jsonl, monkeypatch, tmp_path):
    path = write_jsonl([{"text": "Hi."}])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    monkeypatch.setattr(shards, "encode_all", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for overrides, name in (((), "XDG_CACHE_HOME"), ((f"data.cache_dir={tmp_path / 'full'}",), "data.cache_dir")):
        with pytest.raises(StorageError, match="No space left") as caught:
            evaluate_source(str(folder[0]), str(path), device="cpu", overrides=overrides)
        assert f"set {name} to" in caught.value.fix


def test_another_kind_of_model_is_refused(tmp_path, tiny_tokenizer, write_jsonl):
    sizes = {"vocab_size": 448, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="a qwen3 model"):
        evaluate_source(str(tmp_path / "other"), str(write_jsonl([{"text": "Hi."}])), device="cpu")


def test_a_hopeless_model_has_an_infinite_perplexity_and_not_an_overflow():
    assert Evaluation(loss=1000.0, num_tokens=1, num_bytes=1).perplexity == math.inf
