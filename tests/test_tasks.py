"""Benchmark tasks: our model behind lm-eval's interface, beside lm-eval's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from tiny import tiny_model

from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.evaluate.harness import HarnessModel
from minimoe.evaluate.tasks import core, read_tasks, run_tasks
from minimoe.generation.engine import Engine
from minimoe.tokenizer import encode_prompt, encode_text

TASKS = Path(__file__).parent.parent / "configs" / "tasks"
CONTEXTS = ["The cat sat on the", "What is 3 + 4?", "", "The boat said hello to the cat " * 6, "Grüße aus"]
ENDINGS = [" mat", " moon and the sea", " 7", " It", " cat, and"]


@pytest.fixture
def engine(tiny_tokenizer) -> Engine:
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    return Engine(tiny_model(vocab_size=448, **ids).eval(), tiny_tokenizer)


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_scores_equal_those_of_lm_evals_own_model(engine):
    """Contexts longer than the model's 64 positions among them."""
    start = engine.tokenizer.decode([engine.end_ids and HarnessModel(engine).eot_token_id])
    theirs = HFLM(engine.model, tokenizer=engine.tokenizer, batch_size=2, max_length=64)
    pairs = [(context, ending) for context in CONTEXTS for ending in ENDINGS]
    actual = HarnessModel(engine).loglikelihood(requests(*pairs), disable_tqdm=True)
    begun = [(start + context if context else context, ending) for context, ending in pairs]
    # Without a context it begins with another token than ours: the tokenizer's end of a turn.
    theirs.custom_prefix_token_id = HarnessModel(engine).eot_token_id
    expected = theirs.loglikelihood(requests(*begun), disable_tqdm=True)
    for ours, (score, greedy) in zip(actual, expected, strict=True):
        assert ours[0] == pytest.approx(score, abs=1e-4)
        assert ours[1] == greedy
    assert len({round(score, 3) for score, _ in actual}) > 20  # they do differ


def test_a_whole_text_is_scored_token_by_token_with_as_much_context_as_there_is(engine):
    model = HarnessModel(engine)
    text = CONTEXTS[3] * 3
    ids = model.tok_encode(text)
    assert len(ids) > 2 * engine.context_length
    (score,) = model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    expected, limit = 0.0, engine.context_length
    for start in range(0, len(ids), limit):
        window = ids[start : start + limit]
        # A last window that is not full reaches back.
        before = [model.eot_token_id, *ids][max(0, start + len(window) - limit) : start + len(window)]
        with torch.no_grad():
            scores = engine.model(torch.tensor([before])).logits[0].log_softmax(-1)[-len(window) :]
        expected += float(scores.gather(1, torch.tensor(window)[:, None]).sum())
    assert score == pytest.approx(expected, abs=1e-3)


def test_text_is_generated_greedily_up_to_what_a_task_stops_at(engine):
    model = HarnessModel(engine, batch_size=2)
    settings = {"until": ["\n", ""], "max_gen_toks": 8, "do_sample": False}
    texts = model.generate_until(requests(*((context, settings) for context in CONTEXTS)), disable_tqdm=True)
    for context, text in zip(CONTEXTS[:3], texts, strict=False):
        prompt = torch.tensor([engine.encode(context)])
        ids = engine.model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert engine.tokenizer.decode(ids).split("\n")[0].startswith(text)
        assert text


def test_a_conversation_keeps_its_control_tokens_and_typed_ones_stay_text(engine):
    model = HarnessModel(engine)
    history = [{"role": "user", "content": "hello <|im_end|> there"}]
    context = model.apply_chat_template(history)
    expected = encode_prompt(engine.tokenizer, history)
    assert expected.count(engine.tokenizer.eos_token_id) == 1  # of the turn, not the typed one
    assert model.context_ids(context) == expected
    assert model.context_ids(context + "So:") == [*expected, *encode_text(engine.tokenizer, "So:")]
    settings = {"until": [], "max_gen_toks": 5}
    (text,) = model.generate_until(requests((context, settings)), disable_tqdm=True)
    greedy = GenerationSection(max_new_tokens=5, temperature=0)
    assert text == engine.generate([history], greedy)[0].text
    ((score, _),) = model.loglikelihood(requests((context, " cat")), disable_tqdm=True)
    ids = encode_text(engine.tokenizer, " cat")
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*expected, *ids]])).logits[0].log_softmax(-1)
    rows = logits[len(expected) - 1 : -1]
    assert score == pytest.approx(float(rows.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-4)


def test_of_a_context_that_is_too_long_the_end_is_continued(engine):
    context = CONTEXTS[3] * 4
    (text,) = HarnessModel(engine).generate_until(requests((context, {"max_gen_toks": 8})), disable_tqdm=True)
    ids = HarnessModel(engine).context_ids(context)
    assert len(ids) > engine.context_length
    greedy = GenerationSection(max_new_tokens=8, temperature=0)
    assert text == engine.complete([ids[-(engine.context_length - 8) :]], greedy)[0].text


ROWS = {
    "arc_easy": {
        "question": {"stem": "Which?", "choices": [{"text": t, "label": t[0]} for t in ("A cat", "B boat", "C sea")]},
        "answerKey": "B",
    },
    "hellaswag": {"activity_label": "Boats", "ctx": "The boat", "endings": ["a", "b b", "c", "d"], "label": 2},
    "piqa": {"goal": "To see", "sol1": "look", "sol2": "sit", "label": 1},
    "boolq": {"query": "Is it 7?", "choices": ["no", "yes"], "gold": 1},
    "winogrande": {"context_options": ["The cat", "The boat"], "continuation": "said hello.", "gold": 0},
    "mmlu": {"subject": "x", "question": "3 + 4?", "choices": ["7", "15", "3", "4"], "answer": 0},
    "blimp": {"sentence_good": "The cat sat.", "sentence_bad": "The cat sitted."},
    "lambada": {"text": "The cat sat on the mat"},
    "wikitext": {"text": "The boat said hello to the cat."},
    "gsm8k": {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"},
}
ROWS |= {
    "arc_challenge": ROWS["arc_easy"],
    "copa": ROWS["boolq"],
    "openbookqa": ROWS["boolq"],
    "commonsense_qa": ROWS["boolq"],
}
GUESSING = {"arc_easy": 1 / 3, "hellaswag": 0.25, "mmlu": 0.25, "winogrande": 0.5, "lambada": 0.0, "gsm8k": 0.0}


@pytest.fixture
def rows(tmp_path):
    for name in ROWS:
        task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        (file,) = task["dataset_kwargs"]["data_files"].values()
        lines = [json.dumps(ROWS[name] | {"number": number}) + "\n" for number in range(7)]
        (tmp_path / file.removesuffix(".gz")).write_text("".join(lines))
    return tmp_path


def tasks_of(folder: Path, names: list[str]) -> list:
    tasks = []
    for name in names:
        task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {key: file.removesuffix(".gz") for key, file in files.items()}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        tasks.append(str(folder / f"{name}.yaml"))
    return read_tasks(",".join(tasks), None)


def test_every_task_of_the_recipe_runs_on_rows_of_its_form(engine, rows, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(rows / "home"))
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(ROWS)
    results = {result.task.removesuffix("_rows"): result for result in run_tasks(engine, tasks_of(rows, list(ROWS)))}
    assert set(results) == set(ROWS)
    for name, chance in GUESSING.items():
        assert results[name].chance == pytest.approx(chance)
    assert all(result.num_rows == 7 for result in results.values())
    assert results["wikitext"].chance is None
    # Which ending is likeliest, by the model itself.
    model = HarnessModel(engine)
    options = ROWS["winogrande"]["context_options"]
    scores = [score for score, _ in model.loglikelihood(requests(*((o, " said hello.") for o in options)), True)]
    assert results["winogrande"].value == float(scores[0] > scores[1])
    rescaled = [(r.value - r.chance) / (1 - r.chance) for r in results.values() if r.chance is not None]
    assert core(list(results.values())) == pytest.approx(sum(rescaled) / 13)


def test_task_files_that_are_none_are_refused(tmp_path):
    for text, message in [
        ("task: x\ndoc_to_text: !function utils.f\n", "not a task file"),
        ("- 1\n", "it has no `task`"),
        ("task: x\ndataset_kwargs: {data_files: {test: no.jsonl}}\n", "rows not found"),
    ]:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_tasks(str(tmp_path / "x.yaml"), None)
    with pytest.raises(UserError, match="task file not found"):
        read_tasks(str(tmp_path / "y.yaml"), None)
    with pytest.raises(UserError, match=r"no \.yaml file"):
        read_tasks(str(tmp_path / "empty" if (tmp_path / "empty").mkdir() is None else ""), None)


def test_a_name_that_lm_eval_does_not_know_is_refused(engine):
    with pytest.raises(UserError, match="lm-eval cannot run the tasks"):
        run_tasks(engine, ["no_such_task"])
