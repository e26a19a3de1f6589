"""Sharded training is training: every layout has the losses, norms, weights and checkpoints of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import relative_error
from tiny_runs import CHATS, MODEL, STORIES, on_ranks, rows, training_rows, weights

from minimoe.config import ParallelConfig
from minimoe.config.training import TrainConfig
from minimoe.errors import UserError
from minimoe.model.config import MiniMoeConfig
from minimoe.sharded_files import read_into, read_shapes
from minimoe.train.checkpoint import verify
from minimoe.train.sharding import check_sharding, resolve

LAYOUTS = {
    "fsdp": {},
    "experts": {"expert_size": 2},
    "offloaded": {"cpu_offload": True},
    "replicas": {"replicate_size": 2},
    "all": {"replicate_size": 2, "expert_size": 2},
}
# Sums in another order, each rounded to 6e-8, over four steps of a loss near 6.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """What one process and several ranks made of the same configs."""
    root = tmp_path_factory.mktemp("sharding")
    (root / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES * 3))
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS * 3))

    def config(place: str, name: str, values: dict[str, Any], **train: Any) -> str:
        made = {
            "output_dir": str(root / place / name),
            "data": {
                "train": str(root / ("chats.jsonl" if "init_from" in values else "stories.jsonl")),
                "validation_fraction": 0.3,
                "sequence_length": 32,
                "cache_dir": str(root / "cache"),
                "num_processes": 1,
            },
            "optimizer": {"name": "adamw", "lr": 0.005},
            "train": {"max_steps": 4, "batch_size": 8, "precision": "fp32", "log_every": 1, "eval_every": 2}
            | {"save_every": 2}
            | train,
        } | values
        path = root / f"{place}-{name}.yaml"
        path.write_text(json.dumps(made))
        return str(path)

    new = {"tokenizer": str(tiny_tokenizer_dir), "model": MODEL | {"router_z_loss_coef": 0.01}}
    sigmoid = MODEL | {"scoring_func": "sigmoid", "router_bias_update_rate": 0.01, "router_aux_loss_type": "sequence"}
    muon = {"optimizer": {"name": "muon", "lr": 0.01, "weight_decay": 0.1}}
    kinds = {
        "adamw": new,
        "muon": new | muon | {"model": sigmoid | {"n_shared_experts": 1, "tie_word_embeddings": False}},
        "idle": new
        | {"model": MODEL | {"num_experts_per_tok": 1, "norm_topk_prob": False}},  # more experts than tokens
    }
    extra: dict[str, dict[str, Any]] = {
        "muon": {"micro_batch_size": 1, "gradient_checkpointing": True, "sample_every": 2}
        | {"sample_prompts": ["The cat"], "sample_tokens": 4}
    }
    for place, ranks, layouts in (
        ("one", 1, [None]),
        ("two", 2, ["fsdp", "experts", "offloaded"]),
        ("four", 4, ["replicas", "all"]),
    ):
        words = []
        for layout in layouts:
            for name, values in kinds.items():
                if ranks == 4 and name == "idle":
                    continue
                section = {} if layout is None else {"parallel": LAYOUTS[layout]}
                at = place if layout is None else layout
                words += ["pretrain", config(at, name, values | section, **extra.get(name, {}))]
            if ranks < 4:
                start = {"init_from": str(root / "one" / "adamw" / "final")}
                words += ["sft", config(at, "sft", start | section)]
        on_ranks(ranks, *words)
    return root


CASES = [(layout, name) for layout in ("fsdp", "experts", "offloaded") for name in ("adamw", "muon", "idle", "sft")]
CASES += [(layout, name) for layout in ("replicas", "all") for name in ("adamw", "muon")]  # of four ranks


@pytest.mark.long
@pytest.mark.parametrize(("layout", "name"), CASES)
def test_every_layout_equals_one_process(layout, name, runs):
    one, other = (training_rows(runs / place / name) for place in ("one", layout))
    assert len(one) == len(other) == 4
    for row, found in zip(one, other, strict=True):
        for key in ("loss", "lm_loss", "load_balancing_loss", "router_z_loss", "grad_norm"):
            assert found[key] == pytest.approx(row[key], rel=CLOSE, abs=CLOSE), (row["step"], key)
        assert found["expert_load"] == row["expert_load"]
    expected, actual = (weights(runs / place / name / "final") for place in ("one", layout))
    assert max(relative_error(actual[key], expected[key]) for key in expected) < CLOSE
    checked, found_too = ([row for row in rows(runs / place / name) if "val_loss" in row] for place in ("one", layout))
    assert [row["val_loss"] for row in found_too] == pytest.approx([row["val_loss"] for row in checked], rel=CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_one_process(layout, runs):
    def texts(place: str) -> list[str]:
        lines = (runs / place / "muon" / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    assert len(texts("one")) == 2
    assert texts(layout) == texts("one")


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_that_of_one_process(layout, runs):
    for name in ("adamw", "muon"):
        one, other = (runs / place / name / "checkpoints" / "step-00000004" for place in ("one", layout))
        assert verify(other) is None
        expected = load_file(one / "optimizer.safetensors")
        moments = {key for key in expected if key.startswith("optimizer.")}
        assert moments == {key for key in read_shapes(other) if key.startswith("optimizer.")}
        actual = {key: torch.zeros_like(expected[key]) for key in moments}
        read_into(other, actual)
        for key in moments:
            assert relative_error(actual[key], expected[key]) < 1e-3, key
        saved = json.loads((other / "config.json").read_text())
        assert "distributed_config" not in saved


@pytest.mark.long
def test_a_run_saved_on_one_layout_goes_on_on_another(runs, tmp_path):
    """From the checkpoint of step 2, with experts shared out, to the same end."""
    words = []
    for name in ("adamw", "muon"):
        folder = tmp_path / name
        shutil.copytree(runs / "fsdp" / name, folder)
        shutil.rmtree(folder / "checkpoints" / "step-00000004")
        shutil.rmtree(folder / "final")
        values = json.loads((runs / f"experts-{name}.yaml").read_text()) | {"output_dir": str(folder)}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(values))
        words += ["pretrain", str(path)]
    on_ranks(2, "--resume", *words)
    for name in ("adamw", "muon"):
        expected, actual = (weights(place / "final") for place in (runs / "one" / name, tmp_path / name))
        assert max(relative_error(actual[key], expected[key]) for key in expected) < 10 * CLOSE
        assert [row["step"] for row in training_rows(tmp_path / name)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("section", "world", "message", "fix"),
    [
        ({"fsdp_size": 3}, 4, "are not the 4 ranks", "set parallel.fsdp_size to 4"),
        ({"replicate_size": 3}, 4, "does not divide the 4 ranks", "[1, 2, 4]"),
        ({"expert_size": 3}, 4, "does not divide parallel.fsdp_size 4", "[1, 2, 4]"),
        ({}, 1, "there is one", "torchrun"),
        ({"cpu_offload": True, "expert_size": 2}, 4, "experts over 2 ranks are not", "parallel.expert_size to 1"),
        ({"cpu_offload": True, "replicate_size": 4}, 4, "copies do not", "parallel.fsdp_size to more than 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_would(section, world, message, fix):
    with pytest.raises(UserError, match=message) as refused:
        resolve(ParallelConfig(**section), world)
    assert fix in refused.value.fix


def test_what_is_left_of_an_elastic_run_offloads_nothing(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert resolve(ParallelConfig(cpu_offload=True), 1) == (1, 1, 1, False)
    assert resolve(ParallelConfig(cpu_offload=True), 2) == (1, 2, 1, True)


def test_experts_and_rows_must_be_shared_out_evenly():
    layout = resolve(ParallelConfig(expert_size=4), 4)
    with pytest.raises(UserError, match="expert_size 4 does not divide") as refused:
        check_sharding(layout, MiniMoeConfig(num_experts=6), TrainConfig(max_steps=1, batch_size=8))
    assert "[1, 2]" in refused.value.fix
    check_sharding(layout, MiniMoeConfig(num_experts=8), TrainConfig(max_steps=1, batch_size=6))  # 2, 2, 1 and 1 rows
    with pytest.raises(UserError, match="more micro-batches than others") as refused:
        check_sharding(layout, MiniMoeConfig(num_experts=8), TrainConfig(max_steps=1, batch_size=6, micro_batch_size=1))
    assert "set it to 8" in refused.value.fix
