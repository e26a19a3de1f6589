"""The kernels in C against torch."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error, tiny_config

from minimoe import MiniMoeForCausalLM, kernels
from minimoe.model.causal_attention import heads_backward, prepare_heads
from minimoe.model.precision import float32_by_onednn
from minimoe.train import optim, plan

needs_compiler = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))
# What a result is rounded to, and a little for the sums' order; bfloat16 has 8 bits.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that computes by torch."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_library", lambda: "not wanted")
            return function(*args)

    return call


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (1, 5), (37, 16), (500, 83), (0, 16)])
def test_swiglu_and_its_gradients_are_those_of_the_definition(rows, width, dtype, without_kernels):
    torch.manual_seed(0)
    gate_up, grad = (4 * torch.randn(rows, 2 * width)).to(dtype), torch.randn(rows, width).to(dtype)
    weights = torch.rand(rows)
    exact_gate_up, exact_weights = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = exact_gate_up.chunk(2, dim=-1)
    exact = F.silu(gate) * up * exact_weights[:, None]
    exact.backward(grad.double())
    truth = (exact, exact, exact_gate_up.grad, exact_weights.grad)

    def results(gate_up, weights, grad):
        return kernels.swiglu(gate_up, weights), *kernels.swiglu_backward(gate_up, weights, grad.clone())

    for result, expected in zip(results(gate_up, weights, grad), truth, strict=True):
        assert result.dtype == (torch.float32 if expected is exact_weights.grad else dtype)
        assert result.shape == expected.shape
        assert relative_error(result.double(), expected) < TOLERANCES[dtype] or rows == 0
    exactly = without_kernels(results, gate_up.double(), weights.double(), grad.double())
    for result, expected in zip(exactly, truth, strict=True):
        assert relative_error(result, expected) < 1e-12 or rows == 0
    plain = kernels.swiglu(gate_up)
    assert torch.equal(plain, kernels.swiglu(gate_up, torch.ones(rows)))


@pytest.mark.parametrize("in_c", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_weight_give_zeros_whatever_is_in_them(dtype, in_c, without_kernels):
    def results(gate_up, weights, grad):
        return kernels.swiglu(gate_up, weights), *kernels.swiglu_backward(gate_up, weights, grad.clone())

    gate_up, grad, weights = torch.randn(7, 10).to(dtype), torch.randn(7, 5).to(dtype), torch.rand(4)
    gate_up[4], gate_up[5], grad[6] = float("nan"), float("inf"), float("inf")
    call = (lambda function, *args: function(*args)) if in_c else without_kernels
    alone = call(results, gate_up[:4].clone(), weights, grad[:4])
    for result, expected in zip(call(results, gate_up, weights, grad), alone, strict=True):
        assert torch.equal(result[:4], expected)
        assert not result[4:].any()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_extreme_numbers_is_torchs(dtype, without_kernels):
    gates = torch.tensor([0.0, -0.0, 1e-30, 80, 87, 88, 89, 200, 3e38, -80, -87, -88, -89, -200, -3e38, float("nan")])
    gate_up = torch.cat((gates, torch.ones(16)))[None].to(dtype)
    expected = without_kernels(kernels.swiglu, gate_up)
    result = kernels.swiglu(gate_up)
    assert torch.equal(result.isnan(), expected.isnan())
    # Far below zero silu vanishes: to 1e-30 at -80, and whether then to 0 does not matter.
    torch.testing.assert_close(result, expected, rtol=TOLERANCES[dtype], atol=1e-30, equal_nan=True)
    up_and_nan = gate_up.flip(1)
    assert torch.equal(kernels.swiglu(up_and_nan).isnan(), without_kernels(kernels.swiglu, up_and_nan).isnan())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(10, 7), (448, 64), (907, 129)])
def test_every_row_is_multiplied_with_its_matrix(dtype, shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    matrices = (30 * torch.randn(4, *shape)).round().clamp(-127, 127).to(dtype)
    scales = torch.rand(4, shape[0]) if dtype == torch.int8 else None
    # Groups of 15 = 8 + 4 + 2 + 1 rows, 2 and 1, and a matrix without rows.
    ids = torch.tensor([2] * 15 + [0, 0, 3])[torch.randperm(18)]
    x = torch.randn(9, shape[1])
    full = matrices.double() * (1 if scales is None else scales.double().unsqueeze(-1))
    expected = torch.stack([full[i] @ x[n // 2].double() for n, i in enumerate(ids.tolist())])
    result = kernels.products(kernels.Matrices(matrices, scales), x, ids, copies=2)
    assert result.dtype == torch.float32
    assert relative_error(result.double(), expected) < 1e-6


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_of_the_norm_and_added_where_that_is_asked_for(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x, gains, matrix, add = torch.randn(3, 83), torch.randn(83), torch.randn(1, 907, 83), torch.randn(3, 907)
    expected = F.rms_norm(x.double(), gains.shape, gains.double(), eps=1e-3) @ matrix[0].double().t() + add.double()
    ids = torch.zeros(3, dtype=torch.int64)
    result = kernels.products(kernels.Matrices(matrix, None), x, ids, norm=(gains, 1e-3), add=add)
    assert result is add
    assert relative_error(result.double(), expected) < 1e-6


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("tokens", "slots", "inputs", "width"), [(1, 2, 40, 7), (9, 2, 64, 83), (5, 1, 129, 32)])
def test_experts_of_few_tokens_are_those_of_the_definition(tokens, slots, inputs, width, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    numbers = [
        (30 * torch.randn(4, *shape)).round().clamp(-127, 127) for shape in ((2 * width, inputs), (inputs, width))
    ]
    scales = [torch.rand(matrices.shape[:2]) / 100 for matrices in numbers]
    exact = [n.double() * s.double().unsqueeze(-1) for n, s in zip(numbers, scales, strict=True)]
    if dtype == torch.int8:
        stored = [kernels.Matrices(n.to(dtype), s) for n, s in zip(numbers, scales, strict=True)]
    else:
        exact = [matrices.to(dtype).double() for matrices in exact]
        stored = [kernels.Matrices(matrices.to(dtype), None) for matrices in exact]
    x, weights, add = torch.randn(tokens, inputs), torch.rand(tokens, slots), torch.randn(tokens, inputs)
    ids = torch.stack([torch.randperm(4)[:slots] for _ in range(tokens)])
    gate, up = torch.einsum("tsoi,ti->tso", exact[0][ids], x.double()).chunk(2, dim=-1)
    outputs = torch.einsum("tsoi,tsi->tso", exact[1][ids], F.silu(gate) * up)
    expected = add.double() + (weights.double()[..., None] * outputs).sum(1)
    result = kernels.experts(*stored, x, ids, weights, add)
    assert result is add
    assert relative_error(result.double(), expected) < 1e-6


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "group", "length", "head_dim"), [(2, 3, 37, 32), (1, 1, 1, 6), (3, 4, 300, 40)])
def test_attention_of_one_query_equals_torchs(kv_heads, group, length, head_dim, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    q = (3 * torch.randn(2, kv_heads, group, head_dim)).to(dtype)
    keys, values = (torch.randn(2, kv_heads, length + 5, head_dim).to(dtype)[:, :, :length] for _ in range(2))
    bias = torch.zeros(2, length)
    bias[1, : length // 2] = -torch.inf
    for added in (None, bias):
        mask = None if added is None else added.double()[:, None, None]
        expected = F.scaled_dot_product_attention(q.double(), keys.double(), values.double(), mask, scale=0.3)
        result = kernels.attend(q, keys, values, added, 0.3)
        assert result.dtype == dtype
        assert relative_error(result.double(), expected) < TOLERANCES[dtype]


@needs_compiler
def test_no_second_openmp_is_loaded():
    # Its threads would wait on the cores that torch's need.
    script = (
        "import re, torch; from minimoe import kernels; assert not kernels.why_not(); "
        "print(len(set(re.findall(r'/\\S*omp\\S*so\\S*', open('/proc/self/maps').read()))))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "1"


_ON_THREE_THREADS = """
import torch
from minimoe import kernels

torch.manual_seed(0)
x, ids, weights = torch.randn(9, 96), torch.randint(4, (9,)), torch.rand(9)
gate_up, down, ends = torch.randn(4, 128, 96), torch.randn(4, 96, 64), torch.tensor([2, 2, 7, 9])
matrices = kernels.Matrices(gate_up, None), kernels.Matrices(down, None)

def results():
    for tokens in (x, x.bfloat16()):
        hidden, out = kernels.grouped_swiglu(tokens, ids, weights, gate_up, down, ends)
        operands = (tokens, ids, weights, gate_up, down, ends, hidden)
        yield from (hidden, out, *kernels.grouped_swiglu_backward(*operands, out))
    yield kernels.products(matrices[0], x, ids)
    yield kernels.experts(*matrices, x, ids[:, None], weights[:, None], torch.zeros(9, 96))
    yield kernels.newton_schulz(down.bfloat16(), (3.0, -4.0, 2.0), 2)

one = list(results())
torch.get_num_threads, kernels.WORK_OF_A_THREAD = lambda: 3, 1
for expected, result in zip(one, results(), strict=True):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
"""


@needs_compiler
@pytest.mark.parametrize("limit", ["1", "2"])
def test_fewer_threads_than_asked_for_share_the_work(limit):
    subprocess.run([sys.executable, "-c", _ON_THREE_THREADS], check=True, env=os.environ | {"OMP_THREAD_LIMIT": limit})


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads the kernels anew, with a cache folder of its own."""

    def call(cache=tmp_path / "cache", compiler="cc"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setenv("CC", compiler)
        return kernels._library.__wrapped__()

    return call


def test_without_a_compiler_the_reason_is_told(load):
    assert load(compiler="no-such-compiler") == "there is no C compiler 'no-such-compiler'"
    assert load(compiler="false") == "false cannot compile them: exit status 1"


@needs_compiler
def test_they_are_compiled_once_and_again_when_the_file_is_broken(load, tmp_path):
    assert isinstance(load(), ctypes.CDLL)
    (compiled,) = (tmp_path / "cache" / "minimoe").iterdir()
    broken = tmp_path / "other" / "minimoe" / compiled.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    assert isinstance(load(tmp_path / "other"), ctypes.CDLL)
    assert broken.stat().st_size > 0
    written = compiled.stat().st_mtime_ns
    assert isinstance(load(), ctypes.CDLL)
    assert compiled.stat().st_mtime_ns == written


@needs_compiler
def test_a_cache_that_cannot_be_written_to_does_not_matter(load, tmp_path):
    (tmp_path / "file").write_text("")
    assert isinstance(load(tmp_path / "file"), ctypes.CDLL)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "slots", "width"), [(7, 1, 16), (300, 4, 83), (5, 2, 3)])
def test_rows_are_gathered_and_slots_are_summed(tokens, slots, width, dtype):
    torch.manual_seed(0)
    rows, places = torch.randn(tokens * slots, width).to(dtype), torch.randperm(tokens * slots).view(tokens, slots)
    result = kernels.sum_slots(rows, places)
    assert result.dtype == dtype
    assert relative_error(result.double(), rows.double()[places].sum(1)) < TOLERANCES[dtype]
    ids = torch.randint(len(rows), (2 * len(rows),))
    assert torch.equal(kernels.gather_rows(rows, ids), rows[ids])


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 5, 16), (700, 83), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_rms_norm_and_its_gradients_equal_torchs(shape, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x, weight, grad = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape).to(dtype)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.rms_norm(exact_x, weight.shape, exact_weight, eps=1e-3)
    expected.backward(grad.double())
    result = kernels.rms_norm(x, weight, 1e-3, torch.empty_like(grad))
    assert relative_error(result.double(), expected) < TOLERANCES[dtype]
    grad_x, grad_weight = kernels.rms_norm_backward(x, weight, grad, 1e-3)
    # The gradient along x cancels: what is left is up to a few times smaller than what was subtracted.
    assert relative_error(grad_x.double(), exact_x.grad) < 3e-6
    assert relative_error(grad_weight.double(), exact_weight.grad) < 1e-6


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 3, 32), (1, 1, 6), (3, 2, 40)])
def test_heads_and_their_gradients_equal_torchs(
    kv_heads, group, head_dim, dtype, threads, without_kernels, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    rows, length, normed = 2, 70, kv_heads * (group + 1)
    qkv = torch.randn(rows * length, (normed + kv_heads) * head_dim).to(dtype)
    gains, angles = torch.randn(normed, head_dim), 6 * torch.rand(rows * length, head_dim // 2)
    cos, sin = (torch.cat((half, half), dim=1) for half in (angles.cos(), angles.sin()))
    exact = [x.double() for x in (qkv, gains, cos, sin)]
    heads = prepare_heads(qkv, gains, kv_heads, 1e-3, cos, sin, length)
    expected = without_kernels(prepare_heads, *exact[:2], kv_heads, 1e-3, *exact[2:], length)
    for result, truth in zip(heads[:3], expected[:3], strict=True):
        assert result.dtype == dtype
        assert relative_error(result.double(), truth) < TOLERANCES[dtype]
    grads = (torch.randn_like(heads.q), torch.randn(heads.k.shape), torch.randn(heads.v.shape))
    out, exact_out = torch.empty_like(qkv), torch.empty_like(exact[0])
    gained = heads_backward(qkv, gains, 1e-3, cos, sin, length, grads, out=out)
    exact_grads = tuple(grad.double() for grad in grads)
    truth = without_kernels(heads_backward, *exact[:2], 1e-3, *exact[2:], length, exact_grads, exact_out)
    assert relative_error(gained.double(), truth) < 3e-6  # sums over the tokens; some cancel
    assert relative_error(out.double(), exact_out) < TOLERANCES[dtype]


@needs_compiler
@pytest.mark.parametrize("shared", [0, 1])
def test_a_models_loss_and_gradients_are_the_same_without_kernels(shared, without_kernels):
    torch.manual_seed(0)
    model = MiniMoeForCausalLM(tiny_config(n_shared_experts=shared, initializer_range=0.2)).train()
    ids = torch.randint(model.config.vocab_size, (2, 48))

    def loss_and_gradients():
        model.zero_grad()
        with float32_by_onednn(torch.device("cpu"), width=256):  # with attention's function for training
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    for result, expected in zip(loss_and_gradients(), without_kernels(loss_and_gradients), strict=True):
        assert relative_error(result, expected) < 1e-5  # float32: sums in another order, through all layers


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(3, 30, 12), (2, 128, 128), (4, 17, 1), (5, 100, 33), (1, 1, 1), (2, 300, 200)])
def test_newton_schulz_errs_no_more_than_torchs(shape, threads, monkeypatch, without_kernels):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    matrices = torch.randn(shape).to(torch.bfloat16)
    given = matrices.clone()
    result = kernels.newton_schulz(matrices, optim._NS_COEFFICIENTS, optim._NS_STEPS)
    assert torch.equal(matrices, given)
    with monkeypatch.context() as patch:
        patch.setattr(optim, "has_bf16", lambda _: False)
        exact = without_kernels(optim.newton_schulz, matrices)
    # bfloat16 rounds by up to 0.004, a dozen times. On 20 seeds of such shapes torch's largest error is 0.024.
    assert relative_error(result, exact) < 0.025


def test_torch_orthogonalises_what_the_kernel_is_not_made_for():
    x = torch.zeros(torch.get_num_threads(), 8, 4, dtype=torch.bfloat16)
    assert optim._kernel_is_faster(x) == (kernels.why_not() is None and not torch.cpu._is_amx_tile_supported())
    assert not optim._kernel_is_faster(x.float())
    assert not optim._kernel_is_faster(x[: torch.get_num_threads() - 1])
    assert not optim._kernel_is_faster(x.new_zeros(len(x), 2048, 1025))


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler's option is for x86")
def test_a_cpu_without_wide_vectors_and_bfloat16_computes_the_same(load, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nexec /usr/bin/env cc "$@" -march=x86-64-v3\n')
    compiler.chmod(0o755)
    gate_up = torch.randn(50, 70).to(torch.bfloat16)
    gate_up[3, 4] = float("nan")
    expected = kernels.swiglu(gate_up)
    matrices = torch.randn(3, 70, 50).to(torch.bfloat16)
    expected_directions = kernels.newton_schulz(matrices, optim._NS_COEFFICIENTS, optim._NS_STEPS)
    library = load(compiler=str(compiler))
    monkeypatch.setattr(kernels, "_library", lambda: library)
    monkeypatch.setattr(kernels, "_kernel", kernels._kernel.__wrapped__)
    result = kernels.swiglu(gate_up)
    # Sums may be fused or not, so that a result between two numbers may become either of them.
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=0, equal_nan=True)
    directions = kernels.newton_schulz(matrices, optim._NS_COEFFICIENTS, optim._NS_STEPS)
    assert relative_error(directions, expected_directions) < 0.01  # sums of pairs are rounded otherwise


def test_the_plan_tells_why_there_are_none(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda: "cc cannot compile them: [x]")
    assert plan._kernels() == r"torch's, slower than in C: cc cannot compile them: \[x]"
