"""Models that leave and come back: the same logits, weights and text, or a refusal by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from minimoe.cli import main
from minimoe.config import PretrainRun
from minimoe.convert.export import export_folder
from minimoe.convert.gguf_file import export_gguf
from minimoe.convert.imports import import_folder
from minimoe.convert.receipt import BAR
from minimoe.convert.upcycle import upcycle_folder
from minimoe.errors import UserError
from minimoe.loading import load_model
from minimoe.train import pretrain, sft

DENSE = {"first_k_dense_replace": 2}
SHARED = {"scoring_func": "sigmoid", "n_shared_experts": 2, "routed_scaling_factor": 1.5}
# What of ours: the layout that says it.
LAYOUTS = {
    "softmax": ({}, "qwen3-moe"),
    "not normalised": ({"norm_topk_prob": False, "tie_word_embeddings": False}, "qwen3-moe"),
    "dense first": ({"first_k_dense_replace": 1}, "qwen3-moe"),
    "rope scaling": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}, "qwen3-moe"),
    "sigmoid": ({"scoring_func": "sigmoid"}, "glm4-moe"),
    "shared experts": (SHARED | {"first_k_dense_replace": 1}, "glm4-moe"),
    "sigmoid without QK-norm": ({"scoring_func": "sigmoid", "use_qk_norm": False}, "glm4-moe"),
    "dense": (DENSE, "qwen3"),
    "dense without QK-norm": (DENSE | {"use_qk_norm": False}, "llama"),
}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """A model folder of ours, with norms and biases far from their initial values."""

    def make(name: str = "ours", dtype: torch.dtype = torch.float32, **overrides):
        ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
        model = tiny_model(vocab_size=448, **ids, **overrides)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def weights(path) -> dict[str, torch.Tensor]:
    return load_model(path, "cpu")[0].state_dict()


@pytest.mark.parametrize(("overrides", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_model_leaves_as_the_stock_one_that_says_it_and_comes_back(folder, tmp_path, overrides, layout):
    name, receipt = export_folder(folder(**overrides), str(tmp_path / "out"))
    assert name == layout
    assert receipt.logit_difference < BAR * receipt.largest_logit
    assert receipt.num_positions > 100
    assert receipt.greedy_tokens_equal
    assert receipt.texts_equal
    assert receipt.chat_equal
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert stock.config.model_type == layout.replace("-", "_")
    ids = torch.randint(0, 400, (2, 30))
    ours, _ = load_model(tmp_path / "ours", "cpu")
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)

    _, back = import_folder(str(tmp_path / "out"), str(tmp_path / "back"))
    assert back.passed
    before, after = weights(tmp_path / "ours"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("overrides", "to", "message"),
    [
        ({"scoring_func": "sigmoid"}, "qwen3-moe", "qwen3-moe has no scoring_func: sigmoid\n  fix: --to glm4-moe"),
        ({"n_shared_experts": 1}, "qwen3-moe", "no n_shared_experts: 1\n  fix: --to gguf"),
        ({"n_shared_experts": 1}, None, "no architecture of transformers is this model: qwen3-moe has no n_shared"),
        ({"routed_scaling_factor": 2.0}, "qwen3-moe", "qwen3-moe has no routed_scaling_factor: 2.0"),
        ({}, "glm4-moe", "glm4-moe has no scoring_func: softmax\n  fix: --to qwen3-moe"),
        ({}, "llama", "llama has no experts, no use_qk_norm: true"),
        (DENSE, "glm4-moe", "glm4-moe has no model without experts\n  fix: --to qwen3"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_by_name(folder, tmp_path, overrides, to, message):
    with pytest.raises(UserError) as refusal:
        export_folder(folder(**overrides), str(tmp_path / "out"), to)
    assert message in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]  # nothing half done is left


def test_an_exported_folder_names_each_expert_and_needs_no_minimoe(folder, tmp_path, tiny_tokenizer):
    export_folder(folder(), str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.5.up_proj.weight" in names
    assert not any("gate_up" in name for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 6
    code = (
        "import sys; sys.modules['minimoe'] = None\n"
        "from transformers import pipeline\n"
        f"chat = pipeline('text-generation', {str(tmp_path / 'out')!r}, device='cpu')\n"
        "print(chat([{'role': 'user', 'content': 'hello'}], max_new_tokens=4, do_sample=False)[0]['generated_text'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "'role': 'assistant'" in result.stdout, result.stderr


def test_an_export_rounds_when_asked_and_cuts_files(folder, tmp_path):
    _, receipt = export_folder(folder(), str(tmp_path / "out"), dtype="bfloat16", max_shard_size="50KB")
    assert receipt.passed  # equal to our model with the same rounding
    assert receipt.rounding > 1e-3
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert weights(tmp_path / "ours")["model.norm.weight"].dtype == torch.float32
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16


def test_the_selection_bias_stays_in_float32(folder, tmp_path):
    export_folder(folder(scoring_func="sigmoid"), str(tmp_path / "out"), dtype="bfloat16")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        bias = file.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert file.get_tensor("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16
    assert torch.equal(bias, weights(tmp_path / "ours")["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_the_commands_print_a_receipt_and_refuse_a_used_folder(folder, tmp_path, capsys, monkeypatch):
    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["minimoe", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    ours, out = folder(**DENSE), str(tmp_path / "out")
    assert command("export", ours, "--out", out) == 0
    printed = capsys.readouterr().out
    assert re.search(r"largest logit difference .* \d\.\de-0\d \(at \d+ positions", printed)
    assert re.search(r"chat template .* equal", printed)
    assert command("export", ours, "--out", out) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert command("import", out, "--out", out + "2", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"]
    experts = ["--num-experts", "4", "--num-experts-per-tok", "2"]
    assert command("upcycle", out, *experts, "--noise", "0.01", "--out", out + "3") == 0
    assert re.search(r"noise .* 0.01 moves a logit by up to", capsys.readouterr().out)
    assert command("export", ours, "--to", "mixtral", "--out", out + "4") == 2
    assert "--to mixtral: unknown, known: qwen3-moe, glm4-moe" in capsys.readouterr().err
    assert command("export", ours, "--max-shard-size", "lots", "--out", out + "4") == 2
    assert "--max-shard-size lots: no size" in capsys.readouterr().err
    assert command("import", "Qwen/Qwen3-30B-A3B", "--out", out + "4") == 2
    assert "hf download Qwen/Qwen3-30B-A3B --local-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
    ],
)
def test_what_minimoe_does_not_have_is_refused_by_name(folder, tmp_path, change, message):
    export_folder(folder(), str(tmp_path / "out"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = type(stock)(type(stock.config)(**(stock.config.to_dict() | change)))
    changed.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=f"minimoe has no qwen3_moe model with .*{message}"):
        import_folder(str(tmp_path / "out"), str(tmp_path / "back"))


def test_shared_experts_that_are_weighted_for_each_token_are_refused(tmp_path, tiny_tokenizer):
    sizes = {"vocab_size": 448, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    widths = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_key_value_heads": 2}
    config = Qwen2MoeConfig(**sizes, **widths, num_experts=4, qkv_bias=False, head_dim=8)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "in")
    tiny_tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(UserError, match="weighted for each token"):
        import_folder(str(tmp_path / "in"), str(tmp_path / "out"))
    config.save_pretrained(tmp_path / "bert")
    values = json.loads((tmp_path / "bert" / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="a bert model cannot be imported"):
        import_folder(str(tmp_path / "bert"), str(tmp_path / "out"))


@pytest.fixture
def minimind(folder, tmp_path, tiny_tokenizer):
    """A folder as minimind wrote them in April 2025, or with QK-norm since March 2026, made of a model of ours."""

    def make(pickle: bool = False, use_qk_norm: bool = False, **overrides):
        model, _ = load_model(folder(use_qk_norm=use_qk_norm, **overrides), "cpu")
        config, width, tensors = model.config, model.config.moe_intermediate_size, {}
        for key, value in model.state_dict().items():
            place, _, last = key.rpartition(".")
            if last in ("gate_up_proj", "down_proj"):
                for expert, matrix in enumerate(value):
                    parts = {"down_proj": matrix}
                    if last == "gate_up_proj":
                        parts = {"gate_proj": matrix[:width], "up_proj": matrix[width:]}
                    tensors |= {f"{place}.{expert}.{name}.weight": part for name, part in parts.items()}
            elif "shared_experts" in key:
                axis = 1 if "down_proj" in key else 0
                for shared, part in enumerate(value.split(width, dim=axis)):
                    tensors[key.replace("shared_experts", f"shared_experts.{shared}")] = part
            elif key != "model.embed_tokens.weight":  # tied: saved as lm_head
                tensors[key] = value
        same = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act"
        same += " max_position_embeddings rms_norm_eps num_experts_per_tok norm_topk_prob"
        same += " num_experts moe_intermediate_size head_dim" if use_qk_norm else " n_shared_experts scoring_func"
        values = {key: getattr(config, key) for key in same.split()}
        values |= {"model_type": "minimind", "use_moe": config.num_moe_layers > 0, "rope_theta": 10000.0}
        values |= {"bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0}
        values["intermediate_size"] = width if config.num_moe_layers and not use_qk_norm else config.intermediate_size
        if not use_qk_norm:
            values["n_routed_experts"] = config.num_experts
        (tmp_path / "mind").mkdir()
        (tmp_path / "mind" / "config.json").write_text(json.dumps(values))
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        if pickle:
            torch.save(tensors, tmp_path / "mind" / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / "mind" / "model.safetensors", metadata={"format": "pt"})
        tiny_tokenizer.save_pretrained(tmp_path / "mind")
        return str(tmp_path / "mind")

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_shared_experts": 2},
        {},
        {"num_experts_per_tok": 1, "norm_topk_prob": False, "n_shared_experts": 1},
        DENSE,
        {"use_qk_norm": True},
        {"use_qk_norm": True, **DENSE},
    ],
    ids=["two shared experts", "none", "one expert a token", "dense", "2026", "2026 dense"],
)
def test_minimind_folders_are_read(minimind, tmp_path, overrides):
    config, receipt = import_folder(minimind(**overrides), str(tmp_path / "out"))
    assert receipt.passed
    assert config.n_shared_experts == overrides.get("n_shared_experts", 0)
    ids = torch.randint(0, 400, (2, 30))
    ours, imported = (load_model(tmp_path / name, "cpu")[0] for name in ("ours", "out"))
    torch.testing.assert_close(imported(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_mistral_folder_is_read_as_what_it_is(folder, tmp_path):
    export_folder(folder(use_qk_norm=False, **DENSE), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert import_folder(str(tmp_path / "out"), str(tmp_path / "back"))[1].passed
    before, after = weights(tmp_path / "ours"), weights(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_pickle_is_read_only_when_asked_for(minimind, tmp_path):
    source = minimind(pickle=True, n_shared_experts=1)
    with pytest.raises(UserError, match="a pickle, which can carry code") as refusal:
        import_folder(source, str(tmp_path / "out"))
    assert "--allow-pickle" in refusal.value.fix
    assert import_folder(source, str(tmp_path / "out"), allow_pickle=True)[1].passed


def test_an_imported_model_is_fine_tuned_and_an_upcycled_one_trains_on(folder, tmp_path, sft_config, pretrain_config):
    export_folder(folder(scoring_func="sigmoid"), str(tmp_path / "out"))
    import_folder(str(tmp_path / "out"), str(tmp_path / "back"))
    sft.run(sft_config(tmp_path / "back", max_steps=2), resume=False)
    upcycle_folder(folder("dense", **DENSE), str(tmp_path / "moe"), 4, 2, noise=0.05)
    config = pretrain_config(max_steps=2).model_dump() | {"init_from": str(tmp_path / "moe")}
    pretrain.run(PretrainRun.model_validate(config | {"tokenizer": None, "model": None}), resume=False)
    for source, run in (("back", "sft"), ("moe", "run")):
        before, after = weights(tmp_path / source), weights(tmp_path / run / "final")
        name = "model.layers.1.mlp.experts.down_proj"
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(("num_experts", "k", "slices"), [(4, 2, 1), (4, 1, 1), (8, 4, 2), (12, 3, 3), (4, 4, 4)])
def test_an_upcycled_model_computes_what_the_dense_one_does(folder, tmp_path, num_experts, k, slices):
    source = folder(use_qk_norm=slices % 2 == 0, **DENSE)
    config, receipt, moved = upcycle_folder(source, str(tmp_path / "moe"), num_experts, k, slices=slices)
    assert receipt.passed
    assert moved < 1e-4  # what the file's rounding could move: nothing in float32
    assert config.moe_intermediate_size == 48 // slices
    ids = torch.randint(0, 400, (2, 30))
    dense, moe = (load_model(tmp_path / name, "cpu")[0] for name in ("ours", "moe"))
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)
    counts = moe(ids, labels=ids).expert_counts
    assert counts.sum() == 2 * 2 * 30 * k
    # The slices of a copy are chosen together.
    assert (counts.view(2, -1, slices) == counts.view(2, -1, slices)[..., :1]).all()


def test_noise_makes_experts_differ_and_wrong_numbers_are_refused(folder, tmp_path):
    source = folder(**DENSE)
    _, receipt, moved = upcycle_folder(source, str(tmp_path / "moe"), 4, 2, noise=0.05, first_k_dense=1)
    assert receipt.passed
    assert moved > 0.01
    after = weights(tmp_path / "moe")
    assert "model.layers.0.mlp.gate_proj.weight" in after
    first, second = after["model.layers.1.mlp.experts.down_proj"][:2]
    assert 0.03 < (first - second).std() / first.std() < 0.15  # 0.05 * sqrt(2) is 0.07
    for numbers, options, message in [
        ((6, 3), {"slices": 2}, "--num-experts-per-tok 3 is no multiple of --slices 2"),
        ((10, 5), {"slices": 5}, "--slices 5 does not divide the dense width 48"),
        ((2, 3), {}, "num_experts_per_tok: 3 experts per token, but there are only num_experts = 2"),
        ((2, 2), {"first_k_dense": 2}, "--first-k-dense 2 leaves none of 2 layers"),
    ]:
        with pytest.raises(UserError, match=message):
            upcycle_folder(source, str(tmp_path / "no"), *numbers, **options)
    with pytest.raises(UserError, match="has experts already"):
        upcycle_folder(str(tmp_path / "moe"), str(tmp_path / "no"), 4, 2)


GGUF = {
    "softmax": ({}, "qwen3moe"),
    "dense": (DENSE, "qwen3"),
    "sigmoid": ({"scoring_func": "sigmoid"}, "glm4moe"),
    "softmax and shared experts": ({"n_shared_experts": 2, "first_k_dense_replace": 1}, "glm4moe"),
    "scaled": ({"norm_topk_prob": False, "routed_scaling_factor": 2.0}, "glm4moe"),
}


@pytest.mark.parametrize(("overrides", "name"), GGUF.values(), ids=GGUF)
def test_a_gguf_file_holds_the_model_its_tokenizer_and_its_template(folder, tmp_path, tiny_tokenizer, overrides, name):
    actual, receipt = export_gguf(folder(**overrides), str(tmp_path / "out"))
    assert actual == name
    assert receipt.passed
    assert (receipt.logit_difference is None) == (name == "glm4moe")  # which transformers does not read
    reader = GGUFReader(tmp_path / "out" / "model-f32.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "qwen2"
    assert reader.get_field("tokenizer.ggml.tokens").contents()[tiny_tokenizer.eos_token_id] == "<|im_end|>"
    assert "generation %}" not in reader.get_field("tokenizer.chat_template").contents()
    if name != "qwen3":
        experts = next(t for t in reader.tensors if t.name == "blk.1.ffn_up_exps.weight")
        stored = torch.tensor(np.array(experts.data))
        expected = weights(tmp_path / "ours")["model.layers.1.mlp.experts.gate_up_proj"][:, 24:]
        assert torch.equal(stored, expected)
    if name == "glm4moe":
        assert bool(reader.get_field("glm4moe.expert_weights_norm").contents()) == overrides.get("norm_topk_prob", True)
        score = {"softmax": 1, "sigmoid": 2}[overrides.get("scoring_func", "softmax")]
        assert reader.get_field("glm4moe.expert_gating_func").contents() == score
        assert {t.name for t in reader.tensors} >= {"blk.1.exp_probs_b.bias", "blk.1.ffn_down_shexp.weight"}
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-f32.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_a_gguf_file_rounds_as_it_says(folder, tmp_path, dtype):
    """Rows of 32 values are one block of q8_0; the experts' last matrices, with rows of 24, stay float16."""
    _, receipt = export_gguf(folder(), str(tmp_path / "out"), dtype)
    assert receipt.passed  # against our model with the same rounding
    assert receipt.rounding > 1e-3
    (path,) = (tmp_path / "out").glob("*.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    expected = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.ffn_gate_exps.weight"] == expected
    assert kinds["blk.0.ffn_down_exps.weight"] == ("F16" if dtype == "q8_0" else expected)
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"


def test_gguf_refuses_what_it_cannot_write(folder, tmp_path, monkeypatch):
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    for name, overrides, message in [
        ("a", yarn, "writes no rope_type yarn"),
        ("b", DENSE | {"use_qk_norm": False}, "no dense model without QK-norm"),
    ]:
        with pytest.raises(UserError, match=message):
            export_gguf(folder(name, **overrides), str(tmp_path / "out"))
    ours = folder()
    tokenizer = AutoTokenizer.from_pretrained(ours)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="splits text as Qwen2 does"):
        export_gguf(ours, str(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="the package gguf is not installed") as missing:
        export_gguf(ours, str(tmp_path / "out"))
    assert missing.value.fix == "pip install 'minimoe[gguf]'"
