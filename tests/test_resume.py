"""A resumed run is the undisturbed run, byte for byte, and a run that is not the same one is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import cut_back, outcome, rows, run_command, write_yaml

from minimoe.data.loader import open_data
from minimoe.errors import CheckpointError, UserError
from minimoe.tokenizer import load_tokenizer
from minimoe.train import checkpoint, pretrain, sft

MODEL = {"attention_dropout": 0.1, "scoring_func": "sigmoid", "router_bias_update_rate": 0.01}


@pytest.fixture
def finished(pretrain_config, sft_config):
    """A run of two epochs and a bit, one row a step, a checkpoint after every step."""

    def make(stage: str, dense: bool = False):
        model = MODEL | ({"first_k_dense_replace": 2} if dense else {})
        train = {"batch_size": 1, "save_every": 1, "eval_every": 1, "keep_last": 99}
        run, config = pretrain.run, pretrain_config("whole", model, max_steps=1, **train)
        tokenizer = config.tokenizer
        if stage == "sft":
            start = pretrain.run(pretrain_config("start", model, max_steps=2))
            run, config = sft.run, sft_config(start, "whole", max_steps=1, **train)
        epoch = open_data(config.data, load_tokenizer(tokenizer), stage, config.seed).train.rows_per_epoch
        assert epoch >= 4  # so that the five points are five
        length = config.train.model_copy(update={"max_steps": 2 * epoch + 3})
        config = config.model_copy(update={"train": length})
        run(config)
        return run, config, epoch

    return make


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
def test_a_run_resumed_at_five_points_leaves_the_same_bytes(stage, dense, finished):
    run, config, epoch = finished(stage, dense)
    expected = outcome(config.output_dir)
    decay_begins = round(config.train.max_steps * (1 - config.schedule.decay_fraction))
    points = {
        "after the first step": 1,
        "mid-epoch": epoch // 2,
        "at the epoch's end": epoch,
        "after it": epoch + 1,
        "in the decay": config.train.max_steps - 2,
    }
    assert points["in the decay"] > decay_begins
    for name, step in points.items():
        cut_back(config.output_dir, step)
        torch.manual_seed(999)
        run(config, resume=True)
        assert outcome(config.output_dir) == expected, name


def edit_state(folder: Path, **values) -> None:
    file = folder / checkpoint.TRAINER_STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    seal(folder)


def seal(folder: Path) -> None:
    """A manifest that confirms the files as they are now."""
    files = [file for file in folder.iterdir() if file.name != checkpoint.MANIFEST]
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps(entries))


def drop(folder: Path, part: str) -> None:
    """Leave one part of the state out, as a forgetful trainer would."""
    kind, _, name = part.partition(" ")
    if kind == "state":
        file = folder / checkpoint.TRAINER_STATE
        state = json.loads(file.read_text())
        owner = state["guard"] if name in state["guard"] else state
        del owner[name]
        file.write_text(json.dumps(state))
    else:
        file = folder / ("model.safetensors" if kind == "weights" else checkpoint.OPTIMIZER_STATE)
        tensors = load_file(file)
        chosen = [key for key in tensors if key.endswith(name) or key.startswith(name)]
        assert chosen, part
        for key in chosen:
            tensors[key] = torch.zeros_like(tensors[key])
        if kind == "rng":
            tensors[chosen[0]] = torch.Generator().manual_seed(1).get_state()
        save_file(tensors, file, metadata={"format": "pt"})
    seal(folder)


PARTS = [
    *(f"state {name}" for name in "step tokens best_val_loss best_step wandb_run_id data_fingerprint config".split()),
    *(f"state {name}" for name in "loss_mean loss_variance losses_seen idle_steps".split()),
    *("weights embed_tokens.weight", "weights gate.weight", "weights down_proj.weight", "weights q_norm.weight"),
    "weights e_score_correction_bias",
    *("optimizer momentum_buffer", "optimizer exp_avg", "optimizer exp_avg_sq", "optimizer step"),
    "rng rng.0.cpu",
]


def test_dropping_any_part_of_the_state_is_noticed(finished):
    run, config, epoch = finished("pretrain")
    step = epoch + 1
    folder = cut_back(config.output_dir, step)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            tensor[0] = -100.0  # expert 0 idle: the guard counts its steps
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    guard = json.loads((folder / checkpoint.TRAINER_STATE).read_text())["guard"] | {"idle_steps": [[5, 0, 0, 0]] * 2}
    edit_state(folder, wandb_run_id="abc", best_val_loss=0.1, best_step=1, guard=guard)
    shutil.copytree(config.output_dir, f"{config.output_dir}.kept")

    def resumed(part: str | None) -> dict[str, object] | str:
        shutil.rmtree(config.output_dir)
        shutil.copytree(f"{config.output_dir}.kept", config.output_dir)
        if part is not None:
            drop(cut_back(config.output_dir, step), part)
        try:
            run(config, resume=True)
        except (UserError, CheckpointError, KeyError) as error:
            return repr(error)
        return outcome(config.output_dir)

    expected = resumed(None)
    assert resumed(None) == expected
    for part in PARTS:
        assert resumed(part) != expected, part


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("model", "hidden_size", 64, "model.hidden_size from 32 to 64"),
        ("model", "num_experts_per_tok", 1, "model.num_experts_per_tok from 2 to 1"),
        ("data", "sequence_length", 16, "data.sequence_length from 32 to 16"),
        ("train", "batch_size", 2, "train.batch_size from 4 to 2"),
        ("optimizer", "name", "adamw", "optimizer.name from 'muon' to 'adamw'"),
        (None, "seed", 7, "seed from 0 to 7"),
        ("data", "validation_fraction", 0.4, "data.validation_fraction from 0.2 to 0.4"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused_by_name(section, key, value, named, pretrain_config):
    config = pretrain_config(max_steps=2)
    pretrain.run(config)
    values = config.model_dump(mode="json")
    (values[section] if section else values)[key] = value
    with pytest.raises(UserError) as refused:
        pretrain.run(type(config).model_validate(values), resume=True)
    assert named in refused.value.what
    assert refused.value.exit_code == 2


def test_a_resumed_run_may_change_its_rates_and_says_so(pretrain_config, capsys):
    config = pretrain_config(max_steps=2)
    pretrain.run(config)
    values = config.model_dump(mode="json")
    values["optimizer"]["lr"] = 0.005
    values["train"]["max_steps"] = 3
    values["model"]["router_aux_loss_coef"] = 0.1
    pretrain.run(type(config).model_validate(values), resume=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr from 0.02 to 0.005" in printed
    assert "train.max_steps from 2 to 3" in printed
    assert rows(config.output_dir)[-1]["step"] == 3


def test_edited_data_is_refused(pretrain_config):
    config = pretrain_config(max_steps=2)
    pretrain.run(config)
    with Path(config.data.train[0].path).open("a") as file:
        file.write('{"text": "One more story."}\n')
    with pytest.raises(UserError, match="the contents have changed"):
        pretrain.run(config, resume=True)


def test_resuming_falls_back_to_the_newest_good_checkpoint_and_says_why(pretrain_config, capsys):
    config = pretrain_config()
    pretrain.run(config)
    expected = outcome(config.output_dir)
    newest = sorted((Path(config.output_dir) / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"")
    pretrain.run(config, resume=True)
    assert f"checkpoint {newest.name} is set aside: model.safetensors has 0 bytes" in capsys.readouterr().out
    assert outcome(config.output_dir) == expected


def test_resuming_with_only_damaged_checkpoints_exits_3(tmp_path, pretrain_config, monkeypatch, capsys):
    config = pretrain_config(max_steps=2)
    path = write_yaml(tmp_path / "config.yaml", config)
    pretrain.run(config)
    for folder in (Path(config.output_dir) / "checkpoints").iterdir():
        (folder / "config.json").unlink()
    assert run_command(monkeypatch, "pretrain", path, "--resume") == 3
    assert "config.json is missing" in capsys.readouterr().err


class Payload:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickles_put_into_a_checkpoint_are_never_opened(tmp_path, pretrain_config):
    config = pretrain_config(max_steps=4)
    pretrain.run(config)
    folder = cut_back(config.output_dir, 2)
    trace = tmp_path / "executed"
    for name in "pytorch_model.bin optimizer.pt scheduler.pt training_args.bin rng_state.pth trainer.pkl".split():
        (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    seal(folder)  # even with a manifest that vouches for them
    pretrain.run(config, resume=True)
    assert not trace.exists()
    pickle.loads((folder / "optimizer.pt").read_bytes())
    assert trace.exists()  # so the payload would have worked
