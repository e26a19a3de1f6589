"""A hundred generated mistakes against the contract of `malformed.py`, and the proof that only the mistake matters."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from scripts.chaos.malformed import make_workspace, run_case, violation
from scripts.chaos.malformed_inputs import CONFIGS, GENERATE, STRATEGIES, Case


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.mark.parametrize("kind", STRATEGIES)
def test_malformed_input_ends_quickly_with_a_short_message(root, kind):
    @settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(STRATEGIES[kind])
    def check(case: Case) -> None:
        outcome = run_case(case, root)
        assert violation(case, outcome) is None, outcome

    check()


@pytest.mark.parametrize("command", CONFIGS)
def test_the_configs_are_right_without_the_mistake(root, command):
    files = {"config.yaml": json.dumps(CONFIGS[command]).replace("{root}", str(root)).encode()}
    outcome = run_case(Case((command, "config.yaml"), files), root)
    assert outcome.code == 0, outcome
    assert violation(Case((command,)), outcome) == "silent"  # what a mistake that is passed over is called


def test_generate_and_evaluate_are_right_without_the_mistake(root):
    assert run_case(Case((*GENERATE, "--prompt", "x", "max_new_tokens=1")), root).code == 0
    words = ("evaluate", "{root}/model", "--device", "cpu", "--data", "{root}/data.jsonl")
    assert run_case(Case(words), root).code == 0


# Cases that deserve a name beside the generated ones.
BOMB = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "alias"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("model: {hidden_size: 1000000000000}", "parameters"),
        ("model: {num_hidden_layers: 1000000000}", "at most 1000"),
        ("train:", "train: "),
        ("a: " + "x" * (1 << 18), "longer than 256 KiB"),
    ],
    ids=["aliases", "nesting", "digits", "width", "layers", "null", "size"],
)
def test_a_config_that_would_fill_memory_or_time_is_refused(root, text, message):
    base = "".join(f"{key}: {json.dumps(value)}\n" for key, value in CONFIGS["pretrain"].items())
    lines = [line for line in base.splitlines() if not line.startswith(text.partition(":")[0] + ":")]
    outcome = run_case(Case(("pretrain", "c.yaml"), {"c.yaml": "\n".join([*lines, text]).encode()}), root)
    assert (outcome.code, violation(Case(("pretrain",)), outcome)) == (2, None), outcome
    assert message in outcome.message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=fp16", "'auto', 'fp32' or 'bf16'"),
        ("logging.run_name=../../x", "plain name"),
        ("output_dir=/", "a folder that a run can have for itself"),
        ("output_dir={root}/data.jsonl", "is a file"),
        ("train.max_steps=1 train.max_steps=2", "given twice"),
    ],
)
def test_an_override_that_cannot_be_is_named(root, override, message):
    files = {"c.yaml": json.dumps(CONFIGS["pretrain"]).replace("{root}", str(root)).encode()}
    outcome = run_case(Case(("pretrain", "c.yaml", *override.split()), files), root)
    assert outcome.code == 2
    assert message in outcome.message


class _Payload:
    """Unpickling it makes the folder it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "training_args.bin"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_in_a_model_folder_is_never_executed(root, tmp_path, name, alone):
    trap = tmp_path / "trap"
    files = {f"model/{name}": pickle.dumps(_Payload(trap))} | ({"model/model.safetensors!": b""} if alone else {})
    outcome = run_case(Case(("generate", "model", "--prompt", "x", "max_new_tokens=1"), files), root)
    assert outcome.code == (2 if alone else 0), outcome
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}),
        ("tokenizer_config.json", {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}),
    ],
)
def test_code_in_a_model_folder_is_never_executed_and_never_asked_about(root, tmp_path, name, values):
    trap = tmp_path / "trap"
    code = f"import os\nos.mkdir({str(trap)!r})\nclass C: pass\n".encode()
    files = {"model/evil.py": code, f"model/{name}+": json.dumps(values).encode()}
    outcome = run_case(Case(("generate", "model", "--prompt", "x", "max_new_tokens=1"), files), root)
    assert violation(Case(("generate",)), outcome) in (None, "silent"), outcome  # refused, or opened as our own
    assert not trap.exists()
