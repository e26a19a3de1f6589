from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import tiny_config

from minimoe.model.router import TopKRouter


def make_router(**overrides) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(tiny_config(**overrides))
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def test_softmax_weights_are_the_largest_probabilities_normalised_and_scaled():
    router = make_router(routed_scaling_factor=2.5)
    tokens = torch.randn(7, 32)
    routing = router(tokens)
    probabilities = (tokens @ router.weight.T).softmax(-1)
    top = probabilities.sort(dim=-1, descending=True)
    assert routing.expert_ids.tolist() == top.indices[:, :2].tolist()
    expected = top.values[:, :2] / top.values[:, :2].sum(-1, keepdim=True) * 2.5
    torch.testing.assert_close(routing.weights, expected)


def test_weights_are_raw_probabilities_without_norm_topk_prob():
    router = make_router(norm_topk_prob=False)
    routing = router(torch.randn(7, 32))
    torch.testing.assert_close(routing.weights, routing.probabilities.gather(1, routing.expert_ids))


def test_the_selection_bias_picks_experts_but_never_weighs_them():
    router = make_router(scoring_func="sigmoid", norm_topk_prob=False)
    router.e_score_correction_bias[4] = 100.0
    tokens = torch.randn(7, 32)
    routing = router(tokens)
    assert (routing.expert_ids == 4).any(dim=-1).all()
    affinities = (tokens @ router.weight.T).sigmoid()
    torch.testing.assert_close(routing.weights, affinities.gather(1, routing.expert_ids))


def test_the_router_computes_in_float32_under_autocast_and_for_half_precision_input():
    router = make_router()
    tokens = torch.randn(5, 32)
    exact = router(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(tokens)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, exact.logits)
    assert router(tokens.bfloat16()).logits.dtype == torch.float32


def test_half_precision_tokens_get_the_gradients_of_float32_products():
    router, tokens = make_router(), torch.randn(37, 32).bfloat16().requires_grad_()
    logits = router(tokens).logits
    upstream = torch.randn_like(logits)
    actual = torch.autograd.grad(logits, (tokens, router.weight), upstream)
    exact = F.linear(tokens.float(), router.weight)
    for gradient, expected in zip(actual, torch.autograd.grad(exact, (tokens, router.weight), upstream), strict=True):
        assert gradient.dtype == expected.dtype
        torch.testing.assert_close(gradient, expected)


def test_the_bias_update_favours_idle_experts_and_hinders_busy_ones():
    router = make_router(scoring_func="sigmoid")
    router.update_selection_bias(torch.tensor([12, 0, 0, 0, 0, 0]), 0.01)
    mean = (5 * 0.01 - 0.01) / 6
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([-0.01] + [0.01] * 5) - mean)
    for _ in range(50):
        router.update_selection_bias(torch.tensor([12, 0, 0, 0, 0, 0]), 0.01)
    assert abs(float(router.e_score_correction_bias.mean())) < 1e-6
    assert router.e_score_correction_bias.dtype == torch.float32
