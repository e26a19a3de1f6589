from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import tiny_model

from minimoe.config import PretrainRun, SftRun, TokenizerRun, TrainingRun
from minimoe.config.file import TRAINING_RUNS, dump_config, load_config
from minimoe.config.training import RATES, OptimizerConfig
from minimoe.errors import UserError
from minimoe.model.config import num_parameters

BASE = """\
output_dir: out
tokenizer: tok
model: {hidden_size: 32}
data:
  train: a.txt
train:
  max_steps: 10
"""


def load(tmp_path: Path, text: str, *overrides: str) -> PretrainRun:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(PretrainRun, path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_overrides_win_over_yaml_and_yaml_over_defaults(tmp_path):
    config = load(tmp_path, BASE, "train.max_steps=20", "optimizer.lr=1e-4", "data.train=[b.txt, c.txt]")
    assert config.train.max_steps == 20
    assert config.optimizer.lr == 1e-4
    assert [source.path for source in config.data.train] == ["b.txt", "c.txt"]
    assert config.data.sequence_length == 512


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load(tmp_path, BASE)
    assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize("key", ["stage", "chat"])
def test_what_the_class_of_a_run_says_is_no_key_of_its_file(tmp_path, key):
    assert key not in yaml.safe_load(dump_config(load(tmp_path, BASE)))
    assert f"{key}: unknown key" in refusal(tmp_path, BASE, f"{key}=sft")


def test_the_stage_of_a_file_is_told_by_its_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    assert load_config(TrainingRun, path).stage == "pretrain"
    path.write_text("output_dir: out\ninit_from: m\ndata: {train: a.txt}\ntrain: {max_steps: 10}\n")
    assert load_config(TrainingRun, path, ["seed=3"]).stage == "sft"
    with pytest.raises(UserError, match="init_form: unknown key"):
        load_config(TrainingRun, path, ["init_form=m"])


def test_off_is_a_word_and_1e_4_is_a_number(tmp_path):
    config = load(tmp_path, BASE + "logging: {project: off}\noptimizer: {lr: 1e-4}\n")
    assert config.logging.project == "off"
    assert config.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("learning_rat: 3\n", "learning_rat: unknown key"),
        ("optimizer: {learnin_rate: 1}\n", "unknown key"),
        ("schedule: {warmup_step: 1}\n", "did you mean 'warmup_steps'? (run.yaml:8)"),
        ("seed: 1.5\n", "seed: "),
        ("seed: yes\n", "seed: input should be a valid integer"),
        ("seed: true\n", "seed: expected int, not a boolean"),
        ("optimizer: {lr: .nan}\n", "optimizer.lr"),
        ("optimizer: {lr: -1}\n", "greater than 0, got -1"),
        ("optimizer: {lr: fast}\n", "got 'fast'"),
        ("logging: {trackers: [wand]}\n", "'wandb', 'tensorboard' or 'trackio'"),
        ("logging: {trackers: [wandb, wandb]}\n", "named twice"),
        ("logging: {online: true}\n", "online is for wandb"),
        ("seed: 1\nseed: 2\n", "duplicate key seed, first on line 8"),
        ("data: {train: b.txt}\n", "duplicate key data"),
        ("x: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: [1, 2\n", "not valid YAML"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_rule(tmp_path, addition, message):
    text = refusal(tmp_path, BASE + addition).replace(f"{tmp_path}/", "")
    assert message in text
    assert "run.yaml" in text
    assert "Traceback" not in text


def test_a_boolean_wants_true_or_false(tmp_path):
    assert "write true or false, got 'no'" in refusal(tmp_path, BASE, "train.compile=no")


def test_steps_and_epochs_replace_each_other(tmp_path):
    assert load(tmp_path, BASE, "train.epochs=2").train.max_steps is None
    in_epochs = BASE.replace("max_steps: 10", "epochs: 3")
    assert load(tmp_path, in_epochs, "train.max_steps=5").train.epochs is None
    assert "exactly one of max_steps or epochs" in refusal(tmp_path, BASE, "train.epochs=2", "train.max_steps=5")


VALIDATED = BASE.replace("train: a.txt", "train: a.txt\n  validation: b.txt")


@pytest.mark.parametrize("override", ["data.train=mine.jsonl", "data.train=[{path: mine.jsonl, weight: 2}]"])
def test_other_training_documents_are_not_validated_on_the_files(tmp_path, capsys, override):
    config = load(tmp_path, VALIDATED, override)
    assert config.data.validation is None
    assert config.data.validation_fraction == 0.02
    assert "data.validation is left out" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [(), ("data.sequence_length=64",), ("data.train=c", "data.validation=b.txt")])
def test_validation_documents_stay_when_they_are_meant(tmp_path, capsys, overrides):
    assert load(tmp_path, VALIDATED, *overrides).data.validation[0].path == "b.txt"
    assert capsys.readouterr().err == ""


def test_a_learning_rate_belongs_to_its_optimizer(tmp_path, capsys):
    assert load(tmp_path, BASE).optimizer.lr == 0.02
    assert load(tmp_path, BASE, "optimizer.name=adamw").optimizer.lr == RATES["adamw"].default
    assert capsys.readouterr().err == ""
    with_muons_rate = BASE + "optimizer: {name: muon, lr: 0.03}\n"
    assert load(tmp_path, with_muons_rate).optimizer.lr == 0.03
    assert load(tmp_path, with_muons_rate, "optimizer.name=adamw").optimizer.lr == RATES["adamw"].default
    assert "optimizer.lr is left out, as optimizer.name is another" in capsys.readouterr().err
    assert load(tmp_path, with_muons_rate, "optimizer.name=adamw", "optimizer.lr=1e-4").optimizer.lr == 1e-4


def test_a_model_to_continue_from_replaces_tokenizer_and_architecture(tmp_path, capsys):
    config = load(tmp_path, BASE, "init_from=runs/base/final")
    assert (config.tokenizer, config.model, config.tokenizer_source) == (None, None, "runs/base/final")
    assert "model is left out, as it comes from init_from" in capsys.readouterr().err
    assert "leave out tokenizer and model" in refusal(tmp_path, BASE, "init_from=x", "model={hidden_size: 64}")
    assert "tokenizer: required, but missing" in refusal(tmp_path, BASE, "tokenizer=null")


@pytest.mark.parametrize(
    ("values", "doubted"),
    [
        ({}, []),
        ({"name": "adamw"}, []),
        ({"name": "adamw", "lr": 0.02}, ["optimizer.lr 0.02"]),
        ({"lr": 2, "adamw_lr": 1}, ["optimizer.lr 2", "optimizer.adamw_lr 1"]),
        ({"lr": 3e-4}, ["optimizer.lr 0.0003"]),
    ],
)
def test_a_rate_far_outside_its_optimizers_range_is_doubted(values, doubted):
    doubts = OptimizerConfig.model_validate(values).doubts()
    assert [doubt.partition(" is far")[0] for doubt in doubts] == doubted


def test_all_problems_are_reported_together(tmp_path):
    text = refusal(tmp_path, BASE, "train.max_steps=0", "optimizer.lr=-1", "seed=x", "modle=3")
    assert text.startswith("4 problems")
    for part in ("train.max_steps", "optimizer.lr", "seed", "modle: unknown key, did you mean 'model'"):
        assert part in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=null", "exactly one of max_steps or epochs"),
        ("train.micro_batch_size=5", "micro_batch_size 5 does not divide batch_size 32"),
        ("data.train=[]", "non-empty list"),
        ("data.train={hub: a/b, path: c}", "exactly one of path or hub"),
        ("data.train={path: c, split: test}", "split: only of a hub dataset, and c is a local path"),
        ("data.train=[{path: a, weight: 1}, b]", "weight to every source or to none"),
        ("optimizer.betas=[0.9, 1.5]", "each beta must be in [0, 1)"),
        ("train.max_steps", "is not key=value"),
        ("output_dir.x=1", "is a value, not a section"),
    ],
)
def test_contradictions_and_malformed_overrides_are_refused(tmp_path, override, message):
    assert message in refusal(tmp_path, BASE, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not found"), (b"", "it is empty"), (b"- 1\n", "it is list"), (b"\xff\xfe\x00", "cannot read")],
)
def test_a_missing_empty_or_binary_file_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(PretrainRun, path)


# Those in configs/tasks are lm-eval's, see test_tasks.py.
RECIPES = [
    path for path in sorted(Path(__file__).parent.parent.glob("configs/*/*.yaml")) if path.parent.name != "tasks"
]


def test_there_are_recipes():
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_loads_and_explains_every_key(path):
    from minimoe.config import GenerateRun

    kinds = {"tokenizer": TokenizerRun, "generate": GenerateRun, "lora": SftRun, "tools": SftRun, **TRAINING_RUNS}
    kind = next(kind for name, kind in kinds.items() if path.stem.startswith(name))
    config = load_config(kind, path)
    if getattr(config, "model", None):
        from minimoe import MiniMoeConfig

        MiniMoeConfig(**config.model)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        is_leaf = ":" in line and not line.strip().startswith("#") and line.split("#")[0].strip()[-1] != ":"
        assert not is_leaf or "#" in line, f"{path}:{number} has no comment"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "head_dim": 10},
        {"n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        {"first_k_dense_replace": 2},
    ],
)
def test_parameters_by_arithmetic_are_those_of_the_model(changes):
    model = tiny_model(**changes)
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    idle = sum(count for name, count in counted.items() if ".experts." in name) * 4 // 6  # 2 of 6 experts are chosen
    assert num_parameters(vars(model.config)) == sum(counted.values())
    assert num_parameters(vars(model.config), active=True) == sum(counted.values()) - idle


def test_minimind_recipes_have_the_published_sizes():
    """Millions of (total, active) parameters; published are 145M for hidden 640, and 198M with 64M active for 768."""
    sizes = {}
    for path in RECIPES:
        if path.parent.name == "minimind" and path.stem.startswith("pretrain"):
            model = yaml.safe_load(path.read_text())["model"]
            sizes[path.stem] = tuple(round(num_parameters(model, active=active) / 1e6) for active in (False, True))
    assert sizes["pretrain_640"][0] == 145
    assert sizes["pretrain_768"] == (198, 64)
    assert sizes["pretrain_512"] == (95, 60)  # not published; counted by hand from the seed's shapes
