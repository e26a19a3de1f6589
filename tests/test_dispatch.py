"""The signature promise: all dispatches are the same function, in values and in gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import relative_error, tiny_config

from minimoe import kernels
from minimoe.model.dispatch import DISPATCHES
from minimoe.model.experts import Experts, grouped_mm_swiglu, groups_of_rows, swiglu
from minimoe.model.moe import MoEFeedForward
from minimoe.model.precision import few_sizes
from minimoe.model.rows import sort_by_expert, sum_slots

# Norm-relative. float32: sums of ~50 products, each rounded to 6e-8. float64 the same with 1e-16.
# bf16: every path rounds weights, inputs and each product's result to 8 bits (4e-3), in another order.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1.5e-2}
NUM_EXPERTS, HIDDEN, WIDTH = 5, 24, 16


def by_hand(tokens, expert_ids, weights, experts):
    """The definition: for every token, the weighted sum of its experts, one row at a time."""
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
    experts = Experts(NUM_EXPERTS, HIDDEN, WIDTH).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
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
def test_every_dispatch_equals_the_definition_in_values_and_gradients(name, case, k, dtype):
    torch.manual_seed(k)
    expert_ids = route(case, 1 if case == "one_token" else 37, k)
    output, gradients = run(DISPATCHES[name], dtype, expert_ids)
    expected, expected_gradients = run(by_hand, dtype, expert_ids)
    assert output.dtype == dtype
    assert relative_error(output, expected) <= TOLERANCE[dtype]
    for parameter, gradient in gradients.items():
        assert gradient is not None, parameter
        # A weight's gradient is one product of two rows, where terms cancel; the others are sums of many.
        tolerance = TOLERANCE[dtype] * (2 if parameter == "weights" else 1)
        assert relative_error(gradient, expected_gradients[parameter]) <= tolerance, parameter


@pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("case", ["spread", "idle", "one_token", "all_to_one"])
def test_experts_in_one_call_equal_the_definition_in_values_and_gradients(case, k, threads, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "multiplies_experts", lambda tokens, *_: tokens.dtype == dtype)
    monkeypatch.setattr(kernels, "_BLOCK", 24)  # rows; some experts have more
    torch.manual_seed(k)
    expert_ids = route(case, 1 if case == "one_token" else 87, k)
    experts = Experts(NUM_EXPERTS, 96, 64)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    num_tokens = len(expert_ids)
    tokens, target = (torch.randn(num_tokens, 96).bfloat16().float() for _ in range(2))

    def results(dispatch, exact):
        module = copy.deepcopy(experts).to(torch.float64 if exact else torch.float32)
        torch.manual_seed(0)
        weights = torch.rand(num_tokens, k).to(module.down_proj.dtype).requires_grad_()
        x = tokens.to(module.down_proj.dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and not exact):
            output = dispatch(x, expert_ids, weights, module)
        (output * target.to(output.dtype)).sum().backward()
        return output, x.grad, weights.grad, *(parameter.grad for parameter in module.parameters())

    called = []
    real = kernels.grouped_swiglu_backward
    monkeypatch.setattr(kernels, "grouped_swiglu_backward", lambda *args: called.append(1) or real(*args))
    names = ("output", "tokens", "weights", "gate_up", "down")
    pairs = zip(results(DISPATCHES["replicated"], False), results(by_hand, True), strict=True)
    for name, (result, expected) in zip(names, pairs, strict=True):
        assert result.dtype == torch.float32
        tolerance = TOLERANCE[dtype] * (2 if name == "weights" else 1)  # as above
        assert relative_error(result, expected) <= tolerance, name
    assert called


def test_weights_of_another_number_format_are_not_read_as_float32(monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_experts", lambda *_: True)
    torch.manual_seed(0)
    experts, expert_ids = Experts(NUM_EXPERTS, 96, 64), route("spread", 37, 2)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, weights = torch.randn(37, 96), torch.rand(37, 2, dtype=torch.float64)
    result = DISPATCHES["replicated"](tokens, expert_ids, weights, experts)
    expected = DISPATCHES["grouped"](tokens, expert_ids, weights, experts)
    assert relative_error(result, expected) <= TOLERANCE[torch.float32]


def test_a_librarys_products_are_used_where_they_are_faster(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    in_vectors = {
        torch.float32: torch.cpu._is_avx512_supported(),
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported(),
    }
    for dtype, supported in in_vectors.items():

        def asked(hidden, width, dtype=dtype):
            experts = Experts(2, hidden, width)
            return kernels.multiplies_experts(torch.zeros(3, hidden, dtype=dtype), *experts.parameters())

        assert asked(64, 128) == (supported and kernels.why_not() is None)
        assert not asked(64, 96)  # fewer panels than threads
        assert not asked(48, 128)
        assert not asked(64, 144)


@pytest.mark.parametrize("rows", [1, 10, 74])
def test_rows_return_to_their_tokens_the_same_whatever_the_block(rows, monkeypatch):
    monkeypatch.setattr("minimoe.model.rows._BLOCK_ROWS", rows)
    expert_ids = route("spread", 37, 2)
    output, gradients = run(DISPATCHES["replicated"], torch.float32, expert_ids)
    expected, expected_gradients = run(by_hand, torch.float32, expert_ids)
    for value, reference in zip([output, *gradients.values()], [expected, *expected_gradients.values()], strict=True):
        assert relative_error(value, reference) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", ["spread", "idle", "all_to_one"])
@pytest.mark.parametrize("name", list(DISPATCHES))
def test_what_a_gpu_dispatches_is_the_same_function(name, case, monkeypatch):
    expert_ids = route(case, 37, 2)
    expected, expected_gradients = run(by_hand, torch.float32, expert_ids)
    monkeypatch.setattr(Experts, "stay_on_device", lambda *_: True)
    output, gradients = run(DISPATCHES[name], torch.float32, expert_ids)
    assert relative_error(output, expected) <= TOLERANCE[torch.float32]
    for parameter, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[parameter]) <= TOLERANCE[torch.float32], parameter


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


def test_sorting_by_expert_gives_the_worked_example_of_the_module():
    order, ends = sort_by_expert(torch.tensor([[2, 0], [0, 1], [2, 0]]), 3)
    assert order.tolist() == [1, 2, 5, 3, 0, 4]
    assert ends.tolist() == [3, 4, 6]


def test_the_gradient_of_a_token_in_bf16_is_rounded_once_not_for_every_slot():
    torch.manual_seed(0)
    rows, order = torch.randn(37 * 5, HIDDEN).bfloat16(), torch.randperm(37 * 5)
    exact = rows.double()[order.argsort()].view(37, 5, HIDDEN).sum(1)
    assert torch.equal(sum_slots(rows, order, 5), exact.bfloat16())


def test_experts_keep_no_copies_of_tokens_for_backward():
    experts, tokens = Experts(NUM_EXPERTS, HIDDEN, WIDTH), torch.randn(37, HIDDEN, requires_grad=True)
    order, ends = sort_by_expert(route("spread", 37, 2), NUM_EXPERTS)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        experts(tokens, order, torch.rand(37, 2), ends)
    assert (37, HIDDEN) in kept
    assert (74, HIDDEN) not in kept  # nor of results


def test_an_idle_expert_gets_a_gradient_of_zeros_so_that_data_parallel_training_cannot_hang():
    _, gradients = run(DISPATCHES["replicated"], torch.float32, torch.zeros(4, 1, dtype=torch.long))
    assert gradients["gate_up_proj"][1:].abs().sum() == 0
    assert gradients["gate_up_proj"][0].abs().sum() > 0


def test_bf16_computes_few_different_numbers_of_rows_and_float32_its_own():
    cpu, sizes = torch.device("cpu"), range(1, 8193)
    rounded = [few_sizes(size, cpu, torch.bfloat16) for size in sizes]
    assert all(size <= more < 1.125 * size for size, more in zip(sizes, rounded, strict=True))
    assert all(more - size < max(64, size / 32) for size, more in zip(sizes, rounded, strict=True))
    # 1 to 7; eight from each power of two to the next, 8 to 1024; then 16, and 32 from 2048 on
    assert len(set(rounded)) == 7 + 7 * 8 + 16 + 2 * 32 + 1
    assert few_sizes(0, cpu, torch.bfloat16) == 0
    assert few_sizes(1001, cpu, torch.float32) == few_sizes(1001, torch.device("meta"), torch.bfloat16) == 1001
    groups = [(0, slice(0, 6), slice(0, 6)), (2, slice(6, 20), slice(6, 20))]
    assert groups_of_rows([6, 6, 20], cpu, torch.float32) == (groups, 20)
    assert groups_of_rows([17, 20], cpu, torch.bfloat16)[0] == [
        (0, slice(0, 18), slice(0, 17)),
        (1, slice(17, 20), slice(17, 20)),
    ]
    assert groups_of_rows([1000, 1003], cpu, torch.bfloat16)[1] == 1024  # the first slice ends last


@pytest.mark.parametrize("sizes", [[6, 0, 300, 1, 64], [0, 33, 0, 31, 0], [1, 1, 1, 1, 1], [1000, 0, 5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_kernels_equal_one_expert_after_the_other(dtype, sizes):
    """The bf16 kernel computes on rows beyond a group; none of that may be seen, whatever the groups' sizes."""
    torch.manual_seed(0)
    experts = Experts(len(sizes), HIDDEN, WIDTH).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = experts.gate_up_proj, experts.down_proj
    rows = torch.randn(sum(sizes), HIDDEN, dtype=dtype, requires_grad=True)
    row_weights = torch.rand(len(rows), 1, requires_grad=True)
    target = torch.randn(sum(sizes), HIDDEN, dtype=dtype)
    ends = torch.tensor(sizes).cumsum(0)

    def results(output):
        return [output, *torch.autograd.grad((output * target).sum(), [rows, row_weights, *weights])]

    groups = zip(rows.split(sizes), experts.unstacked(), strict=True)
    expected = results(torch.cat([swiglu(group, *expert) for group, expert in groups]) * row_weights)
    stacked = grouped_mm_swiglu(rows, *weights, row_weights[:, 0], ends)
    for kernel in (experts(rows, torch.arange(len(rows)), row_weights, ends), stacked):
        for value, reference in zip(results(kernel), expected, strict=True):
            assert relative_error(value, reference) <= TOLERANCE[dtype]
