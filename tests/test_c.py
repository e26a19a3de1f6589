"""The functions in C++ against their definitions in double precision, as torch's operators, and their compilation."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error
from torch import Tensor

c = pytest.importorskip("minimoe.ops.c", reason="minimoe/ops/c is missing", exc_type=ModuleNotFoundError)
library = pytest.importorskip("minimoe.ops.c.library")

pytestmark = pytest.mark.skipif(c.why_not() is not None, reason=str(c.why_not()))

FLOATS = [torch.float32, torch.bfloat16]
# What a result is rounded to, and a little for the order of sums; bfloat16 has 8 bits.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
SANITIZED = "-fsanitize" in os.environ.get("MINIMOE_CXXFLAGS", "")


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


one_thread = pytest.mark.parametrize("threads", [1], indirect=True)


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad.double())


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double().requires_grad_() for x in tensors)


# Rows of tokens


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (1, 5), (37, 16), (500, 83)])
def test_swiglu_and_its_gradients_are_those_of_the_definition(rows, width, dtype):
    torch.manual_seed(0)
    gate_up, grad = (4 * torch.randn(rows, 2 * width)).to(dtype), torch.randn(rows, width).to(dtype)
    weights, given = torch.rand(rows), grad.clone()
    exact_gate_up, exact_weights = double(gate_up, weights)
    gate, up = exact_gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up * exact_weights[:, None]
    expected_grads = gradients(expected, grad, exact_gate_up, exact_weights)
    results = c.swiglu(gate_up, weights), *c.swiglu_backward(gate_up, weights, grad)
    assert torch.equal(grad, given)
    for result, truth in zip(results, (expected, expected, *expected_grads), strict=True):
        assert result.dtype == (torch.float32 if truth is expected_grads[1] else dtype)
        assert relative_error(result, truth) < TOLERANCES[dtype]
    assert torch.equal(c.swiglu(gate_up), c.swiglu(gate_up, torch.ones(rows)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_a_weight_give_zeros_whatever_is_in_them(dtype):
    gate_up, grad, weights = torch.randn(7, 10).to(dtype), torch.randn(7, 5).to(dtype), torch.rand(4)
    gate_up[4], gate_up[5], grad[6] = float("nan"), float("inf"), float("inf")
    alone = c.swiglu(gate_up[:4], weights), *c.swiglu_backward(gate_up[:4], weights, grad[:4])
    results = c.swiglu(gate_up, weights), *c.swiglu_backward(gate_up, weights, grad)
    for result, expected in zip(results, alone, strict=True):
        assert torch.equal(result[:4], expected)
        assert not result[4:].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_of_extreme_values_is_torchs(dtype):
    gates = torch.tensor([0.0, -0.0, 1e-30, 80, 87, 88, 89, 200, 3e38, -80, -87, -88, -89, -200, -3e38, float("nan")])
    for gate_up in (torch.cat((gates, torch.ones(16))), torch.cat((torch.ones(16), gates))):
        gate, up = gate_up.to(dtype).chunk(2)
        expected = (F.silu(gate.float()) * up.float()).to(dtype)
        result = c.swiglu(gate_up.to(dtype)[None])[0]
        # Far below zero silu vanishes: to 1e-30 at -80, and whether then to 0 does not matter.
        torch.testing.assert_close(result, expected, rtol=TOLERANCES[dtype], atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "slots", "width"), [(7, 1, 16), (300, 4, 83), (5, 2, 3)])
def test_rows_are_gathered_and_slots_are_summed(tokens, slots, width, dtype):
    torch.manual_seed(0)
    rows, places = torch.randn(tokens * slots, width).to(dtype), torch.randperm(tokens * slots).view(tokens, slots)
    result = c.sum_slots(rows, places)
    assert result.dtype == dtype
    assert relative_error(result, rows.double()[places].sum(1)) < TOLERANCES[dtype]
    ids = torch.randint(len(rows), (2 * len(rows),))
    assert torch.equal(c.gather_rows(rows, ids), rows[ids])


# Norm and heads


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5, 16), (700, 83), (1, 7)])
def test_rms_norm_and_its_gradients_equal_torchs(shape, dtype):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape).to(dtype)
    exact_x, exact_weight = double(x, weight)
    expected = F.rms_norm(exact_x, weight.shape, exact_weight, eps=1e-3)
    expected_x, expected_weight = gradients(expected, grad, exact_x, exact_weight)
    result = c.rms_norm(x, weight, 1e-3, dtype)
    assert result.dtype == dtype
    assert relative_error(result, expected) < TOLERANCES[dtype]
    grad_x, grad_weight = c.rms_norm_backward(x, weight, grad, 1e-3)
    # The gradient along x cancels: what is left is up to a few times smaller than what was subtracted.
    assert relative_error(grad_x, expected_x) < 3e-6
    assert relative_error(grad_weight, expected_weight) < 1e-6


def heads_by_definition(q, k, v, gains, cos, sin, eps, length):
    """Norm, then rotation, of (T, heads, d), and the rows' order."""
    (tokens, _), (normed, d) = q.shape, gains.shape
    rows, kv_heads = tokens // length, k.shape[1] // d
    x = torch.cat((q, k), 1).view(tokens, normed, d)
    x = F.rms_norm(x, (d,), eps=eps) * gains
    first, second = x.chunk(2, dim=-1)
    x = x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
    grouped = x[:, : normed - kv_heads].reshape(rows, length, kv_heads, -1, d).permute(0, 2, 1, 3, 4)
    keys, values = (y.reshape(rows, length, kv_heads, d).transpose(1, 2) for y in (x[:, normed - kv_heads :], v))
    return [y.reshape(rows * kv_heads, -1, d) for y in (grouped, keys, values)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 3, 32), (1, 1, 6), (3, 2, 40)])
def test_heads_and_their_gradients_equal_the_definition(kv_heads, group, head_dim, slices, dtype):
    torch.manual_seed(0)
    rows, length, normed = 2, 70, kv_heads * (group + 1)
    tokens = rows * length
    widths = [kv_heads * group * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    inputs = list(torch.randn(tokens, sum(widths)).to(dtype).split(widths, dim=1))
    if not slices:
        inputs = [x.contiguous() for x in inputs]
    gains, angles = torch.randn(normed, head_dim), 6 * torch.rand(tokens, head_dim // 2)
    cos, sin = (torch.cat((half, half), dim=1) for half in (angles.cos(), angles.sin()))
    exact = double(*inputs, gains, cos, sin)
    expected = heads_by_definition(*exact, 1e-3, length)
    results = c.heads(*inputs, gains, cos, sin, 1e-3, length)
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert result.shape == truth.shape
        assert relative_error(result, truth) < TOLERANCES[dtype]
    grads = [torch.randn(results[0].shape).to(dtype), torch.randn(results[1].shape), torch.randn(results[2].shape)]
    truths = torch.autograd.grad(expected, exact[:4], [grad.double() for grad in grads])
    found = c.heads_backward(*inputs, gains, cos, sin, 1e-3, length, *grads)
    for result, truth in zip(found, truths, strict=True):
        tolerance = 3e-6 if result.dtype == torch.float32 else TOLERANCES[dtype]  # sums over the tokens; some cancel
        assert relative_error(result, truth) < tolerance


# Experts of many tokens


def experts_by_definition(x, ids, weights, gate_up, down):
    """For each row its expert's weights, gathered."""
    gate, up = torch.einsum("noi,ni->no", gate_up[ids], x).chunk(2, dim=-1)
    return torch.einsum("noi,ni->no", down[ids], F.silu(gate) * up) * weights[:, None]


@pytest.mark.parametrize("dtype", FLOATS)
# Groups of 0, 1, 5, 9, 12, 13 and 24 rows; one of more than the 1024 rows that backward takes at a time.
@pytest.mark.parametrize("groups", [[0, 1, 5, 9, 0, 12, 13, 24, 0], [1030, 7]])
@pytest.mark.parametrize(("inputs", "width"), [(64, 96), (96, 32)])
def test_grouped_swiglu_and_its_gradients_are_those_of_the_definition(inputs, width, groups, dtype):
    torch.manual_seed(0)
    tokens, rows, experts = 50, sum(groups), len(groups)
    x, ids, weights = torch.randn(tokens, inputs).to(dtype), torch.randint(tokens, (rows,)), torch.rand(rows)
    # Weights that bfloat16 has, as it is what they are multiplied in.
    gate_up = (torch.randn(experts, 2 * width, inputs) / inputs**0.5).bfloat16().float()
    down = (torch.randn(experts, inputs, width) / width**0.5).bfloat16().float()
    ends = torch.tensor(groups).cumsum(0)
    expert_ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(groups))
    exact_rows, *exact = double(x[ids], weights, gate_up, down)
    expected = experts_by_definition(exact_rows, expert_ids, *exact)
    hidden, out = c.grouped_swiglu(x, ids, weights, gate_up, down, ends)
    # In bfloat16 the activations are rounded on the way; in backward their gradients are, too.
    forward, backward = (1e-6, 2e-6) if dtype == torch.float32 else (6e-3, 1e-2)
    assert hidden.dtype == out.dtype == dtype
    truth = torch.einsum("noi,ni->no", exact[1][expert_ids], exact_rows)
    assert relative_error(hidden, truth) < TOLERANCES[dtype]
    assert relative_error(out, expected) < forward
    grad = torch.randn(rows, inputs).to(dtype)
    truths = gradients(expected, grad, exact_rows, *exact)
    found = c.grouped_swiglu_backward(x, ids, weights, gate_up, down, ends, hidden, grad)
    for result, truth in zip(found, truths, strict=True):
        assert result.dtype == (dtype if truth is truths[0] else torch.float32)
        assert relative_error(result, truth) < backward


# Few rows


def stored(shape, dtype):
    """A matrix (or several) as it is kept, its scales, and what it stands for."""
    values = (30 * torch.randn(shape)).round().clamp(-127, 127).to(dtype)
    scales = torch.rand(shape[:-1]) / 100 if dtype == torch.int8 else None
    return values, scales, values.double() * (1 if scales is None else scales.double()[..., None])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize(("outputs", "inputs"), [(10, 7), (448, 64), (907, 129)])
@pytest.mark.parametrize("rows", [1, 2, 15])  # 15 = 8 + 4 + 2 + 1
def test_few_rows_are_multiplied_with_the_matrix(rows, outputs, inputs, dtype):
    torch.manual_seed(0)
    matrix, scales, exact = stored((outputs, inputs), dtype)
    x, norm_weight, add = torch.randn(rows, inputs), torch.randn(inputs), torch.randn(rows, outputs)
    given = add.clone()
    result = c.linear_few(matrix, scales, x)
    assert result.dtype == torch.float32
    assert relative_error(result, x.double() @ exact.T) < 1e-6
    normed = F.rms_norm(x.double(), (inputs,), norm_weight.double(), eps=1e-3)
    result = c.linear_few(matrix, scales, x, norm_weight, 1e-3, add)
    assert relative_error(result, normed @ exact.T + add) < 1e-6
    assert torch.equal(add, given)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize(("tokens", "slots", "inputs", "width"), [(1, 2, 40, 7), (9, 2, 64, 83), (5, 1, 129, 32)])
def test_experts_of_few_tokens_are_those_of_the_definition(tokens, slots, inputs, width, dtype):
    torch.manual_seed(0)
    gate_up, gate_up_scales, exact_gate_up = stored((4, 2 * width, inputs), dtype)
    down, down_scales, exact_down = stored((4, inputs, width), dtype)
    x, weights = torch.randn(tokens, inputs), torch.rand(tokens, slots)
    ids = torch.stack([torch.randperm(4)[:slots] for _ in range(tokens)])
    rows = x.double().repeat_interleave(slots, 0)
    outputs = experts_by_definition(rows, ids.flatten(), weights.double().flatten(), exact_gate_up, exact_down)
    result = c.experts_few(gate_up, gate_up_scales, down, down_scales, x, ids, weights)
    assert result.dtype == torch.float32
    assert relative_error(result, outputs.view(tokens, slots, -1).sum(1)) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kv_heads", "group", "length", "head_dim"), [(2, 3, 37, 32), (1, 1, 1, 6), (3, 4, 300, 40)])
def test_attention_of_one_query_equals_torchs(kv_heads, group, length, head_dim, dtype):
    torch.manual_seed(0)
    q = (3 * torch.randn(2, kv_heads, group, head_dim)).to(dtype)
    keys, values = (torch.randn(2, kv_heads, length + 5, head_dim).to(dtype)[:, :, :length] for _ in range(2))
    bias = torch.zeros(2, length)
    bias[1, : length // 2] = -torch.inf
    for added in (None, bias):
        mask = None if added is None else added.double()[:, None, None]
        expected = F.scaled_dot_product_attention(q.double(), keys.double(), values.double(), mask, scale=0.3)
        result = c.attend(q, keys, values, added, 0.3)
        assert result.dtype == dtype
        assert relative_error(result, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [(3, 30, 12), (2, 128, 128), (4, 17, 1), (5, 100, 33), (1, 1, 1), (2, 300, 200)])
def test_newton_schulz_errs_by_what_bfloat16_rounds(shape):
    torch.manual_seed(0)
    matrices, (a, b, d), steps = torch.randn(shape).bfloat16(), (3.4445, -4.7750, 2.0315), 5
    x = matrices.double()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + d * gram @ gram)
    # bfloat16 rounds by up to 0.004, a dozen times; torch's own matmuls in it err as much.
    assert relative_error(c.newton_schulz(matrices, a, b, d, steps), x) < 0.025


# As operators of torch


def arguments(rows: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Small arguments of every function, for so many rows or tokens."""
    gate_up, grad, weights = torch.randn(rows, 20).to(dtype), torch.randn(rows, 10).to(dtype), torch.rand(rows)
    ids = torch.arange(rows)
    x, norm_weight = torch.randn(rows, 8), torch.randn(8)
    qkv, gains, angles = torch.randn(rows, 64).to(dtype), torch.randn(6, 8), torch.rand(rows, 8)
    head_inputs = (*qkv.split([32, 16, 16], dim=1), gains, angles.cos(), angles.sin(), 1e-6, 2)
    head_grads = torch.randn(rows, 4, 8).to(dtype), torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
    panels, ends = (torch.randn(3, 64, 64), torch.randn(3, 64, 32)), torch.tensor([rows // 2, rows // 2, rows])
    experts = (torch.randn(rows, 64).to(dtype), ids, weights, *panels, ends)
    keys, values = (torch.randn(rows, 2, 9, 8).to(dtype)[:, :, :5] for _ in range(2))
    slots, slot_weights = torch.tensor([[0, 2]]).repeat(rows, 1), torch.rand(rows, 2)
    return {
        "swiglu": (gate_up, weights),
        "swiglu_backward": (gate_up, weights, grad),
        "gather_rows": (gate_up, ids),
        "sum_slots": (gate_up, ids[: rows // 2 * 2].view(-1, 2)),
        "rms_norm": (x, norm_weight, 1e-6, dtype),
        "rms_norm_backward": (x, norm_weight, torch.randn(rows, 8).to(dtype), 1e-6),
        "heads": head_inputs,
        "heads_backward": (*head_inputs, *head_grads),
        "grouped_swiglu": experts,
        "grouped_swiglu_backward": (*experts, torch.randn(rows, 64).to(dtype), torch.randn(rows, 64).to(dtype)),
        "linear_few": (torch.randn(5, 8), None, x, norm_weight, 1e-6, torch.randn(rows, 5)),
        "experts_few": (panels[0], None, panels[1], None, torch.randn(rows, 64), slots, slot_weights),
        "attend": (torch.randn(rows, 2, 3, 8).to(dtype), keys, values, torch.randn(rows, 5), 0.3),
        "newton_schulz": (torch.randn(rows, 8, 5).bfloat16(), 3.0, -4.0, 2.0, 2),
    }


NAMES = list(arguments())


def tensors(results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@one_thread
def test_every_operator_is_in_these_tests():
    assert set(NAMES) == {name for name, value in vars(c).items() if hasattr(value, "__wrapped__")}


@one_thread
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_an_operator_has_its_schema_and_shapes(name, dtype):
    torch.library.opcheck(getattr(torch.ops.minimoe, name).default, arguments(dtype=dtype)[name])


@one_thread
@pytest.mark.parametrize("name", NAMES)
def test_a_function_is_one_node_of_a_graph_and_gives_the_same_there(name):
    torch.compiler.reset()  # or it counts the others as recompilations of the same lambda
    nodes = []

    def backend(module, _):
        nodes.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    given = arguments()[name]
    compiled = torch.compile(lambda *args: getattr(c, name)(*args), fullgraph=True, backend=backend)
    for result, expected in zip(tensors(compiled(*given)), tensors(getattr(c, name)(*given)), strict=True):
        assert torch.equal(result, expected)
    assert [node for node in nodes if "minimoe" in node] == [f"minimoe.{name}"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_no_rows_and_no_gradient(name, dtype):
    given = arguments(0, dtype)[name]
    for function in (getattr(c, name), getattr(torch.ops.minimoe, name)):
        for result in tensors(function(*given)):
            assert not result.any()


@one_thread
@pytest.mark.parametrize(
    ("name", "at", "wrong"),
    [
        ("swiglu", 0, lambda x: x.T),
        ("swiglu", 0, lambda x: x.double()),
        ("swiglu", 0, lambda x: x[:, :7].clone()),
        ("swiglu", 1, lambda x: x.bfloat16()),
        ("swiglu_backward", 2, lambda x: x.bfloat16()),
        ("swiglu_backward", 2, lambda x: x[:-1]),
        ("gather_rows", 1, lambda x: x + 1),
        ("gather_rows", 1, lambda x: x - 1),
        ("sum_slots", 1, lambda x: x.int()),
        ("rms_norm", 1, lambda x: x[:-1]),
        ("rms_norm_backward", 2, lambda x: x[:-1]),
        ("heads", 0, lambda x: x.T.contiguous().T),
        ("heads", 1, lambda x: x[:, :8]),
        ("heads", 3, lambda x: x[:-1]),
        ("heads", 7, lambda length: 4),
        ("heads_backward", 8, lambda x: x[:, :2].contiguous()),
        ("heads_backward", 9, lambda x: x[:-1]),
        ("grouped_swiglu", 1, lambda x: x + 1),
        ("grouped_swiglu", 3, lambda x: x[:, :60].contiguous()),
        ("grouped_swiglu", 5, lambda x: x + 1),
        ("grouped_swiglu", 5, lambda x: torch.tensor([4, 2, 6])),
        ("grouped_swiglu_backward", 6, lambda x: x[:-1]),
        ("linear_few", 2, lambda x: x[:, :-1]),
        ("linear_few", 5, lambda x: x[:-1]),
        ("experts_few", 5, lambda x: x + 1),
        ("attend", 1, lambda x: x.contiguous()),
        ("attend", 2, lambda x: x.transpose(0, 1)),
        ("newton_schulz", 0, lambda x: x.float()),
    ],
)
def test_an_operator_declines_what_it_cannot_read(name, at, wrong):
    given = list(arguments()[name])
    given[at] = wrong(given[at])
    with pytest.raises(ValueError, match=r"must be|are not"):
        getattr(torch.ops.minimoe, name)(*given)


def test_experts_that_are_not_in_panels_are_declined():
    tokens, ids, weights, gate_up, down, ends = arguments()["grouped_swiglu"]
    with pytest.raises(ValueError, match="panels of 32"):
        c.grouped_swiglu(tokens, ids, weights, gate_up[:, :40].contiguous(), down[..., :20].contiguous(), ends)


# Compiled, and sharing torch's threads


def python(script: str, **environment: str) -> str:
    return subprocess.check_output([sys.executable, "-c", script], text=True, env=os.environ | environment).strip()


@one_thread
def test_no_second_openmp_is_loaded():
    # Its threads would wait on the cores that torch's need.
    script = (
        "import re, torch; from minimoe.ops import c; assert not c.why_not(); "
        "print(len(set(re.findall(r'/\\S*omp\\S*so\\S*', open('/proc/self/maps').read()))))"
    )
    assert python(script) == "1"


ON_THREE_THREADS = """
import torch
from minimoe.ops import c

torch.manual_seed(0)
x, ids, weights = torch.randn(99, 96), torch.randint(4, (99,)), torch.rand(99)
gate_up, down, ends = torch.randn(4, 128, 96), torch.randn(4, 96, 64), torch.tensor([20, 20, 70, 99])
qkv, gains, angles = torch.randn(600, 96), torch.randn(4, 24), torch.rand(600, 24)

def results():
    for tokens in (x, x.bfloat16()):
        hidden, out = c.grouped_swiglu(tokens, ids, weights, gate_up, down, ends)
        yield from (hidden, out, *c.grouped_swiglu_backward(tokens, ids, weights, gate_up, down, ends, hidden, out))
    yield c.linear_few(gate_up[0], None, x, x[0])
    yield c.experts_few(gate_up, None, down, None, x, ids[:, None], weights[:, None])
    yield from c.rms_norm_backward(qkv, qkv[0], qkv, 1e-6)
    inputs = (qkv[:, :48], qkv[:, 48:72], qkv[:, 72:], gains[:3], angles, angles, 1e-6, 10)
    yield from c.heads_backward(*inputs, *(grad.float() for grad in c.heads(*inputs)))
    yield c.newton_schulz(down.bfloat16(), 3.0, -4.0, 2.0, 2)

torch.set_num_threads(1)
one = list(results())
torch.set_num_threads(3)
for expected, result in zip(one, results(), strict=True):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
"""


@one_thread
@pytest.mark.parametrize("limit", ["1", "2"])
def test_fewer_threads_than_asked_for_share_the_work(limit):
    python(ON_THREE_THREADS, OMP_THREAD_LIMIT=limit)


@one_thread
def test_without_a_compiler_the_reason_is_given(tmp_path):
    assert library.load("no-such-compiler", "", tmp_path) == "there is no C++ compiler 'no-such-compiler'"
    assert library.load("false", "", tmp_path) == "false cannot compile them: exit status 1"
    reason = library.load("c++", "-no-such-option", tmp_path)
    assert isinstance(reason, str)
    assert reason.startswith("c++ cannot compile them: c++: error:")
    script = "from minimoe.ops import c; print(c.why_not())"
    assert python(script, CXX="no-such-compiler") == "there is no C++ compiler 'no-such-compiler'"


@one_thread
def test_they_are_compiled_once_and_again_when_the_file_is_broken(tmp_path):
    assert isinstance(library.load("c++", "-O0", tmp_path), ctypes.CDLL)
    (compiled,) = tmp_path.iterdir()
    written = compiled.stat().st_mtime_ns
    assert isinstance(library.load("c++", "-O0", tmp_path), ctypes.CDLL)
    assert compiled.stat().st_mtime_ns == written
    broken = tmp_path / "other" / compiled.name
    broken.parent.mkdir()
    broken.write_bytes(b"")
    assert isinstance(library.load("c++", "-O0", broken.parent), ctypes.CDLL)
    assert broken.stat().st_size > 0


@one_thread
def test_a_cache_that_cannot_be_written_to_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    assert isinstance(library.load("c++", "-O0", tmp_path / "file"), ctypes.CDLL)


@one_thread
@pytest.mark.skipif(SANITIZED, reason="what sanitizers add to the code makes the compiler warn of it")
def test_the_sources_compile_without_warnings(tmp_path):
    assert isinstance(library.load("c++", "-Werror", tmp_path), ctypes.CDLL)


@one_thread
@pytest.mark.parametrize("path", library.SOURCES, ids=lambda path: path.name)
def test_each_source_includes_what_it_needs(path):
    command = ["c++", "-std=gnu++17", "-march=native", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-Wno-psabi", str(path)], check=True)


ON_AN_OLDER_CPU = """
import sys, torch
from minimoe.ops import c

assert not c.why_not()
gate_up, matrices = torch.load(sys.argv[1])
torch.save((c.swiglu(gate_up), c.newton_schulz(matrices, 3.4445, -4.7750, 2.0315, 5)), sys.argv[1])
"""


@one_thread
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler's option is for x86")
def test_a_cpu_without_wide_vectors_and_bfloat16_computes_the_same(tmp_path):
    gate_up, matrices = torch.randn(50, 70).bfloat16(), torch.randn(3, 70, 50).bfloat16()
    gate_up[3, 4] = float("nan")
    torch.save((gate_up, matrices), tmp_path / "tensors")
    flags = f"{os.environ.get('MINIMOE_CXXFLAGS', '')} -march=x86-64-v3"
    command = [sys.executable, "-c", ON_AN_OLDER_CPU, str(tmp_path / "tensors")]
    subprocess.run(command, check=True, env=os.environ | {"MINIMOE_CXXFLAGS": flags})
    activated, directions = torch.load(tmp_path / "tensors")
    # Sums may be fused or not, so that a result between two values may become either of them.
    torch.testing.assert_close(activated, c.swiglu(gate_up), rtol=2**-7, atol=0, equal_nan=True)
    expected = c.newton_schulz(matrices, 3.4445, -4.7750, 2.0315, 5)
    assert relative_error(directions, expected) < 0.01  # sums of pairs are rounded otherwise


def test_the_sources_are_shipped():
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert all(f"ops/c/*{path.suffix}" in pyproject for path in (*library.SOURCES, *library.HEADERS))
