"""Going on with a model: mixtures that change, re-warming, a longer context, and whether it is used."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from tiny_runs import STORIES, cut_back, outcome, run_command, training_rows, write_yaml

from minimoe.config import ContextConfig, DataConfig, PretrainRun, ScheduleConfig
from minimoe.data.loader import BLOCK_ROWS, TrainLoader, open_data
from minimoe.errors import UserError
from minimoe.evaluate import needle
from minimoe.loading import load_model
from minimoe.train import pretrain
from minimoe.train.optim import lr_at_step
from minimoe.train.pretrain import lengthened

SOURCES = [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}]


def loader_of(weights, phases=()) -> TrainLoader:
    packings = [SimpleNamespace(num_rows=7 + number) for number in range(len(weights))]
    return TrainLoader(packings, weights, 5, phases)


def test_phases_change_the_mixture_and_every_source_goes_on_where_it_was():
    loader = loader_of([3, 1, 1], [(10, [0, 1, 1]), (500, [1, 0, 0])])
    batch = 4
    located = [loader.locate(number, batch) for number in range(3000)]
    for source in range(3):  # each source's rows in their order, none missing, none twice
        rows = [index for owner, index in located if owner == source]
        assert rows == list(range(len(rows)))
    first, second, third = located[:40], located[40:2000], located[2000:]
    assert {owner for owner, _ in first} == {0, 1, 2}
    shares = Counter(owner for owner, _ in second)
    assert shares[0] == 0
    assert shares[1] == pytest.approx(980, abs=BLOCK_ROWS / 20)
    assert {owner for owner, _ in third} == {0}
    assert [loader.locate(number, batch) for number in (2999, 3, 50, 1999)] == [located[n] for n in (2999, 3, 50, 1999)]


def test_without_phases_nothing_changes():
    plain, same = loader_of([3, 1]), loader_of([3, 1], [(10**9, [1, 1])])
    assert [plain.locate(n, 4) for n in range(3000)] == [same.locate(n, 4) for n in range(3000)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"phases": [{"from_step": 5, "weights": [1]}]}, "each has a weight for each of the 2"),
        ({"phases": [{"from_step": 5, "weights": [0, 0]}]}, "at least one is more"),
        ({"phases": [{"from_step": 5, "weights": [-1, 2]}]}, "0 or more"),
        ({"phases": [{"from_step": 5, "weights": [1, 1]}, {"from_step": 5, "weights": [1, 1]}]}, "must rise"),
        ({"phases": [{"from_step": 5, "weights": [1, 1]}], "train": ["a.jsonl", "b.jsonl"]}, "give every source"),
    ],
)
def test_phases_that_say_nothing_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        DataConfig.model_validate({"train": SOURCES} | values)


@pytest.fixture
def config(pretrain_config, write_jsonl):
    def make(output: str, start: Path, phases: list | None = None, **more) -> PretrainRun:
        values = pretrain_config(output, max_steps=8).model_dump(exclude={"tokenizer", "model"})
        values |= {"init_from": str(start), **more}
        one = write_jsonl([{"text": text} for text in STORIES], "one.jsonl")
        two = write_jsonl([{"text": text.upper()} for text in STORIES], "two.jsonl")
        values["data"]["train"] = [{"path": str(one), "weight": 1}, {"path": str(two), "weight": 1e-9}]
        values["data"]["phases"] = phases or []
        return PretrainRun.model_validate(values)

    return make


def test_a_run_changes_its_data_at_a_step_and_resumes_across_it(pretrain_config, config, tiny_tokenizer):
    start = pretrain.run(pretrain_config("start"))
    made = config("more", start, [{"from_step": 4, "weights": [0, 1]}])
    pretrain.run(made)
    data = open_data(made.data, tiny_tokenizer, "pretrain", made.seed)
    texts = [tiny_tokenizer.decode(data.train.batch(step, 4).input_ids[1]) for step in (3, 4)]
    assert any(c.islower() for c in texts[0])
    assert not any(c.islower() for c in texts[1].replace("<|endoftext|>", "").replace("<|pad|>", ""))
    expected = outcome(made.output_dir)
    for step in (6, 2):
        cut_back(made.output_dir, step)
        pretrain.run(made, resume=True)
        assert outcome(made.output_dir) == expected
    plain = config("plain", start)
    pretrain.run(plain)
    hashes = [[row["batch_hash"] for row in training_rows(run.output_dir)] for run in (made, plain)]
    assert hashes[0][:4] == hashes[1][:4]
    assert hashes[0][4:] != hashes[1][4:]


def test_rewarming_starts_where_it_is_told_to():
    schedule = ScheduleConfig(name="constant", warmup_steps=4, warmup_start_ratio=0.2)
    assert [lr_at_step(step, 9, schedule) for step in range(5)] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


# ---- a longer context ----


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic", "default"])
def test_a_lengthened_model_has_the_same_weights_and_reads_further(rope_type, tmp_path, tiny_tokenizer):
    model = tiny_model(vocab_size=448)
    longer = lengthened(model, ContextConfig(length=256, rope_type=rope_type, rope_theta=20_000.0))
    assert longer.config.max_position_embeddings == 256
    for name, weight in model.state_dict().items():
        assert torch.equal(longer.state_dict()[name], weight)
    ids = torch.randint(0, 400, (1, 200))
    with torch.no_grad():
        assert longer.eval()(input_ids=ids).logits.isfinite().all()
    longer.save_pretrained(tmp_path / "longer")
    tiny_tokenizer.save_pretrained(tmp_path / "longer")
    loaded, _ = load_model(tmp_path / "longer", "cpu")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, longer(input_ids=ids).logits)
    rope = loaded.config.rope_parameters
    assert rope["rope_type"] == rope_type
    assert rope.get("factor", 4.0) == 4.0


def test_a_context_that_is_no_longer_or_scaled_twice_is_refused():
    model = tiny_model(vocab_size=448)
    with pytest.raises(UserError, match="not more than the model's 64"):
        lengthened(model, ContextConfig(length=64))
    with pytest.raises(UserError, match="scaled already"):
        lengthened(lengthened(model, ContextConfig(length=128)), ContextConfig(length=256))


def test_a_run_lengthens_the_context_and_resumes(pretrain_config, config, tmp_path, monkeypatch, capsys):
    start = pretrain.run(pretrain_config("start"))
    made = config("longer", start, context={"length": 96})
    made = made.model_copy(update={"data": made.data.model_copy(update={"sequence_length": 96})})
    final = pretrain.run(made)
    assert load_model(final, "cpu")[0].config.max_position_embeddings == 96
    expected = outcome(made.output_dir)
    cut_back(made.output_dir, 4)
    pretrain.run(made, resume=True)
    assert outcome(made.output_dir) == expected
    path = write_yaml(tmp_path / "new.yaml", pretrain_config("new"))
    assert run_command(monkeypatch, "pretrain", path, "context.length=128") == 2
    assert "lengthens a trained model" in capsys.readouterr().err


# ---- needles ----


class Reader:
    """A model that knows what was said after the needle's words, within its last `memory` tokens."""

    device = "cpu"

    def __init__(self, tokenizer, memory: int) -> None:
        self.needle = needle.encode_text(tokenizer, " " + needle.QUESTION)
        self.memory, self.vocabulary = memory, len(tokenizer)

    def __call__(self, input_ids, use_cache, logits_to_keep):
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, 1, self.vocabulary)
        length = len(self.needle)
        assert ids[-length:] == self.needle
        for at in range(max(len(ids) - self.memory, 0), len(ids) - length):
            if ids[at : at + length] == self.needle:
                logits[0, 0, ids[at + length]] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def words(tiny_tokenizer, monkeypatch) -> None:
    """Words that the tests' small vocabulary tells apart."""
    found = {
        f"{letter}ox": needle.encode_text(tiny_tokenizer, f" {letter}ox") for letter in "abcdefghijklmnopqrstuvwxyz"
    }
    chosen: dict[str, int] = {}
    for word, ids in found.items():
        if ids[0] not in chosen.values():
            chosen[word] = ids[0]
    assert len(chosen) >= 4
    monkeypatch.setattr(needle, "_distinct", lambda tokenizer: dict(list(chosen.items())[:8]))


def test_a_model_that_reads_all_finds_every_needle_and_one_that_forgets_only_near_ones(tiny_tokenizer, words):
    everything = needle.search(Reader(tiny_tokenizer, 9999), tiny_tokenizer, [120, 300], needle.DEPTHS, 4)
    assert len(everything) == 10
    assert {found.accuracy for found in everything} == {1.0}
    short = needle.search(Reader(tiny_tokenizer, 80), tiny_tokenizer, [300], [0.0, 1.0], 16)
    assert short[1].accuracy == 1.0
    assert short[0].accuracy < 0.6


def test_the_command_prints_what_it_finds(tmp_path, tiny_tokenizer, words, monkeypatch, capsys):
    folder = tmp_path / "model"
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=128, **ids).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert run_command(monkeypatch, "evaluate", folder, "--needle", "--lengths", "100", "--trials", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["depth"] for row in found["found"]] == list(needle.DEPTHS)
    assert found["chance"] == 1 / 8
    assert run_command(monkeypatch, "evaluate", folder, "--needle", "--lengths", "500") == 2
    assert "128 positions are possible" in capsys.readouterr().err
    assert run_command(monkeypatch, "evaluate", folder, "--needle", "--lengths", "many") == 2
    for words_of_others in (["--needle", "--limit", "3"], ["--needle", "--chat"], ["--data", "x", "--trials", "3"]):
        assert run_command(monkeypatch, "evaluate", folder, *words_of_others) == 2
