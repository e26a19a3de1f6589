"""What `minimoe plan` says of a run, beside the run."""

from __future__ import annotations

import json

import pytest
from tiny_runs import MODEL, rows, run_command, write_yaml

from minimoe.inspect.plan import smaller_batch, too_large
from minimoe.model.config import num_parameters, with_defaults
from minimoe.model.costs import flops_by_part, parameters_by_part
from minimoe.tokenizer import load_tokenizer
from minimoe.train.pretrain import complete_architecture, new_model


def test_a_plan_is_what_the_run_then_has(tmp_path, pretrain_config, monkeypatch, capsys):
    """Time is not compared: it depends on the clock of a busy machine."""
    config = write_yaml(tmp_path / "run.yaml", pretrain_config(max_steps=None, epochs=4))
    assert run_command(monkeypatch, "plan", str(config), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert run_command(monkeypatch, "pretrain", str(config)) == 0
    last = [row for row in rows(tmp_path / "run") if "loss" in row][-1]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert plan["steps"] == last["step"]
    assert plan["tokens"] == last["tokens"]
    assert plan["parameters"]["total"] == facts["parameters"]["total"]
    assert plan["parameters"]["active"] == facts["parameters"]["active"]
    assert sum(plan["parameters"]["by_part"].values()) == plan["parameters"]["total"]
    assert plan["flops"]["per_token"] == facts["flops_per_token"]
    on_disk = sum(
        file.stat().st_size for part in ("checkpoints", "final") for file in (tmp_path / "run" / part).rglob("*")
    )
    assert on_disk <= plan["disk_bytes"] < 1.6 * on_disk  # here the best checkpoint is one of the last, and no third
    assert plan["memory"]["peak_bytes"] > plan["memory"]["by_kind"]["weights"] == 4 * plan["parameters"]["total"]
    assert sum(plan["memory"]["by_kind"].values()) == plan["memory"]["peak_bytes"]
    assert plan["time"]["seconds"] > 0


def test_a_run_that_would_fail_fails_the_plan_with_its_own_words(tmp_path, pretrain_config, monkeypatch, capsys):
    config = write_yaml(tmp_path / "run.yaml", pretrain_config())
    assert run_command(monkeypatch, "plan", str(config), "data.train=nowhere.txt") == 2
    assert "nowhere.txt" in capsys.readouterr().err


def test_parts_are_those_of_the_model(tiny_tokenizer):
    values = MODEL | {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_hidden_layers": 3, "vocab_size": 448}
    model = new_model(values | {"tie_word_embeddings": False}, tiny_tokenizer, 64, "")
    parts = parameters_by_part(with_defaults(vars(model.config)))
    counted = dict.fromkeys(parts, 0)
    names = {"embed_tokens": "embedding", "lm_head": "output head", "proj.": "attention", "norm": "norms"}
    for name, parameter in model.named_parameters():
        part = next((part for key, part in names.items() if key in name and "mlp" not in name), None)
        if "mlp.experts" in name:
            part = "routed experts"
        elif "shared_experts" in name:
            part = "shared experts"
        elif "mlp.gate.weight" in name:
            part = "routers"
        elif ".mlp." in name:
            part = "dense feed-forward"
        counted["norms" if "norm" in name else part] += parameter.numel()
    assert counted == parts
    assert num_parameters(vars(model.config)) == sum(p.numel() for p in model.parameters())


def test_flops_are_those_that_torch_counts(tiny_tokenizer):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from minimoe.ops.door import using

    length = 16
    model = new_model(MODEL, tiny_tokenizer, length, "").eval()
    model.set_attn_implementation("eager")  # the others' kernels for CPUs are not counted
    with using(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None], attention_mask=torch.ones(1, length))
    parts = flops_by_part(with_defaults(vars(model.config)), length)
    # torch counts the whole square of scores: S instead of (S + 1) / 2 positions a token
    whole = sum(parts.values()) + parts["attention scores"] * (2 * length / (length + 1) - 1)
    assert counter.get_total_flops() == pytest.approx(whole * length, rel=0.01)


def test_what_cannot_fit_is_said_without_trying_and_with_the_change_that_fits(pretrain_config):
    config = pretrain_config()
    tokenizer = load_tokenizer(config.tokenizer)
    values = with_defaults(complete_architecture(config.model, tokenizer, 32))
    assert values["vocab_size"] == 64 * -(-len(tokenizer) // 64)  # as the run's model has, not a default
    fits_two = num_parameters(values | {"num_experts": 2}) * 12
    plan = too_large(config, fits_two)
    assert plan is not None
    assert not plan.memory["fits"]
    assert "the smallest change that fits: model.num_experts=2" in plan.advice[0]
    assert too_large(config, num_parameters(values) * 12) is None


def test_the_largest_micro_batch_that_fits_is_found(pretrain_config):
    config = pretrain_config(batch_size=12)
    plan = too_large(config, 1)
    assert plan is not None
    activations = 12e6
    plan.memory["by_kind"] = {"weights": 1e6, "program, activations, workspace": activations + 450e6}
    plan.memory |= {"peak_bytes": 451e6 + activations, "available_bytes": 451e6 + 5e6}
    assert smaller_batch(config, plan).endswith("train.micro_batch_size=4")  # 5 would fit, but does not divide 12
    plan.memory["available_bytes"] = 451e6
    assert "gradient_checkpointing" in smaller_batch(config, plan)
