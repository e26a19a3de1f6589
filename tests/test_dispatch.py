"""The signature promise: all dispatches are the same function, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import relative_error, tiny_config, tiny_experts

from minimoe.model.dispatch import DISPATCHES, grouped
from minimoe.model.experts import swiglu
from minimoe.model.moe import MoEFeedForward
from minimoe.ops import BACKENDS, using

# Norm-relative. float32: sums of ~50 products, each rounded to 6e-8. float64 the same with 1e-16.
# bf16: every path rounds weights, inputs and each product's result to 8 bits (4e-3), in another order.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1.5e-2}
NUM_EXPERTS, HIDDEN, WIDTH = 5, 24, 16


def by_hand(tokens, expert_ids, weights, experts):
    """For every token, the weighted sum of its experts, one row at a time."""
    rows = []
    for token, ids, token_weights in zip(tokens, expert_ids, weights, strict=True):
        outputs = [
            swiglu(token[None], experts.gate_up_proj[e], experts.down_proj[e])[0] * weight
            for e, weight in zip(ids.tolist(), token_weights, strict=True)
        ]
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows).to(tokens.dtype)


def route(case: str, num_tokens: int, k: int) -> torch.Tensor:
    """Expert ids (T, k), distinct within a token."""
    if case == "all_to_one":  # every token's first choice is expert 3
        others = [e for e in range(NUM_EXPERTS) if e != 3][: k - 1]
        return torch.tensor([[3, *others]] * num_tokens)
    pool = 3 if case == "idle" else NUM_EXPERTS  # idle: experts 3 and 4 get nothing
    return torch.stack([torch.randperm(max(pool, k))[:k] for _ in range(num_tokens)])


def run(dispatch, dtype, expert_ids):
    """Value and gradients of tokens, weights and every expert parameter."""
    torch.manual_seed(1)
    experts = tiny_experts(NUM_EXPERTS, HIDDEN, WIDTH).to(dtype)
    num_tokens, k = expert_ids.shape
    tokens = torch.randn(num_tokens, HIDDEN, dtype=dtype, requires_grad=True)
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(num_tokens, k, dtype=router_dtype, requires_grad=True)
    output = dispatch(tokens, expert_ids, weights, experts)
    target = torch.randn(num_tokens, HIDDEN, dtype=dtype)
    (output * target).sum().backward()
    gradients = {"tokens": tokens.grad, "weights": weights.grad} | {n: p.grad for n, p in experts.named_parameters()}
    return output, gradients


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("k", range(1, NUM_EXPERTS + 1))
@pytest.mark.parametrize("case", ["spread", "idle", "one_token", "all_to_one"])
@pytest.mark.parametrize("name", list(DISPATCHES))
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "accelerated"])
def test_every_dispatch_equals_one_row_at_a_time_in_values_and_gradients(plain, name, case, k, dtype):
    torch.manual_seed(k)
    expert_ids = route(case, 1 if case == "one_token" else 37, k)
    with using(*(() if plain else BACKENDS)):
        output, gradients = run(DISPATCHES[name], dtype, expert_ids)
    expected, expected_gradients = run(by_hand, dtype, expert_ids)
    assert output.dtype == dtype
    assert relative_error(output, expected) <= TOLERANCE[dtype]
    for parameter, gradient in gradients.items():
        assert gradient is not None, parameter
        # A weight's gradient is one product of two rows, where terms cancel; the others are sums of many.
        tolerance = TOLERANCE[dtype] * (2 if parameter == "weights" else 1)
        assert relative_error(gradient, expected_gradients[parameter]) <= tolerance, parameter


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n_shared_experts", [0, 2])
def test_training_and_inference_mode_of_the_block_are_the_same_function(scoring_func, n_shared_experts):
    torch.manual_seed(0)
    config = tiny_config(scoring_func=scoring_func, n_shared_experts=n_shared_experts, routed_scaling_factor=1.7)
    block = MoEFeedForward(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    results = {}
    for training in (True, False):
        block.train(training)
        block.zero_grad()
        x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
        y, routing = block(x)
        (y.square().sum() + routing.logits.sum()).backward()
        results[training] = [y, x.grad, *(p.grad for p in block.parameters())]
    for trained, inferred in zip(results[True], results[False], strict=True):
        # The router computes in float32 whatever the input, in both modes alike.
        assert relative_error(trained, inferred) <= 1e-7


@pytest.mark.parametrize("name", list(DISPATCHES))
def test_bf16_autocast_of_a_dispatch_is_close_to_float32(name):
    torch.manual_seed(0)
    expert_ids = route("spread", 37, 2)
    exact, exact_gradients = run(DISPATCHES[name], torch.float32, expert_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients = run(DISPATCHES[name], torch.float32, expert_ids)
    assert output.dtype == torch.float32
    assert relative_error(output, exact) <= TOLERANCE[torch.bfloat16]
    for parameter, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact_gradients[parameter]) <= TOLERANCE[torch.bfloat16], parameter


def test_an_idle_expert_gets_a_gradient_of_zeros_so_that_data_parallel_training_cannot_hang():
    _, gradients = run(DISPATCHES["replicated"], torch.float32, torch.zeros(4, 1, dtype=torch.long))
    assert gradients["gate_up_proj"][1:].abs().sum() == 0
    assert gradients["gate_up_proj"][0].abs().sum() > 0


def test_experts_are_called_with_the_slices_of_the_worked_example():
    seen = {}

    def expert(name):
        return lambda rows: seen.setdefault(name, rows.flatten().tolist()) and rows

    tokens = torch.tensor([[10.0], [11.0], [12.0]])  # a, b, c
    ids = torch.tensor([[2, 0], [0, 1], [2, 0]])
    with using():
        result = grouped(tokens, ids, torch.ones(3, 2), [expert(e) for e in range(3)])
    assert seen == {0: [10, 11, 12], 1: [11], 2: [10, 12]}
    assert result.flatten().tolist() == [20, 22, 24]


@pytest.mark.parametrize("name", list(DISPATCHES))
def test_no_tokens_give_no_rows(name):
    for plain in (True, False):
        with using(*(() if plain else BACKENDS)):
            output, gradients = run(DISPATCHES[name], torch.float32, torch.zeros(0, 2, dtype=torch.long))
        assert output.shape == (0, HIDDEN)
        assert not gradients["down_proj"].any()


@pytest.mark.parametrize("name", list(DISPATCHES))
def test_a_slot_of_an_expert_elsewhere_adds_nothing(name):
    """Expert parallelism gives such slots the id E and the weight 0."""
    torch.manual_seed(0)
    experts = [lambda rows: 2 * rows] * NUM_EXPERTS
    tokens, ids, weights = torch.randn(9, HIDDEN), route("spread", 9, 2), torch.rand(9, 2)
    ids[3, 1], weights[3, 1] = NUM_EXPERTS, 0
    rubbish = [torch.full((18, HIDDEN), torch.nan) for _ in range(8)]  # in the memory that is used next
    del rubbish
    result = DISPATCHES[name](tokens, ids, weights, experts)
    assert relative_error(result, 2 * tokens * weights.sum(1, keepdim=True)) <= TOLERANCE[torch.float32]
