"""Numbers that go wrong: NaN, infinity, spikes, idle experts. What is skipped, what is told, what is never saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_runs import rows, run_command, write_yaml

from minimoe.config import OptimizerConfig, TrainConfig
from minimoe.errors import NonFiniteError
from minimoe.train import checkpoint, guard, pretrain
from minimoe.train.guard import StepGuard
from minimoe.train.metrics import CLOCK_FIELDS
from minimoe.train.optim import build_optimizers
from minimoe.train.snapshot import TrainerState, get_rng, take_snapshot

TRAIN = TrainConfig(max_steps=1000, max_skipped_steps=2, on_loss_spike="skip")


def events(folder: str | Path) -> list[dict]:
    return [row for row in rows(folder) if "event" in row]


@pytest.mark.parametrize("word", ["nan", "inf"])
def test_a_non_finite_step_is_skipped_its_batch_written_and_training_goes_on(word, pretrain_config, switch_on, capsys):
    switch_on(f"train.loss@3={word}")
    config = pretrain_config(max_steps=6)
    final = pretrain.run(config)
    (event,) = events(config.output_dir)
    assert (event["step"], event["event"], event["skipped"]) == (3, "non-finite", True)
    assert event["loss"] is None  # JSON has no NaN
    batch = load_file(Path(config.output_dir) / event["batch_file"])
    assert batch["input_ids"].shape == (4, 32)
    assert "step skipped, its batch is in" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in load_file(final / "model.safetensors").values())
    assert [row["step"] for row in rows(config.output_dir) if "lm_loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_skipped_step_leaves_weights_and_moments_alone(pretrain_config, switch_on):
    config = pretrain_config(max_steps=4, save_every=1, keep_last=9)
    values = config.model_dump(mode="json")
    values["schedule"]["name"] = "constant"
    switch_on("train.loss@2=nan")
    pretrain.run(type(config).model_validate(values))
    before, after = (Path(config.output_dir) / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name


def test_too_many_in_a_row_exit_4_without_a_non_finite_checkpoint_and_resume_goes_on(
    tmp_path, pretrain_config, switch_on, monkeypatch, capsys
):
    config = pretrain_config(max_steps=9, save_every=1, max_skipped_steps=2, keep_last=9)
    path = write_yaml(tmp_path / "config.yaml", config)
    switch_on(",".join(f"train.loss@{step}=nan" for step in (4, 5, 6)))
    assert run_command(monkeypatch, "pretrain", path) == 4
    assert "3 steps in a row, up to step 6" in capsys.readouterr().err
    status = json.loads((Path(config.output_dir) / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    saved = sorted((Path(config.output_dir) / "checkpoints").iterdir())
    assert [folder.name for folder in saved] == [f"step-0000000{step}" for step in range(1, 6)]
    for folder in saved:
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / name).values())
    switch_on("")
    assert run_command(monkeypatch, "pretrain", path, "--resume") == 0


def test_weights_that_became_non_finite_are_never_saved(tmp_path, tiny_tokenizer):
    model = tiny_model()
    optimizers = build_optimizers(model, OptimizerConfig())
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    snapshot = take_snapshot(model, optimizers, TrainerState(step=1), [get_rng()])
    with pytest.raises(NonFiniteError, match=r"model.norm.weight has NaN or infinite"):
        checkpoint.save(tmp_path, snapshot, model, tiny_tokenizer)
    assert not list(tmp_path.iterdir())


def settled_guard() -> StepGuard:
    watch = StepGuard()
    for step in range(guard.SPIKE_WARMUP):
        assert watch.judge(2.0 + 0.01 * (step % 5), 1.0, TRAIN) == (None, False)
    return watch


def test_a_spike_is_skipped_if_asked_told_otherwise_and_a_lasting_rise_is_accepted():
    watch = settled_guard()
    assert watch.judge(3.0, 1.0, TRAIN.model_copy(update={"on_loss_spike": "warn"})) == ("spike", False)
    watch = settled_guard()
    assert watch.judge(3.0, 1.0, TRAIN) == ("spike", True)
    assert watch.judge(2.0, 1.0, TRAIN) == (None, False)
    lasting = [watch.judge(3.0, 1.0, TRAIN) for _ in range(3)]
    assert [verdict.skipped for verdict in lasting] == [True, True, False]
    watch.raise_if_lost(TRAIN, 1)  # spikes alone never end a run


def test_skipped_spikes_do_not_count_as_non_finite_steps():
    watch = settled_guard()
    assert [watch.judge(9.0, 1.0, TRAIN).skipped for _ in range(2)] == [True, True]
    for _ in range(TRAIN.max_skipped_steps):
        assert watch.judge(math.nan, 1.0, TRAIN) == ("non-finite", True)
        watch.raise_if_lost(TRAIN, 1)
    watch.judge(math.nan, 1.0, TRAIN)
    with pytest.raises(NonFiniteError, match="for 3 steps in a row"):
        watch.raise_if_lost(TRAIN, 1)


def test_ordinary_noise_and_a_falling_loss_are_no_spikes():
    generator = torch.Generator().manual_seed(0)
    watch = StepGuard()
    for step in range(2000):
        loss = 2 + 6 * math.exp(-step / 200) + 0.1 * torch.randn((), generator=generator).item()
        assert watch.judge(loss, 1.0, TRAIN).problem is None, step


def test_a_spike_in_a_run_is_skipped_the_same_when_the_run_is_resumed_in_between(pretrain_config, switch_on):
    train = {"max_steps": 62, "save_every": 55, "batch_size": 1, "on_loss_spike": "skip", "eval_every": 999}
    whole, parts = pretrain_config("whole", **train), pretrain_config("parts", **train)
    switch_on("train.loss@60=spike")
    pretrain.run(whole)
    switch_on("train.loss@60=spike,train.step@57=full")
    with pytest.raises(OSError, match="No space left"):
        pretrain.run(parts)
    switch_on("train.loss@5=spike")  # step 60 again: the resumed process starts with step 56
    pretrain.run(parts, resume=True)
    assert [row["step"] for row in events(whole.output_dir)] == [60]
    for a, b in zip(rows(whole.output_dir), rows(parts.output_dir), strict=True):
        assert {k: v for k, v in a.items() if k not in CLOCK_FIELDS} == {
            k: v for k, v in b.items() if k not in CLOCK_FIELDS
        }


def test_an_expert_without_work_is_warned_of_once(pretrain_config, monkeypatch, capsys):
    monkeypatch.setattr(guard, "COLLAPSED_STEPS", 3)
    config = pretrain_config(model={"scoring_func": "sigmoid", "router_aux_loss_coef": 0.0})
    draw = pretrain.draw

    def starved(model):
        draw(model)
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -100.0

    monkeypatch.setattr(pretrain, "draw", starved)
    pretrain.run(config)
    (event,) = events(config.output_dir)
    assert (event["step"], event["event"], event["experts"]) == (3, "router_collapse", [[1, 2]])
    assert "router collapse: layer 1 expert 2" in capsys.readouterr().out


def test_an_expert_that_works_again_starts_counting_anew():
    watch = StepGuard()
    idle, busy = torch.tensor([[0, 200]]), torch.tensor([[100, 100]])
    counts = [idle] * 99 + [busy] + [idle] * 101
    warned = [step for step, count in enumerate(counts) if watch.collapsed(count)]
    assert warned == [199]  # the hundredth idle step in a row, and no second warning for it
