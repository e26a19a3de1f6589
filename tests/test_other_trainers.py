"""PEFT's adapters, TRL's trainers and torchao's quantisation on a model of ours."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM, TorchAoConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from minimoe.train.callback import SelectionBiasCallback

SIGMOID = {"scoring_func": "sigmoid", "n_shared_experts": 1, "first_k_dense_replace": 1}
VARIANTS = {"softmax": {}, "sigmoid": SIGMOID | {"router_bias_update_rate": 0.1}}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def folder(request, tmp_path, tiny_tokenizer) -> str:
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_model(vocab_size=448, **ids, **request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_an_adapter_of_the_stacked_experts_trains_saves_and_merges(folder, tmp_path):
    ids = torch.randint(0, 400, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(folder)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("experts" in name for name in trained)
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    expected = adapted.eval()(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (plain(ids).logits - expected).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def trainer_of(kind: str, folder: str, output: str, tokenizer, **more):
    common = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": "none"}
    common |= {"output_dir": output, "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False}
    common |= {"save_strategy": "no"}
    if kind == "sft":
        turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "The boat said hello."}]
        return SFTTrainer(
            folder, SFTConfig(**common), train_dataset=Dataset.from_list([{"messages": turn}] * 8), **more
        )
    if kind == "dpo":
        pair = {"prompt": "hello", "chosen": " cat", "rejected": " boat"}
        rows = Dataset.from_list([pair] * 8)
        return DPOTrainer(folder, args=DPOConfig(**common), train_dataset=rows, processing_class=tokenizer, **more)
    arguments = GRPOConfig(**common, num_generations=4, max_completion_length=6)
    rows = Dataset.from_list([{"prompt": "hello"}] * 8)

    def variety(completions, **_):
        return [float(len(set(text))) for text in completions]

    return GRPOTrainer(folder, variety, args=arguments, train_dataset=rows, processing_class=tokenizer, **more)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trls_trainers_train_with_their_defaults_and_the_bias_moves_with_the_callback(
    kind, folder, tmp_path, tiny_tokenizer
):
    torch.manual_seed(0)  # GRPO's answers must not all be alike
    trainer = trainer_of(kind, folder, str(tmp_path / "out"), tiny_tokenizer, callbacks=[SelectionBiasCallback()])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.train()
    assert not [str(warning.message) for warning in warned if "no effect" in str(warning.message)]
    logged = trainer.state.log_history
    assert any(row.get("aux_loss", 0) > 1 for row in logged)  # of the routers, which TRL computes itself
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("experts.down_proj" in name for name in moved)
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert set(biases) <= moved


def test_a_trainer_without_the_callback_says_that_the_bias_stays(tmp_path, tiny_tokenizer):
    tiny_model(vocab_size=448, pad_token_id=1, **VARIANTS["sigmoid"]).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    trainer = trainer_of("sft", str(tmp_path / "model"), str(tmp_path / "out"), tiny_tokenizer)
    with pytest.warns(UserWarning, match=r"router_bias_update_rate has no effect .*SelectionBiasCallback"):
        trainer.train()


def test_a_quantised_model_is_saved_and_loaded(folder, tmp_path):
    reason = "torchao is not installed: where it is, it logs into every process that imports transformers"
    quantization = pytest.importorskip("torchao.quantization", reason=reason)
    ids = torch.randint(0, 400, (2, 9))
    exact = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    expected = quantised(ids).logits
    assert (expected - exact).abs().max() > 1e-3
    quantised.save_pretrained(tmp_path / "quantised")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
