"""Estimates for GPUs that are not here: the formulas, worked by hand, and the layouts they choose."""

from __future__ import annotations

import json

import pytest
from tiny_runs import run_command, write_yaml

from minimoe.inspect.cluster import GPUS, choose, estimate, layouts
from minimoe.model.config import with_defaults
from minimoe.model.costs import parameters_by_part
from minimoe.train.sharding import Layout
from minimoe.train.shares import Traffic, Work, traffic

SMALL = with_defaults({"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
LARGE = with_defaults(
    {"vocab_size": 100_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_experts": 64}
)
WORK = Work(512, 4096, 2, "adamw", True)


def test_traffic_is_what_rings_send():
    parts = parameters_by_part(SMALL)
    total, experts, ends = sum(parts.values()), parts["routed experts"], parts["embedding"]
    tokens = 4 * 2 * 100 * 2 * 64 * 4  # there and back, twice; 2 layers, 100 tokens, 2 experts each, 64 wide, fp32
    assert traffic(SMALL, Layout(1, 4, 1), 100, 1, 4) == Traffic(4 * (3 * total - ends) * 3 / 4, 0, 0)
    shared = traffic(SMALL, Layout(1, 4, 2), 100, 1, 4)
    assert shared.weights == 4 * ((3 * (total - experts) - ends) * 3 / 4 + 3 * experts / 2 / 2)
    assert shared.tokens == tokens / 2
    assert traffic(SMALL, Layout(2, 2, 1), 100, 3, 4).replicas == 3 * 8 * total / 2 / 2
    assert traffic(SMALL, Layout(4, 1, 1), 100, 3, 4) == Traffic(0, 8 * total * 3 / 4, 0)


def test_weights_are_shared_out_among_the_ranks_of_a_replica():
    one, eight = (estimate(LARGE, WORK, ranks, "h100", Layout(1, ranks, 1)).memory for ranks in (1, 8))
    for kind in ("weights", "gradients", "moments"):
        assert eight[kind] == one[kind] / 8
    assert one["moments"] == 2 * one["weights"]


def test_every_layout_has_as_many_ranks_and_whole_experts():
    found = layouts(16, 12)
    assert {layout.replicate_size * layout.fsdp_size for layout in found} == {16}
    assert all(12 % layout.expert_size == 0 and layout.fsdp_size % layout.expert_size == 0 for layout in found)


def test_a_model_that_one_gpu_cannot_hold_is_sharded():
    assert not choose(LARGE, WORK, 1, "h100").fits
    large = choose(LARGE, WORK, 64, "h200")
    assert large.fits
    assert large.layout.fsdp_size > 1
    assert large.memory_bytes < GPUS["h200"].memory
    assert choose(SMALL, WORK, 8, "rtx4090").fits


def test_what_the_host_keeps_is_not_on_the_gpu_and_travels_to_it():
    plain, offloaded = (estimate(LARGE, WORK, 64, "h100", Layout(8, 8, 1, offload)) for offload in (False, True))
    kept = sum(plain.memory[kind] for kind in ("weights", "gradients", "moments"))
    assert offloaded.memory_bytes == pytest.approx(plain.memory_bytes - kept)
    assert offloaded.weights_seconds > plain.weights_seconds
    assert str(offloaded.layout) == "8 replicas, sharded over 8, kept by the host"


def test_a_plan_for_gpus_runs_nothing_and_takes_the_layout_of_the_config(
    tmp_path, pretrain_config, monkeypatch, capsys
):
    config = write_yaml(tmp_path / "run.yaml", pretrain_config(max_steps=100, batch_size=8))
    words = ["plan", str(config), "--gpus", "8", "--gpu", "a100", "--json"]
    assert run_command(monkeypatch, *words, "parallel.expert_size=2", "parallel.replicate_size=2") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cluster"]["layout"] == {
        "replicate_size": 2,
        "fsdp_size": 4,
        "expert_size": 2,
        "cpu_offload": False,
    }
    assert plan["memory"]["peak_bytes"] == int(sum(plan["memory"]["by_kind"].values()))
    assert plan["memory"]["kept_by_host"] == 0
    assert plan["time"]["seconds"] == pytest.approx(100 * plan["time"]["step_seconds"])
    assert not (tmp_path / "run").exists()
    for extra, message in ((["--gpu", "h999"], "not known"), (["train.batch_size=9"], "no multiple of 8")):
        assert run_command(monkeypatch, "plan", str(config), "--gpus", "8", *extra) == 2
        assert message in capsys.readouterr().err
