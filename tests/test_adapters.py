"""LoRA: what is trained, what is saved, and that base plus adapter is the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_runs import cut_back, outcome, run_command, training_rows, write_yaml
from transformers import AutoModelForCausalLM

from minimoe import adapters
from minimoe.config import LoraConfig, SftRun
from minimoe.convert.export import export_folder
from minimoe.convert.merge import merge_folder
from minimoe.errors import UserError
from minimoe.generation.engine import Engine
from minimoe.loading import load_model
from minimoe.model import dispatch
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.ops import using
from minimoe.ops.onednn import float32_by_onednn
from minimoe.train import sft
from minimoe.train.optim import build_optimizers
from minimoe.train.parallel import fast_float32

EVERYTHING = ("attention", "dense", "shared_experts", "experts", "router", "control_tokens")
SIGMOID = {"scoring_func": "sigmoid", "n_shared_experts": 1, "first_k_dense_replace": 1, "router_bias_update_rate": 0.1}


@pytest.fixture
def base(tmp_path, tiny_tokenizer) -> Path:
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    folder = tmp_path / "base"
    tiny_model(vocab_size=448, **ids, **SIGMOID).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, sft_config):
    """Train an adapter; returns its final folder."""

    def go(output: str = "lora", *, resume: bool = False, lora: dict | None = None, **train) -> Path:
        values = sft_config(base, output, **train).model_dump(exclude={"optimizer"})
        config = SftRun.model_validate(values | {"lora": lora or {"targets": EVERYTHING}, "optimizer": {"lr": 0.02}})
        return sft.run(config, resume=resume, overwrite=not resume)

    return go


def logits_of(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def adapted(base: Path, *folders: Path) -> MiniMoeForCausalLM:
    model, _ = load_model(base, "cpu")
    for number, folder in enumerate(folders):
        adapters.put_on(model, folder, f"a{number}")
    return model


def test_the_adapter_alone_is_trained_and_saved(base, run):
    before = load_file(base / "model.safetensors")
    final = run()
    assert {name: t.tolist() for name, t in load_file(base / "model.safetensors").items()} == {
        name: t.tolist() for name, t in before.items()
    }
    saved = load_file(final / "adapter_model.safetensors")
    (tokens,) = (name for name in saved if ".lora_" not in name)
    assert tokens == "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert all(t.abs().sum() > 0 for t in saved.values())  # every B has moved from 0
    for place in ("q_proj", "mlp.gate_proj", "shared_experts.up_proj", "mlp.experts", "mlp.gate.lora"):
        assert any(place in name for name in saved)
    assert not (final / "model.safetensors").exists()
    losses = [row["lm_loss"] for row in training_rows(final.parent)]
    assert losses[-1] < losses[0] - 0.5


def test_frozen_weights_have_no_gradients_no_moments_and_a_bias_that_stays(base):
    model, _ = load_model(base, "cpu")
    adapters.add_lora(model, LoraConfig(targets=EVERYTHING), base, [1, 2])
    ids = torch.randint(0, 400, (2, 9))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if "lora" in name or "trainable_tokens" in name}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    from minimoe.config.training import OptimizerConfig
    from minimoe.train.optim import update_selection_bias

    optimizers = build_optimizers(model, OptimizerConfig(name="adamw"))
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in model.named_parameters() if name in trained}
    bias = {name: b.clone() for name, b in model.named_buffers() if "bias" in name}
    assert bias
    update_selection_bias(model, torch.tensor([[9, 0, 0, 0, 0, 0]]), 0.1)
    assert all(torch.equal(b, bias[name]) for name, b in model.named_buffers() if name in bias)


def test_merged_equals_base_and_adapter(base, run, tmp_path):
    final, ids = run(), torch.randint(0, 400, (2, 9))
    model = adapted(base, final)
    expected = logits_of(model, ids)
    plain = logits_of(load_model(base, "cpu")[0], ids)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits_of(load_model(final, "cpu")[0], ids), expected, atol=1e-5, rtol=1e-5)
    found, receipt = merge_folder(str(final), str(tmp_path / "merged"))
    assert found == base
    assert receipt.passed
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "merged", "cpu")[0], ids), expected, atol=1e-5, rtol=1e-5
    )
    adapters.choose(model, None)
    assert torch.equal(logits_of(model, ids), plain)


def test_an_adapter_loads_in_plain_peft_on_the_exported_base(base, run, tmp_path):
    # Without control_tokens: GLM4-MoE, which the base is exported to, does not tie its embeddings.
    final, ids = run(lora={"targets": EVERYTHING[:-1]}), torch.randint(0, 400, (2, 9))
    export_folder(str(base), str(tmp_path / "stock"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert not isinstance(stock, MiniMoeForCausalLM)
    theirs = PeftModel.from_pretrained(stock, final)
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(adapted(base, final), ids), atol=1e-5, rtol=1e-4)


def test_several_adapters_stand_beside_each_other(base, run):
    first, second = run("first"), run("second", lora={"targets": EVERYTHING, "rank": 3})
    ids = torch.randint(0, 400, (2, 9))
    model = adapted(base, first, second)
    for name, folder in (("a0", first), ("a1", second), ("a0", first)):
        adapters.choose(model, name)
        assert torch.equal(logits_of(model, ids), logits_of(adapted(base, folder), ids))


def test_a_resumed_run_leaves_the_same_bytes(run):
    final = run()
    expected = outcome(final.parent)
    cut_back(final.parent, 2)
    run(resume=True)
    assert outcome(final.parent) == expected


def test_generation_uses_the_merged_model_at_full_speed(run):
    engine = Engine.from_pretrained(run(), "cpu")
    assert engine.packed() is not None


def test_another_base_is_refused(base, run):
    final = run()
    tensors = load_file(base / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1e-6}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other weights"):
        load_model(final, "cpu")
    (base / "config.json").unlink()
    with pytest.raises(UserError, match="base model is not in"):
        load_model(final, "cpu")


def test_a_broken_adapter_is_refused(base, run):
    final = run()
    file = final / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(UserError, match="do not fit"):
        adapters.put_on(load_model(base, "cpu")[0], final, "a")
    torch.save({}, final / "adapter_model.bin")
    file.rename(final / "elsewhere")
    with pytest.raises(UserError, match="no other file is read"):
        load_model(final, "cpu")
    (final / "elsewhere").rename(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot load the adapter"):
        load_model(final, "cpu")


def test_an_adapter_on_an_adapter_is_refused(run, sft_config):
    final = run()
    values = sft_config(final, "again").model_dump(exclude={"optimizer"}) | {"lora": {}}
    with pytest.raises(UserError, match="minimoe merge"):
        sft.run(SftRun.model_validate(values))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"lora": {}, "optimizer": {"name": "muon"}}, "adamw"),
        ({"lora": {"dropout": 0.1}}, "dropout"),
        ({"lora": {"targets": ["everything"]}}, "targets"),
        ({"lora": {"targets": []}}, "targets"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(values, problem, sft_config, base):
    with pytest.raises(ValueError, match=problem):
        SftRun.model_validate(sft_config(base).model_dump(exclude={"optimizer"}) | values)


def test_targets_that_the_model_lacks_are_refused_when_nothing_is_left(tiny_tokenizer, tmp_path):
    model = tiny_model()
    with pytest.raises(UserError, match=r"lora\.targets"):
        adapters.add_lora(model, LoraConfig(targets=("dense", "shared_experts")), tmp_path)


def test_the_command_merges_and_compares_adapters(base, run, tmp_path, monkeypatch, capsys, sft_config):
    final = run()
    capsys.readouterr()
    out = tmp_path / "merged"
    assert run_command(monkeypatch, "merge", final, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    words = ["--chat", "--json", "--prompt", "Where is the cat?", "temperature=0"]
    assert run_command(monkeypatch, "generate", base, "--adapter", final, "--adapter", final, *words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run_command(monkeypatch, "generate", out, *words) == 0
    merged = json.loads(capsys.readouterr().out)
    assert [row["adapter"] for row in rows] == [str(final)] * 2
    assert [row["text"] for row in rows] == [merged["text"]] * 2
    assert run_command(monkeypatch, "merge", base, "--out", tmp_path / "other") == 2
    path = write_yaml(tmp_path / "sft.yaml", sft_config(base))
    assert run_command(monkeypatch, "sft", path, "lora.rank=2", "optimizer.name=muon") == 2
    assert "adamw" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["replicated", "grouped"])
@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_frozen_experts_pass_gradients_on_in_every_form(path, frozen):
    experts = tiny_model(hidden_size=64, moe_intermediate_size=64).model.layers[0].mlp.experts
    for name in frozen:
        getattr(experts, name).requires_grad_(False)
    ids = torch.randint(0, 5, (40, 2))  # the last expert idles
    grads = []
    for backends in ((), ("cpu",), ("c", "cpu")):
        tokens = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weights = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with using(*backends):
            dispatch.DISPATCHES[path](tokens, ids, weights, experts).square().sum().backward()
        learned = [p.grad.clone() for p in experts.parameters() if p.requires_grad]
        experts.zero_grad()
        grads.append([tokens.grad, weights.grad, *learned])
        assert all(getattr(experts, name).grad is None for name in frozen)
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-4, rtol=1e-4)


def test_tokens_that_the_base_has_never_seen_are_told_of(base, run, capsys, tiny_tokenizer):
    model, _ = load_model(base, "cpu")
    control = tiny_tokenizer.get_added_vocab()
    assert adapters.untrained(model, control) == []
    weight = model.get_input_embeddings().weight
    pushed = torch.randn(weight.shape[1])
    with torch.no_grad():  # tied: the two are pushed the same way, and nothing else happens to them
        for token in ("<think>", "</think>"):
            weight[control[token]] = pushed + 0.01 * weight[control[token]]
    assert adapters.untrained(model, control) == ["<think>", "</think>"]
    model.save_pretrained(base)
    run(lora={"targets": ["attention"]})
    assert "had <think>, </think>" in capsys.readouterr().err
    untied = tiny_model(vocab_size=448, tie_word_embeddings=False)
    with torch.no_grad():
        untied.get_input_embeddings().weight[5] *= 0.01
    assert adapters.untrained(untied, {"<a>": 5, "<b>": 6}) == ["<a>"]


def test_adapters_of_experts_do_without_onednn_whose_kernels_are_of_a_size_each(base):
    device = torch.device("cpu")
    with float32_by_onednn(device, 512):
        expected = torch.get_float32_matmul_precision()  # where this CPU has no use for it, the usual one
    for targets, precision in ((("attention", "shared_experts"), expected), (("experts",), "highest")):
        model, _ = load_model(base, "cpu")
        adapters.add_lora(model, LoraConfig(targets=targets), base)
        model.config.hidden_size = 512
        with fast_float32(model, device):
            assert torch.get_float32_matmul_precision() == precision
