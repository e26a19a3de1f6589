from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from minimoe.model.losses import (
    IGNORE_INDEX,
    expert_counts,
    global_balancing_loss,
    hidden_loss,
    load_balancing_loss,
    mean_probabilities,
    next_token_loss,
    router_confidence,
    router_entropy_loss,
    router_z_loss,
)


def test_next_token_loss_is_the_mean_cross_entropy_of_the_targets_that_count():
    logits, targets = torch.randn(7, 11), torch.tensor([1, 2, IGNORE_INDEX, 4, 5, IGNORE_INDEX, 0])
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(next_token_loss(logits, targets), expected)


def test_next_token_loss_of_nothing_is_zero_with_zero_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.full((3,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_shares_of_a_step_add_up_to_the_loss_of_the_whole():
    logits, targets = torch.randn(10, 5), torch.randint(0, 5, (10,))
    whole = next_token_loss(logits, targets)
    parts = sum(next_token_loss(logits[a:b], targets[a:b], 10) for a, b in ((0, 1), (1, 7), (7, 10)))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balance_loss_of_a_uniform_router_is_k(k):
    experts, tokens = 4, 8
    expert_ids = torch.stack([(torch.arange(k) + t) % experts for t in range(tokens)])
    uniform = torch.full((tokens, experts), 1 / experts)
    assert load_balancing_loss(uniform, expert_ids).item() == pytest.approx(k)
    assert load_balancing_loss(uniform, expert_ids, batch_size=2).item() == pytest.approx(k)


def test_the_balance_loss_equals_transformers_for_one_layer_with_and_without_padding():
    logits = torch.randn(24, 6)
    probabilities = logits.softmax(-1)
    expert_ids = probabilities.topk(2).indices
    mask = torch.rand(4, 6) > 0.3
    expected = load_balancing_loss_func((logits,), 6, 2)
    torch.testing.assert_close(load_balancing_loss(probabilities, expert_ids), expected)
    expected = load_balancing_loss_func((logits,), 6, 2, mask.long())
    torch.testing.assert_close(load_balancing_loss(probabilities, expert_ids, mask.flatten()), expected)


def test_the_sequence_wise_balance_loss_is_the_mean_of_each_sequences_own():
    probabilities = torch.randn(30, 5).softmax(-1)
    expert_ids = probabilities.topk(2).indices
    each = [load_balancing_loss(p, i) for p, i in zip(probabilities.split(10), expert_ids.split(10), strict=True)]
    actual = load_balancing_loss(probabilities, expert_ids, batch_size=3)
    torch.testing.assert_close(actual, torch.stack(each).mean())


def test_the_global_balance_loss_of_unequal_parts_adds_up_to_that_of_the_whole():
    probabilities, mask = torch.randn(2, 30, 5).softmax(-1), torch.rand(30) > 0.3
    expert_ids = probabilities.topk(2).indices
    whole = torch.stack(
        [load_balancing_loss(p, i, mask) for p, i in zip(probabilities, expert_ids, strict=True)]
    ).mean()
    counts = torch.stack([expert_counts(ids, 5, mask) for ids in expert_ids])
    parts = 0.0
    for part in (slice(0, 4), slice(4, 30)):
        means = torch.stack([mean_probabilities(p[part], mask[part]) for p in probabilities])
        parts += global_balancing_loss(means, counts, 2) * mask[part].sum() / mask.sum()
    torch.testing.assert_close(parts, whole)


def test_the_sequence_wise_balance_loss_sees_imbalance_that_cancels_over_the_batch():
    one, other = torch.tensor([[0.9, 0.1]]).expand(4, 2), torch.tensor([[0.1, 0.9]]).expand(4, 2)
    probabilities = torch.cat((one, other))
    expert_ids = probabilities.topk(1).indices
    assert load_balancing_loss(probabilities, expert_ids).item() == pytest.approx(1.0)
    assert load_balancing_loss(probabilities, expert_ids, batch_size=2).item() == pytest.approx(1.8)


def test_padding_counts_in_no_router_term():
    logits = torch.randn(12, 4)
    probabilities, expert_ids = logits.softmax(-1), logits.topk(2).indices
    mask = torch.arange(12) < 7
    real = slice(0, 7)
    for batch_size in (None, 1):
        torch.testing.assert_close(
            load_balancing_loss(probabilities, expert_ids, mask, batch_size),
            load_balancing_loss(probabilities[real], expert_ids[real], None, batch_size),
        )
    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(logits[real]))
    assert expert_counts(expert_ids, 4, mask).tolist() == expert_counts(expert_ids[real], 4).tolist()
    assert expert_counts(expert_ids, 4).sum() == 24


def test_the_router_z_loss_is_the_mean_squared_log_sum_exp():
    logits = torch.zeros(3, 4)
    assert router_z_loss(logits).item() == pytest.approx(math.log(4) ** 2)


def test_the_router_entropy_loss_is_the_mean_entropy_of_real_tokens():
    probabilities = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert router_entropy_loss(probabilities).item() == pytest.approx((math.log(4) + 0 + math.log(2)) / 3)
    mask = torch.tensor([True, True, False])
    assert router_entropy_loss(probabilities, mask).item() == pytest.approx(math.log(4) / 2)


def test_the_router_entropy_loss_is_a_term_of_training_where_its_coefficient_is_set():
    ids = torch.randint(1, 97, (2, 8))
    model = tiny_model(router_entropy_loss_coef=0.5, router_aux_loss_coef=0.0)
    output = model.train()(ids, labels=ids)
    probabilities = [logits.softmax(-1) for logits in model(ids, output_router_logits=True).router_logits]
    expected = torch.stack([-(p * p.log()).sum(-1).mean() for p in probabilities]).mean()
    torch.testing.assert_close(output.router_entropy_loss, expected)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.5 * expected)
    without = tiny_model(router_aux_loss_coef=0.0).train()(ids, labels=ids)
    assert without.router_entropy_loss is None


def head_of(weight):
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight)
    return head


def test_the_loss_of_hidden_states_computes_no_gradients_where_none_are_wanted():
    hidden, head, targets = torch.randn(6, 8), head_of(torch.randn(16, 8)), torch.arange(6)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        hidden_loss(hidden, head, targets, 6)
    assert flops.get_total_flops() == 2 * 6 * 8 * 16


def test_the_loss_of_hidden_states_is_finite_for_a_target_that_is_all_but_impossible():
    hidden, head = torch.tensor([[100.0]]), head_of(torch.tensor([[1.0], [-1.0]]))
    assert hidden_loss(hidden, head, torch.tensor([1]), 1).item() == pytest.approx(200.0)


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_or_a_bias_of_the_head_counts_in_the_loss_of_hidden_states(bias):
    head, hidden, targets = nn.Linear(8, 16, bias=bias), torch.randn(6, 8), torch.arange(6)
    if not bias:
        head.register_forward_hook(lambda module, inputs, output: 2 * output)
    expected = next_token_loss(head(hidden), targets, 6)
    torch.testing.assert_close(hidden_loss(hidden, head, targets, 6), expected)


def test_confidence_is_the_mean_of_each_real_tokens_largest_probability():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.0, 0.0, 1.0]])
    assert router_confidence(probabilities).item() == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert router_confidence(probabilities, torch.tensor([True, True, False])).item() == pytest.approx(0.6)
