"""Sweeps and comparisons: which runs they make, how these share the machine, and what is said of the results."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_runs import run_command, write_yaml

from minimoe.errors import UserError
from minimoe.inspect.charts import Line, as_svg, curves, intervals
from minimoe.inspect.compare import MOE, TWINS, dense_twin, findings
from minimoe.inspect.results import Result, interval, verdict
from minimoe.inspect.sweep import Budget, split_values, steps_of, variants_of
from minimoe.inspect.trials import slug
from minimoe.model.config import num_parameters, with_defaults
from minimoe.train.turns import Turns


@pytest.fixture
def config(tmp_path, pretrain_config):
    return write_yaml(tmp_path / "run.yaml", pretrain_config(max_steps=5))


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    assert split_values('a,[b,c],"d,e",{f: 1, g: 2}') == ["a", "[b,c]", '"d,e"', "{f: 1, g: 2}"]
    assert split_values("0.1") == ["0.1"]


def test_every_combination_is_a_variant_and_single_values_hold_for_all(config):
    found = variants_of(str(config), ["optimizer.lr=0.1,0.2", "model.num_experts=4,8", "seed=3"])
    assert list(found) == [f"optimizer.lr={lr} model.num_experts={n}" for lr in (0.1, 0.2) for n in (4, 8)]
    assert {run.seed for run in found.values()} == {3}
    assert [run.model["num_experts"] for run in found.values()] == [4, 8, 4, 8]


def test_a_variant_may_change_several_keys_and_stands_beside_the_config_as_it_is(config):
    sigmoid = "model.scoring_func=sigmoid model.router_bias_update_rate=0.01"
    found = variants_of(str(config), ["seed=3"], [sigmoid])
    assert list(found) == ["as it is", sigmoid]
    assert found[sigmoid].model["scoring_func"] == "sigmoid"
    assert {run.seed for run in found.values()} == {3}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["seed=1"], "nothing to vary"), (["optimizer.lr=1,1"], "twice"), (["optimizer.lr=1,x"], "optimizer.lr")],
)
def test_what_cannot_be_varied_is_refused_before_anything_runs(config, words, message):
    with pytest.raises(UserError, match=message):
        variants_of(str(config), words)


def test_budgets_buy_steps(pretrain_config):
    run = pretrain_config(max_steps=7)  # of 4 rows of 32 tokens
    assert steps_of(run, Budget("steps", None), None) == 7
    assert steps_of(run, Budget("tokens", 12_800), None) == 100
    assert steps_of(run, Budget("seconds", 10), 0.05) == 200
    twice = steps_of(run, Budget("flops", 2e9), None)
    assert twice == pytest.approx(2 * steps_of(run, Budget("flops", 1e9), None), abs=1)


def test_intervals_are_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3), rel=1e-4))
    assert math.isnan(interval([1.0])[1])


def test_a_difference_is_claimed_only_where_its_interval_leaves_out_zero():
    assert verdict(-0.2, 0.1, "base") == "better than base"
    assert verdict(0.2, 0.1, "base") == "worse than base"
    assert verdict(0.2, 0.3, "base") == "no difference shown"
    assert verdict(0.2, math.nan, "base").startswith("one seed")


def test_a_run_waits_between_steps_until_it_is_given_a_turn():
    mine, give = os.pipe()
    back, write = os.pipe()
    turns = Turns(mine, write, seconds=30.0)
    os.write(give, b".")
    assert turns.wait()
    assert os.read(back, 1) == b"."  # the start was a turn, which it gave back
    assert turns.wait()  # the turn lasts
    assert not select.select([back], [], [], 0)[0]
    turns = Turns(mine, write, seconds=0.0)
    os.close(give)
    assert not turns.wait()  # nobody gives turns any more


@pytest.mark.long
def test_a_sweep_makes_a_table_and_started_again_runs_nothing(tmp_path, config, monkeypatch, capsys):
    words = ["sweep", str(config), "model.vocab_size=448,16", "--seeds", "2"]
    words += ["--out", str(tmp_path / "out"), "--json"]
    assert run_command(monkeypatch, *words) == 0
    first = json.loads(capsys.readouterr().out)
    by_name = {one["variant"]: one for one in first["variants"]}
    assert len(by_name) == 2
    good = by_name["model.vocab_size=448"]
    assert (good["seeds"], good["verdict"], good["tokens"]) == (2, "baseline", 5 * 4 * 32)
    assert good["loss"] > 0
    assert good["loss_interval"] > 0
    failed = by_name["model.vocab_size=16"]
    assert failed["verdict"] == "failed"
    assert "vocab_size" in failed["failures"][0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "model.vocab_size=448" in page
    assert "failed" in page
    folder = tmp_path / "out" / "model.vocab_size=448" / "seed-1"
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert run_command(monkeypatch, *words) == 0
    again = json.loads(capsys.readouterr().out)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert again["variants"][0] == first["variants"][0]
    assert run_command(monkeypatch, *words, "train.max_steps=6") == 2
    assert "another config" in capsys.readouterr().err


@pytest.mark.long
def test_a_sweep_that_is_stopped_saves_its_runs_and_goes_on(tmp_path, config):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "minimoe.cli", "sweep", str(config), "optimizer.lr=0.01,0.02", "--out", str(out)]
    words += ["train.max_steps=40", "train.save_every=40"]
    environment = os.environ | {"MINIMOE_FAILPOINTS": "train.step=sleep:0.3"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    rows = [out / f"optimizer.lr={lr}" / "seed-0" / "metrics.jsonl" for lr in (0.01, 0.02)]
    deadline = time.monotonic() + 120
    while not all(file.exists() and file.stat().st_size for file in rows):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1].count("every run is saved") == 1
    assert process.returncode == 75
    states = [json.loads((file.parent / "status.json").read_text())["state"] for file in rows]
    assert states == ["preempted", "preempted"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    for file in rows:
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines() if '"loss"' in line]
        assert steps == list(range(1, 41))


@pytest.mark.long
def test_a_run_that_is_killed_while_it_waits_is_noted_and_the_others_go_on(tmp_path, config):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "minimoe.cli", "sweep", str(config), "optimizer.lr=0.01,0.02", "--out", str(out)]
    environment = os.environ | {"MINIMOE_FAILPOINTS": "train.step=sleep:1"}
    words += ["train.max_steps=12", "--json"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rows, status = (out / "optimizer.lr=0.01" / "seed-0" / name for name in ("metrics.jsonl", "status.json"))
    deadline = time.monotonic() + 120
    while not rows.exists() or rows.read_text().count("\n") < 4:  # its first turn is over then, or nearly
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
    found = json.loads(process.communicate(timeout=120)[0])
    assert process.returncode == 0
    first, second = found["variants"]
    assert "exit code -9" in first["failures"][0]
    assert (second["seeds"], second["failures"]) == (1, [])


def test_long_names_of_variants_are_short_folders_and_different_ones():
    long = "model.router_type=top_p " * 20
    assert slug("optimizer.lr=0.1 seed=2") == "optimizer.lr=0.1_seed=2"
    assert len(slug(long)) < 120
    assert slug(long) != slug(long + "x")


def test_the_dense_twins_have_as_many_parameters(pretrain_config):
    for extra in ({}, {"n_shared_experts": 1}, {"first_k_dense_replace": 1, "intermediate_size": 40}):
        moe = pretrain_config(model=extra)
        values = with_defaults(moe.model)
        routers = values["hidden_size"] * values["num_experts"] * values["num_hidden_layers"]
        for active in TWINS.values():
            twin = with_defaults(dense_twin(moe, active).model)
            difference = num_parameters(values, active=active) - num_parameters(twin)
            assert 0 <= difference <= routers
            assert twin["first_k_dense_replace"] == twin["num_hidden_layers"]


def test_a_comparison_says_who_wins_only_where_it_is_shown():
    def result(name: str, change: float, half: float) -> Result:
        return Result(name, 3, 2.0, 0.1, change, half, "", 1e6, 60.0, 1e12, 1e4, 1.2, [])

    said = findings(
        [
            result(MOE, 0.0, 0.0),
            result("dense, equal active, tokens", 0.2, 0.1),
            result("dense, equal active, seconds", -0.2, 0.1),
            result("dense, equal total, tokens", 0.05, 0.1),
            result("dense, equal total, seconds", 0.05, math.nan),
        ]
    )
    assert "the MoE is ahead by 0.2000" in said[0]
    assert "the dense twin is ahead" in said[1]
    assert "no difference shown" in said[2]
    assert "by chance or not" in said[3]


@pytest.mark.long
def test_a_comparison_runs_the_moe_and_its_twins(tmp_path, config, monkeypatch, capsys):
    words = ["compare", str(config), "--seeds", "1", "--out", str(tmp_path / "out"), "--json"]
    (tmp_path / "out").mkdir()  # as a comparison that goes on finds it
    (tmp_path / "out" / "step_seconds.json").write_text(json.dumps({MOE: 0.2} | dict.fromkeys(TWINS, 0.1)))
    assert run_command(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["variant"] for one in found["variants"]] == [
        MOE,
        *(f"{twin}, {axis}" for twin in TWINS for axis in ("tokens", "seconds")),
    ]
    assert [one["tokens"] for one in found["variants"]] == [steps * 4 * 32 for steps in (5, 5, 10, 5, 10)]
    assert len(found["findings"]) == 4
    assert found["variants"][1]["largest_load"] is None


def test_a_dense_model_has_no_twins(config, monkeypatch, capsys):
    assert run_command(monkeypatch, "compare", str(config), "model.first_k_dense_replace=2") == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_long_names_leave_room_for_their_chart(recwarn):
    names = ["as it is", *(f"model.router_type=top_p model.norm_topk_prob=false model.seed={n}" for n in range(10))]
    x = np.arange(5.0)
    charts = [
        curves("curves", "Loss", "Of each.", [Line(name, x, x + 1) for name in names], x="tokens", y="nats"),
        intervals("ends", "Ends", "Of each.", [(name, 5.0, 0.1) for name in names], "loss"),
    ]
    for chart in charts:
        assert chart is not None
        assert all(name.split()[-1] in as_svg(chart) for name in names)
    assert not recwarn.list
