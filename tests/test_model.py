"""The model as a citizen of transformers, and the exactness of caching, padding and packing."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from tiny import relative_error, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimoe import MiniMoeConfig, MiniMoeForCausalLM
from minimoe.model.config import num_parameters
from minimoe.model.losses import IGNORE_INDEX

# Token 0 is drawn nowhere: it is the padding, and `generate` infers a mask from padding inside a prompt.
# Float32 logits of magnitude 1 to 10 through 2 layers; orders of summation differ.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SHAPES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size moe_intermediate_size num_experts_per_tok max_position_embeddings rms_norm_eps "
    "tie_word_embeddings norm_topk_prob"
).split()


def copied_into(reference, config: MiniMoeConfig) -> MiniMoeForCausalLM:
    model = MiniMoeForCausalLM(config)
    loaded = model.load_state_dict(reference.state_dict(), strict=False)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_qwen3_moe_with_the_same_weights(training, attention):
    torch.manual_seed(0)
    config = tiny_config(attn_implementation=attention)
    shapes = {name: getattr(config, name) for name in SHAPES}
    reference = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**shapes, num_experts=6, initializer_range=0.2, attn_implementation=attention)
    )
    model = copied_into(reference, config).train(training)
    input_ids = torch.randint(1, 97, (2, 31))
    expected = reference.eval()(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_equal_glm4_moe_with_sigmoid_router_bias_shared_expert_and_dense_first_layer(training):
    torch.manual_seed(0)
    config = tiny_config(
        num_hidden_layers=3,
        scoring_func="sigmoid",
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        tie_word_embeddings=False,
    )
    shapes = {name: getattr(config, name) for name in SHAPES}
    reference = Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **shapes,
            n_routed_experts=6,
            n_shared_experts=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            use_qk_norm=True,
            num_nextn_predict_layers=0,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        )
    )
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    model = copied_into(reference, config).train(training)
    input_ids = torch.randint(1, 97, (2, 31))
    torch.testing.assert_close(model(input_ids).logits, reference.eval()(input_ids).logits, **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_and_gradients_equal_llama_without_qk_norm_and_experts(training):
    torch.manual_seed(0)
    config = tiny_config(use_qk_norm=False, first_k_dense_replace=2)
    shapes = {name: getattr(config, name) for name in SHAPES if "expert" not in name and name != "norm_topk_prob"}
    reference = LlamaForCausalLM(LlamaConfig(**shapes, initializer_range=0.2)).train(training)
    model = copied_into(reference, config).train(training)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config.to_dict())
    input_ids = torch.randint(1, 97, (2, 31))
    ours, expected = model(input_ids, labels=input_ids), reference(input_ids, labels=input_ids)
    torch.testing.assert_close(ours.logits, expected.logits, **CLOSE)
    ours.lm_loss.backward()
    expected.loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, **CLOSE)


@pytest.mark.parametrize(
    "overrides", [{}, {"scoring_func": "sigmoid", "n_shared_experts": 1, "first_k_dense_replace": 1}]
)
def test_a_saved_model_comes_back_through_auto_classes_with_the_same_logits(tmp_path, overrides):
    model = tiny_model(**overrides).eval()
    input_ids = torch.randint(1, 97, (2, 9))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MiniMoeForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_experts_are_split_per_expert_on_disk_and_stacked_in_memory(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        down = file.get_tensor("model.layers.1.mlp.experts.3.down_proj.weight")
        up = file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    assert "lm_head.weight" not in names
    assert not any(name.endswith("gate_up_proj") for name in names)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(down, experts.down_proj[3])
    assert torch.equal(up, experts.gate_up_proj[3, 24:])


def test_missing_weights_are_an_error_and_not_random_numbers(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing from the checkpoint.*layers\.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny_config(num_hidden_layers=3))


def test_bf16_loading_keeps_the_selection_bias_in_float32(tmp_path):
    tiny_model(scoring_func="sigmoid").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 8}, "hiden_size: unknown key, did you mean 'hidden_size'"),
        ({"num_experts_per_tok": 7}, "7 experts per token, but there are only num_experts = 6"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "5 heads do not divide hidden_size 32"),
        ({"hidden_size": "32"}, "hidden_size: expected int, got '32'"),
        ({"scoring_func": "tanh"}, "expected 'softmax' or 'sigmoid', got 'tanh'"),
        ({"train_dispatch": "fast"}, "unknown dispatch 'fast', known: replicated, grouped"),
        ({"router_bias_update_rate": 0.1}, "only with scoring_func: sigmoid"),
        ({"vocab_size": 0}, "vocab_size: must be at least 1"),
    ],
)
def test_a_wrong_architecture_is_refused_by_name(overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        tiny_config(**overrides)


def test_all_contradictions_are_reported_together():
    with pytest.raises(ValueError, match=r"num_key_value_heads.*num_experts_per_tok"):
        tiny_config(num_key_value_heads=3, num_experts_per_tok=9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_with_cache_equals_full_forwards(attention):
    model = tiny_model(attn_implementation=attention).eval()
    input_ids = torch.randint(1, 97, (2, 7))
    generated = model.generate(input_ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = input_ids
    for _ in range(20):
        expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_decoding_step_by_step_gives_the_logits_of_the_full_forward(name):
    model = tiny_model().eval()
    input_ids = torch.randint(1, 97, (2, 12))
    full = model(input_ids, use_cache=False).logits
    outputs = model(input_ids[:, :5], use_cache=True)
    torch.testing.assert_close(outputs.logits, full[:, :5], **CLOSE)
    for position in range(5, 12):
        outputs = model(input_ids[:, position : position + 1], **{name: outputs.cache}, use_cache=True)
        torch.testing.assert_close(outputs.logits[:, 0], full[:, position], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_either_side_does_not_change_real_tokens(side, use_cache, attention):
    model = tiny_model(attn_implementation=attention).eval()
    prompt, padding = torch.randint(1, 97, (1, 9)), torch.zeros(1, 4, dtype=torch.long)
    pieces = [(padding, 0), (prompt, 1)] if side == "left" else [(prompt, 1), (padding, 0)]
    input_ids = torch.cat([ids for ids, _ in pieces], dim=1)
    mask = torch.cat([torch.full_like(ids, value) for ids, value in pieces], dim=1)
    other = torch.randint(1, 97, (1, 13))
    logits = model(
        torch.cat((input_ids, other)),
        attention_mask=torch.cat((mask, torch.ones_like(other))),
        use_cache=use_cache,
    ).logits
    torch.testing.assert_close(logits[:1][mask.bool()], model(prompt).logits[0], **CLOSE)
    torch.testing.assert_close(logits[1:], model(other).logits, **CLOSE)


def test_left_padded_prompts_generate_what_they_generate_alone():
    model = tiny_model().eval()
    prompts = [torch.randint(1, 97, (1, length)) for length in (3, 8)]
    padded = torch.stack([torch.nn.functional.pad(p[0], (8 - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones(p.shape[1]), (8 - p.shape[1], 0)) for p in prompts]).long()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **settings)[:, 8:]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, model.generate(prompt, **settings)[0, prompt.shape[1] :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_give_the_logits_and_gradients_of_separate_ones(use_cache, attention):
    model = tiny_model(attn_implementation=attention).train()
    lengths = [5, 1, 9, 3]
    documents = [torch.randint(1, 97, (1, n)) for n in lengths]
    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(n)[None] for n in lengths], dim=1)
    logits = model(packed, position_ids=position_ids, use_cache=use_cache).logits
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    separate = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(logits, separate, **CLOSE)
    separate.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < 1e-5, name


def test_a_packed_row_with_padding_beside_a_plain_row_stays_exact():
    model = tiny_model().eval()
    a, b, plain = torch.randint(1, 97, (1, 4)), torch.randint(1, 97, (1, 5)), torch.randint(1, 97, (1, 12))
    packed = torch.cat((a, b, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    positions = torch.tensor([[*range(4), *range(5), *range(3)], [*range(12)]])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    logits = model(torch.cat((packed, plain)), attention_mask=mask, position_ids=positions).logits
    for actual, alone in ((logits[0, :4], a), (logits[0, 4:9], b), (logits[1], plain)):
        torch.testing.assert_close(actual, model(alone).logits[0], **CLOSE)


def test_losses_of_all_terms_add_up_and_padding_counts_in_none():
    model = tiny_model(router_z_loss_coef=0.1).train()
    real = torch.randint(1, 97, (2, 8))
    padded = torch.cat((real, torch.randint(1, 97, (2, 4))), dim=1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 8:] = 0
    labels = padded.masked_fill(mask == 0, IGNORE_INDEX)
    expected = model(real, labels=real)
    actual = model(padded, attention_mask=mask, labels=labels)
    for term in ("loss", "lm_loss", "load_balancing_loss", "router_z_loss"):
        torch.testing.assert_close(actual[term], expected[term], **CLOSE)
    assert torch.equal(actual.expert_counts, expected.expert_counts)
    assert actual.expert_counts.sum(1).tolist() == [2 * 8 * 2] * 2
    total = actual.lm_loss + 0.01 * actual.load_balancing_loss + 0.1 * actual.router_z_loss
    torch.testing.assert_close(actual.loss, total)


def test_skipping_logits_changes_no_loss_and_no_gradient():
    model = tiny_model().train()
    input_ids = torch.randint(1, 97, (2, 10))
    labels = input_ids.masked_fill(torch.rand(2, 10) < 0.5, IGNORE_INDEX)
    results = []
    for skip in (False, True):
        model.zero_grad()
        outputs = model(input_ids, labels=labels, skip_logits=skip)
        outputs.loss.backward()
        results.append((outputs, model.model.embed_tokens.weight.grad.clone()))
    assert results[1][0].logits is None
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    assert relative_error(results[1][1], results[0][1]) < 1e-5


def test_gradient_checkpointing_changes_no_gradient():
    input_ids = torch.randint(1, 97, (2, 10))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert relative_error(checkpointed, plain) < 1e-6


def test_optional_outputs_follow_transformers():
    model = tiny_model(attn_implementation="eager").eval()
    input_ids = torch.randint(1, 97, (2, 6))
    outputs = model(input_ids, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(12, 6)] * 2
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 6, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 6, 6)] * 2
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, outputs.logits[:, -2:])
    some = torch.rand(input_ids.shape) < 0.5
    kept = model(input_ids, labels=input_ids, logits_to_keep=some)
    torch.testing.assert_close(kept.logits, outputs.logits[some])
    torch.testing.assert_close(kept.lm_loss, model(input_ids, labels=input_ids).lm_loss)
    assert isinstance(model(input_ids, return_dict=False), tuple)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
    ],
)
def test_rope_scaling_types_of_transformers_work_and_survive_a_reload(tmp_path, rope):
    model = tiny_model(rope_parameters=rope).eval()
    input_ids = torch.randint(1, 97, (1, 40))
    expected = model(input_ids).logits
    assert not torch.allclose(expected, tiny_model().eval()(input_ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, expected)
