"""The packed copy against the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import relative_error, tiny_config
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimoe import MiniMoeForCausalLM
from minimoe.config import GenerationSection, OptimizerConfig, WeightsName
from minimoe.errors import UserError
from minimoe.generation import packed
from minimoe.generation.cache import PreallocatedCache
from minimoe.generation.engine import Engine
from minimoe.generation.packed import PackedModel, why_not_packed
from minimoe.model.experts import Experts
from minimoe.ops import using
from minimoe.train.optim import build_optimizers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="packing needs oneDNN")

TOLERANCE = 1e-5  # float32: sums of up to ~50 products, each rounded to 6e-8, in another order; it grows with depth
VARIANTS = {
    "softmax": {},
    "not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "scaled weights": {"routed_scaling_factor": 2.5},
    "sigmoid": {"scoring_func": "sigmoid", "routed_scaling_factor": 1.5},
    "shared experts": {"n_shared_experts": 2},
    "dense first": {"first_k_dense_replace": 1},
    "dense": {"first_k_dense_replace": 3},
    "one expert a token": {"num_experts_per_tok": 1},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "many experts": {"num_experts": 16, "num_experts_per_tok": 4},
    "tied head": {"tie_word_embeddings": True},
    "untied head": {"tie_word_embeddings": False},
    "a key head for every head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "no QK-norm": {"use_qk_norm": False},
    "scaled rope": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


def make_model(dtype: torch.dtype = torch.float32, **changes) -> MiniMoeForCausalLM:
    """Weights far from their initial values, norms and selection bias included."""
    torch.manual_seed(0)
    model = MiniMoeForCausalLM(tiny_config(**{"num_hidden_layers": 3, "initializer_range": 0.2, **changes}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or "e_score" in name:
            tensor.data += 0.3 * torch.randn_like(tensor)
    return model.to(dtype).eval()


def with_rounded_weights(model: MiniMoeForCausalLM) -> MiniMoeForCausalLM:
    """The model whose matrices are those that int8 weights stand for; embeddings, routers and norms as they are."""
    model = copy.deepcopy(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # no longer the embeddings'
    for module in model.modules():
        if isinstance(module, (nn.Linear, Experts)):
            for parameter in module.parameters():
                whole, scales = packed.rounded(parameter.data)
                parameter.data = whole * scales.unsqueeze(-1)
    return model


def steps_of_both(
    model: MiniMoeForCausalLM,
    pads: list[int],
    lengths: list[int],
    packed_from: MiniMoeForCausalLM | None = None,
    weights: WeightsName = "exact",
) -> list[tuple]:
    """Logits (B, V) of packed copy and model after each of the feeds: rows with `pads[i]` pads at their beginning."""
    copied = PackedModel(packed_from or model, weights)
    caches = [PreallocatedCache(model.config, 4) for _ in range(2)]
    total, results, start = sum(lengths), [], 0
    ids = torch.randint(model.config.vocab_size, (len(pads), total))
    columns, padding = torch.arange(total), torch.tensor(pads)[:, None]
    positions = torch.where(columns >= padding, columns - padding, columns)
    mask = (columns >= padding).long() if any(pads) else None
    for length in lengths:
        end = start + length
        now = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
        seen = None if mask is None else mask[:, :end]
        with torch.inference_mode():
            expected = model(**now, attention_mask=seen, cache=caches[0], use_cache=True).logits[:, -1]
        results.append((copied(**now, cache=caches[1], mask=seen), expected))
        start = end
    return results


@pytest.mark.parametrize("pads", [[0], [0] * 8, [3, 0, 5]], ids=["one row", "eight rows", "padded rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_models_own_in_prefill_decode_and_on_a_warm_cache(variant, pads):
    # A prompt, single tokens, several tokens on a warm cache (a conversation's next turn), and single tokens again.
    lengths = [9, 1, 1, 4, 1] if len(pads) == 1 else [9, 1, 1]
    for logits, expected in steps_of_both(make_model(**VARIANTS[variant]), pads, lengths):
        assert relative_error(logits, expected) < TOLERANCE
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 matmuls")
@pytest.mark.parametrize("variant", ["softmax", "sigmoid", "shared experts", "dense first"])
@pytest.mark.parametrize("rows", [1, 8])
def test_bfloat16_logits_are_as_near_to_exact_ones_as_the_models_own(variant, rows):
    # All experts chosen: otherwise a rounding may choose another expert, which tells nothing about the arithmetic.
    model = make_model(torch.bfloat16, **VARIANTS[variant], num_experts=4, num_experts_per_tok=4)
    errors = []
    for seed in range(4):  # a few tokens alone scatter by half
        torch.manual_seed(seed)
        both = steps_of_both(model, [0] * rows, [9, 1, 1])
        torch.manual_seed(seed)
        exact = steps_of_both(copy.deepcopy(model).float(), [0] * rows, [9, 1, 1])
        errors += [
            [relative_error(logits, truth) for logits in pair] for pair, (_, truth) in zip(both, exact, strict=True)
        ]
    copied, plain = (sum(column) for column in zip(*errors, strict=True))
    assert both[0][0].dtype == torch.bfloat16
    assert copied < 1.25 * plain


def test_weights_are_rounded_to_the_nearest_of_255_steps_an_output():
    torch.manual_seed(0)
    matrices = torch.randn(3, 40, 7)
    matrices[1, 4], matrices[2, 3] = 0, 1000 * matrices[2, 3]  # a scale for every output
    whole, scales = packed.rounded(matrices)
    assert whole.dtype == torch.int8
    steps = matrices.abs().amax(dim=-1, keepdim=True) / 127
    assert ((whole * scales.unsqueeze(-1) - matrices).abs() <= 0.5001 * steps).all()


@pytest.mark.parametrize("pads", [[0], [3, 0, 5]], ids=["one row", "padded rows"])
@pytest.mark.parametrize("weights", ["exact", "int8"])
def test_without_compiled_forms_the_copy_is_the_same_function(weights, pads):
    model = make_model()
    plain = with_rounded_weights(model) if weights == "int8" else model
    with using("cpu"):
        for logits, expected in steps_of_both(plain, pads, [9, 1, 1], packed_from=model, weights=weights):
            assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.parametrize("pads", [[0], [0] * 8], ids=["one row", "eight rows"])
@pytest.mark.parametrize("variant", ["softmax", "many experts", "shared experts", "dense first", "tied head"])
def test_int8_weights_are_one_function_in_all_layouts(variant, pads):
    # So that the length of a prompt and the neighbours in a batch do not change what a model says.
    model = make_model(**VARIANTS[variant])
    lengths = [9, 1, 1, 4, 1] if len(pads) == 1 else [9, 1, 1]
    for logits, expected in steps_of_both(
        with_rounded_weights(model), pads, lengths, packed_from=model, weights="int8"
    ):
        assert relative_error(logits, expected) < TOLERANCE


def test_int8_logits_are_as_near_to_exact_ones_as_their_steps_are_small():
    # A step is max|w|/127, about 2.5 standard deviations/127 for rows of 32; rounding is off by step/sqrt(12): 0.6 %
    # of a product. The 3 layers' 12 and the head add up like noise: sqrt(13) * 0.6 % = 2 %. All experts are chosen:
    # otherwise a rounding may choose another expert, which tells nothing about the arithmetic.
    model = make_model(num_experts=4, num_experts_per_tok=4)
    for logits, expected in steps_of_both(model, [0], [9, 1, 1, 4, 1], weights="int8"):
        assert 2e-3 < relative_error(logits, expected) < 4e-2


def test_int8_weights_continue_a_learned_text_like_exact_ones(tiny_tokenizer):
    model = make_model(vocab_size=448, initializer_range=0.05)
    engine = Engine(model, tiny_tokenizer)
    text = "Once upon a time there was a small boat that sailed around the lake"
    ids = engine.encode(text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = GenerationSection(temperature=0, max_new_tokens=len(ids) - len(engine.encode("Once")), weights="int8")
    completion = engine.generate(["Once"], settings)[0]
    assert "Once" + completion.text == text
    assert 0 < engine.int8_cost(ids) < 1e-2


def test_the_cost_of_int8_weights_is_the_divergence_from_the_exact_model(tiny_tokenizer):
    model = make_model(vocab_size=448)
    ids = list(range(5, 35))
    models = (model, with_rounded_weights(model))
    with torch.inference_mode():
        exact, int8 = (m(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1) for m in models)
    expected = (exact * (exact / int8).log()).sum(dim=-1).mean()
    assert Engine(model, tiny_tokenizer).int8_cost(ids) == pytest.approx(float(expected), rel=1e-3)
    assert Engine(with_rounded_weights(model), tiny_tokenizer).int8_cost(ids) < 1e-3 * expected  # nothing left to round


def test_the_engine_decodes_on_the_packed_copy_and_notices_changed_weights(tiny_tokenizer):
    engine = Engine(make_model(vocab_size=448), tiny_tokenizer)
    first = engine.packed()
    assert first is not None
    assert engine.packed() is first
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()  # in place, as an optimizer would
    second = engine.packed()
    assert second is not first
    assert engine.packed("int8") is not second
    third = engine.packed("int8")
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()
    assert engine.packed("int8") is not third
    torch.testing.assert_close(engine.packed("int8").logits([5, 6]), -third.logits([5, 6]))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_engine_notices_a_step_of_the_trainers_optimizers(name, tiny_tokenizer):
    engine = Engine(make_model(vocab_size=448), tiny_tokenizer)
    first = engine.packed()
    optimizers = build_optimizers(engine.model, OptimizerConfig(name=name))
    ids = torch.tensor([[5, 6, 7, 8]])
    engine.model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:  # fused ones are not counted by torch as changes
        optimizer.step()
    assert engine.packed() is not first
    expected = engine.model(input_ids=ids).logits[0]
    torch.testing.assert_close(engine.packed().logits([5, 6, 7, 8]), expected.detach(), atol=1e-5, rtol=1e-5)


def _hooked(model: nn.Module) -> nn.Module:
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def _replaced(model: nn.Module) -> nn.Module:
    block = model.model.layers[1].mlp
    block.forward = block.forward  # as offloading does it
    return model


def _adapted(model: nn.Module) -> nn.Module:
    class LowRank(nn.Linear):
        pass

    model.model.layers[1].self_attn.q_proj = LowRank(32, 32)
    return model


REFUSED = {
    "hooks": (_hooked, "layers.0"),
    "another forward": (_replaced, "layers.1.mlp"),
    "adapters": (_adapted, "q_proj"),
    "float64": (lambda model: model.double(), "float64"),
    "mixed": (lambda model: model.model.norm.bfloat16() and model, "bfloat16 and torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_any_other_model_decodes_with_its_own_forward_and_says_why(case, tiny_tokenizer):
    change, reason = REFUSED[case]
    model = make_model(vocab_size=448)
    assert why_not_packed(model) is None
    engine = Engine(change(model), tiny_tokenizer)
    assert reason in why_not_packed(engine.model)
    assert engine.packed() is None
    with pytest.raises(UserError, match=reason):
        engine.generate(["The cat"], GenerationSection(weights="int8"))


def test_another_architecture_and_autocast_are_named():
    qwen = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=32)
    )
    assert "Qwen3MoeForCausalLM" in why_not_packed(qwen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in why_not_packed(make_model())


def test_greedy_text_is_the_same_with_and_without_packing(tiny_tokenizer):
    engine = Engine(make_model(vocab_size=448), tiny_tokenizer)
    settings = GenerationSection(temperature=0, max_new_tokens=40, batch_size=8)
    prompts = ["The cat", "Once upon a time there was a small boat", "What is 3 + 4?"]
    fast = [completion.token_ids for completion in engine.generate(prompts, settings)]
    with using():
        assert engine.packed() is None
        assert "plain torch is asked for" in why_not_packed(engine.model)
        assert fast == [completion.token_ids for completion in engine.generate(prompts, settings)]
