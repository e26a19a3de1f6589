"""Experts taken out, put together, revived: what stays, what changes, and what is said of it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tiny_runs import MODEL, STORIES, run_command

from minimoe.config import SftRun
from minimoe.errors import UserError
from minimoe.inspect.surgery import Measured, ablated, compare, measure, merged, pruned, revived
from minimoe.loading import load_minimoe
from minimoe.model.config import architecture_problems
from minimoe.train import pretrain, sft
from minimoe.train.pretrain import new_model

SIZES = MODEL | {"first_k_dense_replace": 1, "num_hidden_layers": 3, "num_experts_per_tok": 2}


@pytest.fixture(params=["softmax", "sigmoid"])
def model(request, tiny_tokenizer):
    torch.manual_seed(0)
    model = new_model(SIZES | {"scoring_func": request.param}, tiny_tokenizer, 64, "").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:  # so that they matter
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_an_ablated_expert_answers_nothing_and_no_other_part_changes(model):
    changed = ablated(model, 1, 2)
    rows = torch.randn(3, 32)
    experts = list(changed.model.layers[1].mlp.experts)
    assert torch.equal(experts[2](rows), torch.zeros(3, 32))
    same = {name for name, value in changed.state_dict().items() if torch.equal(value, model.state_dict()[name])}
    assert set(model.state_dict()) - same == {"model.layers.1.mlp.experts.down_proj"}
    assert torch.equal(experts[1](rows), list(model.model.layers[1].mlp.experts)[1](rows))


def test_pruning_experts_that_nobody_chooses_changes_nothing(model):
    with torch.no_grad():
        for layer in (1, 2):
            gate = model.model.layers[layer].mlp.gate
            tokens = torch.randn(500, 32)
            gate.weight[3] = gate.weight[0] * 0 - 1e-6
            if gate.scoring_func == "sigmoid":
                gate.e_score_correction_bias[3] = -100.0
            else:
                gate.weight[:3] = tokens[:3] * 0 + torch.eye(32)[:3]
                gate.weight[3] = -gate.weight[:3].sum(0) * 100
    load = np.array([[1.0, 1.5, 1.5, 0.0]] * 2)
    smaller = pruned(model, load, 3)
    assert smaller.config.num_experts == 3
    used = measure_ids(model)
    if 3 not in used:
        assert torch.allclose(logits(smaller), logits(model), atol=1e-5)
    for layer in (1, 2):
        kept = smaller.model.layers[layer].mlp.experts.gate_up_proj
        assert torch.allclose(kept, model.model.layers[layer].mlp.experts.gate_up_proj[:3])


def measure_ids(model) -> set[int]:
    with torch.no_grad():
        routings = model.model(torch.arange(20)[None]).routings
    return {int(expert) for routing in routings for expert in routing.expert_ids.flatten()}


def test_merged_experts_are_means_weighted_by_their_use(model):
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate
        gate.weight[2] = 0.9 * gate.weight[0]  # expert 2 is nearest to 0, and joins it
        gate.weight[3] = 1.1 * gate.weight[1]
        other = model.model.layers[2].mlp.gate
        other.weight[2], other.weight[3] = 2 * other.weight[0], 3 * other.weight[1]
    load = np.array([[3.0, 2.0, 1.0, 0.5]] * 2)
    smaller = merged(model, load, 2)
    before, after = (m.model.layers[1].mlp.experts.down_proj.detach() for m in (model, smaller))
    assert torch.allclose(after[0], (3 * before[0] + before[2]) / 4, atol=1e-6)
    assert torch.allclose(after[1], (2 * before[1] + 0.5 * before[3]) / 2.5, atol=1e-6)
    assert torch.equal(smaller.model.layers[1].mlp.gate.weight, model.model.layers[1].mlp.gate.weight[:2])


def test_equal_experts_merge_without_loss_where_every_token_uses_all_of_them(tiny_tokenizer):
    """With k = 1 of 2 equal experts, and norm_topk_prob: one of them does the same."""
    model = new_model(SIZES | {"num_experts": 2, "num_experts_per_tok": 1}, tiny_tokenizer, 64, "").eval()
    with torch.no_grad():
        for layer in (1, 2):
            for stack in model.model.layers[layer].mlp.experts.parameters():
                stack[1] = stack[0]
    assert torch.allclose(logits(merged(model, np.ones((2, 2)), 1)), logits(model), atol=1e-6)


def test_revived_experts_are_near_the_most_used_one_and_only_they_change(model):
    load = np.array([[3.9, 0.05, 0.05, 0.0], [1.0, 1.0, 1.0, 1.0]])
    changed, count = revived(model, load)
    assert count == 3
    experts, old = (m.model.layers[1].mlp.experts.gate_up_proj.detach() for m in (changed, model))
    assert torch.equal(experts[0], old[0])
    for expert in (1, 2, 3):
        difference = (experts[expert] - old[0]).std() / old[0].std()
        assert 0.01 < difference < 0.03
    assert torch.equal(changed.model.layers[2].mlp.experts.gate_up_proj, model.model.layers[2].mlp.experts.gate_up_proj)


def test_the_interval_is_of_rows_drawn_together():
    """Rows differ among each other a hundred times as much as either changes."""
    rng = np.random.default_rng(0)
    nats = rng.normal(100, 50, 400)
    before = Measured(nats, np.full(400, 10), np.ones((1, 2)))
    after = Measured(nats + rng.normal(1.0, 0.5, 400), np.full(400, 10), np.ones((1, 2)))
    change = compare("x", before, after)
    assert change.change == pytest.approx(0.1, abs=0.01)
    assert change.low < change.change < change.high
    assert change.high - change.low == pytest.approx(2 * 1.96 * 0.05 / 20, rel=0.2)
    same = compare("x", before, copy.deepcopy(before))
    assert (same.change, same.low, same.high) == (0, 0, 0)


@pytest.fixture
def model_dir(tmp_path, model, tiny_tokenizer):
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_loss_is_that_of_evaluate_and_the_result_is_a_model_folder(
    model_dir, tmp_path, write_jsonl, monkeypatch, capsys
):
    data = str(write_jsonl([{"text": text} for text in STORIES]))
    assert run_command(monkeypatch, "evaluate", model_dir, "--data", data, "--json") == 0
    expected = json.loads(capsys.readouterr().out)["loss"]
    words = ["experts", model_dir, "prune", "--keep", "2", "--data", data, "--out", str(tmp_path / "two"), "--json"]
    assert run_command(monkeypatch, *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["loss"] == pytest.approx(expected, abs=1e-5)
    smaller, _ = load_minimoe(tmp_path / "two", "cpu")
    assert smaller.config.num_experts == 2
    assert run_command(monkeypatch, "evaluate", str(tmp_path / "two"), "--data", data, "--json") == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert said["changes"][0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert said["changes"][0]["change"] == pytest.approx(loss - expected, abs=1e-5)


def test_each_expert_is_ablated_in_turn(model_dir, write_jsonl, monkeypatch, capsys):
    data = str(write_jsonl([{"text": text} for text in STORIES]))
    assert run_command(monkeypatch, "experts", model_dir, "ablate", "--data", data, "--json") == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert {change["what"] for change in changes} == {f"layer {n} expert {e}" for n in (1, 2) for e in range(4)}
    assert any(change["change"] != 0 for change in changes)


def test_use_is_counted_of_real_tokens(model, write_jsonl, data_config, tiny_tokenizer):
    from minimoe.data.loader import open_validation

    data = data_config(str(write_jsonl([{"text": text} for text in STORIES])))
    validation = open_validation(data.train, data, tiny_tokenizer, "pretrain")
    found = measure(model, validation)
    real = sum(int(batch.num_tokens()) for batch in validation.batches(4))
    assert found.counts.sum(1).tolist() == [2 * real] * 2
    assert found.load.mean(1) == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune"], "needs --keep"),
        (["prune", "--keep", "1"], "a token needs 2"),
        (["merge", "--keep", "4"], "the model has 4 experts"),
        (["ablate", "--layer", "1"], "belong together"),
        (["ablate", "--layer", "0", "--expert", "1"], "layer 0 has no experts"),
        (["ablate", "--layer", "1", "--expert", "9"], "no expert 9"),
        (["revive", "--keep", "2"], "not for revive"),
        (["revive", "--layer", "1", "--expert", "0"], "not for revive"),
        (["ablate", "--out", "x"], "--out needs one expert"),
    ],
)
def test_what_does_not_fit_is_refused(model_dir, write_jsonl, monkeypatch, capsys, words, message):
    data = str(write_jsonl([{"text": text} for text in STORIES]))
    assert run_command(monkeypatch, "experts", model_dir, *words, "--data", data) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_leaves_frozen_experts_as_they_are(trained_folder, optimizer, sft_config, tmp_path, monkeypatch):
    words = ["experts", str(trained_folder), "freeze", "--data", str(tmp_path / "held.txt"), "--out"]
    (tmp_path / "held.txt").write_text("The cat sat on the mat.\n" * 20)
    one, both = tmp_path / "one", tmp_path / "both"
    assert run_command(monkeypatch, *words, str(one), "--layer", "0", "--expert", "1") == 0
    assert run_command(monkeypatch, *words, str(both)) == 0
    for start, kept, moved in ((one, [1], [0, 2, 3]), (both, [0, 1, 2, 3], [])):
        config = sft_config(start, output=f"sft-{start.name}")
        values = config.model_dump(mode="json")
        values["optimizer"] = {"name": optimizer, "weight_decay": 0.5}
        final = sft.run(type(config).model_validate(values))
        before, after = (load_minimoe(folder, "cpu")[0].state_dict() for folder in (start, final))
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.0.mlp.experts.{name}"
            same = [torch.equal(before[key][e], after[key][e]) for e in range(4)]
            assert [e for e in range(4) if same[e]] == kept
            assert [e for e in range(4) if not same[e]] == moved
        assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_adapters_on_a_model_with_frozen_experts_are_refused(trained_folder, sft_config):
    config = json.loads((trained_folder / "config.json").read_text())
    (trained_folder / "config.json").write_text(json.dumps(config | {"frozen_experts": {"0": [1]}}))
    values = sft_config(trained_folder, output="lora").model_dump(mode="json") | {"lora": {}}
    values["optimizer"] = {"name": "adamw"}
    with pytest.raises(UserError, match="frozen_experts and lora"):
        sft.run(SftRun.model_validate(values))


def test_experts_that_are_not_there_cannot_be_frozen():
    for wrong in ({"0": [9]}, {"7": [0]}, {"0": [1, 1]}, {"a": [0]}):
        assert "frozen_experts" in architecture_problems(SIZES | {"first_k_dense_replace": 0, "frozen_experts": wrong})


@pytest.fixture
def trained_folder(tmp_path, pretrain_config):
    return pretrain.run(pretrain_config(max_steps=2, save_every=2))
