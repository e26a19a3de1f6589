"""The routers that papers compare: each is its paper's formula, and trains, saves and generates like the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error, tiny_config, tiny_model

from minimoe.config import GenerationSection
from minimoe.convert.layouts import layout_for, no_research_router
from minimoe.errors import UserError
from minimoe.generation.engine import Engine
from minimoe.generation.packed import why_not_packed
from minimoe.model.config import architecture_problems, num_parameters
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.losses import expert_counts, load_balancing_loss
from minimoe.model.moe import MoEFeedForward
from minimoe.model.router import ROUTERS
from minimoe.ops import BACKENDS, using

OTHERS = [name for name in ROUTERS if name != "top_k"]
ARCHITECTURES = [{"router_type": name} for name in OTHERS] + [
    {"num_zero_computation_experts": 2},
    {"router_type": "top_p", "num_zero_computation_experts": 1, "n_shared_experts": 1},
    {"scoring_func": "sigmoid", "num_zero_computation_experts": 2, "router_bias_update_rate": 0.01},
]


def make(name: str, **overrides):
    torch.manual_seed(0)
    router = ROUTERS[name](tiny_config(router_type=name, **overrides))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def dense(routing, num_outputs: int) -> torch.Tensor:
    """The weight of every expert for every token, (T, R); 0 where it is not chosen."""
    return torch.zeros(len(routing.weights), num_outputs + 1).scatter_add(1, routing.expert_ids, routing.weights)[
        :, :-1
    ]


def test_noisy_top_k_is_the_softmax_of_the_largest_noisy_logits():
    router, tokens = make("noisy_top_k"), torch.randn(9, 32)
    torch.manual_seed(1)
    found = dense(router(tokens), 6)
    torch.manual_seed(1)
    noisy = tokens @ router.weight.T + torch.randn(9, 6) * F.softplus(tokens @ router.noise_weight.T)
    kept = noisy.topk(2, dim=-1).indices
    expected = torch.full_like(noisy, -torch.inf).scatter(1, kept, noisy.gather(1, kept)).softmax(-1)
    torch.testing.assert_close(found, expected)


def test_noise_is_for_training_alone():
    router, tokens = make("noisy_top_k").eval(), torch.randn(9, 32)
    torch.testing.assert_close(router(tokens).logits, tokens @ router.weight.T)


def test_top_p_takes_the_fewest_experts_that_have_the_probability_together():
    router, tokens = make("top_p", router_top_p=0.7, num_experts_per_tok=5, norm_topk_prob=False), torch.randn(40, 32)
    found = dense(router(tokens), 6)
    for weights, probabilities in zip(found, (tokens @ router.weight.T).softmax(-1), strict=True):
        order, chosen, total = probabilities.argsort(descending=True).tolist(), [], 0.0
        while total < 0.7 and len(chosen) < 5:
            chosen.append(order[len(chosen)])
            total += float(probabilities[chosen[-1]].detach())
        expected = torch.zeros(6)
        expected[chosen] = probabilities[chosen]
        torch.testing.assert_close(weights, expected)
    assert len(set((found > 0).sum(1).tolist())) > 1


def test_in_expert_choice_every_expert_takes_the_tokens_that_score_it_highest():
    router, tokens = make("expert_choice", norm_topk_prob=False), torch.randn(30, 32)
    found = dense(router(tokens), 6)
    scores = (tokens @ router.weight.T).softmax(-1)
    for expert in range(6):
        best = scores[:, expert].argsort(descending=True)[:10]  # 30 tokens * 2 experts per token / 6 experts
        expected = torch.zeros(30)
        expected[best] = scores[best, expert]
        torch.testing.assert_close(found[:, expert], expected)


def test_expert_choice_lets_each_token_choose_in_evaluation():
    router, tokens = make("expert_choice").eval(), torch.randn(30, 32)
    expected = (tokens @ router.weight.T).topk(2, dim=-1).indices
    assert torch.equal(router(tokens).expert_ids, expected)
    assert torch.equal(router(tokens[:1]).expert_ids, expected[:1])


def test_a_hash_gives_a_token_the_same_experts_wherever_it_stands():
    router = make("hash")
    router.experts_of_token.copy_(router.draw())
    ids = torch.tensor([5, 9, 5, 96])
    routing = router(torch.randn(4, 32), ids)
    assert torch.equal(routing.expert_ids, router.experts_of_token[ids])
    assert routing.weights.unique().tolist() == [0.5]
    assert all(len(set(row)) == 2 for row in router.experts_of_token.tolist())
    torch.testing.assert_close(routing.probabilities.sum(1), torch.ones(4))


def test_a_hash_differs_between_layers_and_is_saved(tmp_path):
    model = tiny_model(router_type="hash")
    first, second = (layer.mlp.gate.experts_of_token for layer in model.model.layers)
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    again = MiniMoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[1].mlp.gate.experts_of_token, second)


def test_a_hash_wants_token_ids():
    with pytest.raises(ValueError, match="give input_ids"):
        tiny_model(router_type="hash")(inputs_embeds=torch.randn(1, 3, 32))


@pytest.mark.parametrize("backends", [(), tuple(BACKENDS)], ids=["plain", "fast"])
@pytest.mark.parametrize("training", [True, False])
def test_a_zero_computation_expert_gives_the_token_back(training, backends):
    torch.manual_seed(0)
    block = MoEFeedForward(tiny_config(num_zero_computation_experts=3, num_experts_per_tok=4)).train(training)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 11, 32, requires_grad=True)
    with using(*backends):
        y, routing = block(x)
    expected = torch.zeros(22, 32)
    experts = [*block.experts, *[lambda row: row] * 3]
    for token, (ids, weights) in enumerate(zip(routing.expert_ids, routing.weights, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            expected[token] = expected[token] + weight * experts[expert](x.flatten(0, 1)[token][None])[0]
    assert relative_error(y.flatten(0, 1), expected) < 2e-6
    upstream = torch.randn_like(y)
    wanted = (x, *block.parameters())
    for actual, reference in zip(
        torch.autograd.grad(y, wanted, upstream, retain_graph=True),
        torch.autograd.grad(expected.view_as(y), wanted, upstream),
        strict=True,
    ):
        assert relative_error(actual, reference) < 1e-5


@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=str)
def test_both_paths_of_a_router_are_one_function(overrides):
    """Of the same routing; in evaluation noise and the experts' own choice are off."""
    model = tiny_model(**overrides)
    ids = torch.randint(0, 97, (2, 13))
    block = model.model.layers[0].mlp
    routing = block.gate.train()(x := torch.randn(26, 32), ids.flatten())
    dispatch = block._fill_slots if block.some_slots_are_open else block.experts
    train, evaluate = (dispatch(x, routing.expert_ids, routing.weights) for _ in (block.train(), block.eval()))
    assert relative_error(train, evaluate) < 2e-6


@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=str)
def test_a_router_trains_counts_and_generates(overrides):
    model = tiny_model(**overrides)
    model.model.moves_selection_bias = True
    ids = torch.randint(0, 97, (2, 16))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(12):
        outputs = model.train()(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(outputs.lm_loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert outputs.expert_counts.shape == (2, model.config.num_router_outputs)
    assert 0 < int(outputs.expert_counts.sum()) <= 2 * 32 * max(2, model.config.num_experts)
    model.eval()
    assert why_not_packed(model)
    whole = model(input_ids=ids).logits
    with torch.no_grad():
        cache, parts = None, []
        for column in range(16):
            outputs = model(input_ids=ids[:, column : column + 1], cache=cache, use_cache=True)
            cache = outputs.cache
            parts.append(outputs.logits)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == num_parameters(vars(model.config))


@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=str)
def test_the_engine_generates_the_likeliest_tokens_of_the_model(overrides, tiny_tokenizer):
    model = tiny_model(vocab_size=len(tiny_tokenizer), **overrides).eval()
    settings = GenerationSection(temperature=0, max_new_tokens=4)
    engine = Engine(model, tiny_tokenizer)
    (found,) = engine.generate(["The fox"], settings)
    ids = torch.tensor([engine.encode("The fox")])
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert list(found.token_ids) == ids[0, -4:].tolist()[: len(found.token_ids)]


def test_open_slots_are_no_experts_work():
    ids = torch.tensor([[0, 3], [1, 2], [3, 3]])  # of 3 experts
    assert expert_counts(ids, 3).tolist() == [1, 1, 1]
    probabilities = torch.full((3, 3), 1 / 3)
    assert float(load_balancing_loss(probabilities, ids)) == pytest.approx(1.0)  # 3 assignments of 3 tokens


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"router_type": "top_p", "scoring_func": "sigmoid"}, "scoring_func"),
        ({"router_top_p": 0.5}, "router_top_p"),
        ({"router_type": "top_p", "router_top_p": 0.0}, "router_top_p"),
        ({"router_type": "hash", "num_zero_computation_experts": 1}, "num_zero_computation_experts"),
        ({"router_type": "soft"}, "router_type"),
    ],
)
def test_what_a_router_cannot_do_is_refused(values, key):
    assert list(architecture_problems(values)) == [key]


def test_other_programs_get_no_model_whose_router_they_do_not_know():
    for overrides in ({"router_type": "top_p"}, {"num_zero_computation_experts": 1}):
        assert no_research_router(tiny_config(**overrides))
        with pytest.raises(UserError, match=next(iter(overrides))):
            layout_for(tiny_config(**overrides), "qwen3-moe")
