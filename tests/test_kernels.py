"""The kernels in C against torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny import relative_error

from minimoe import kernels

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="this machine has no C compiler for the kernels")
# What a result is rounded to, and a little for the sums' order; bfloat16 has 8 bits.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that computes by torch."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_kernel", lambda *_: None)
            return function(*args)

    return call


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (1, 5), (37, 16), (500, 83), (0, 16)])
def test_swiglu_and_its_gradients_equal_torchs(rows, width, dtype, without_kernels):
    torch.manual_seed(0)
    gate_up, grad = 4 * torch.randn(rows, 2 * width), torch.randn(rows, width)
    gate_up, grad = gate_up.to(dtype), grad.to(dtype)
    exact = without_kernels(kernels.swiglu, gate_up.double())
    exact_back = without_kernels(kernels.swiglu_backward, gate_up.double(), grad.double())
    results = (kernels.swiglu(gate_up), *kernels.swiglu_backward(gate_up, grad.clone()))
    for result, expected in zip(results, (exact, *exact_back), strict=True):
        assert result.dtype == dtype
        assert result.shape == expected.shape
        assert relative_error(result.double(), expected) < TOLERANCES[dtype] or rows == 0


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
    result = kernels.products(matrices, scales, x, ids, copies=2)
    assert result.dtype == torch.float32
    assert relative_error(result.double(), expected) < 1e-6


@needs_compiler
def test_no_second_openmp_is_loaded():
    # Its threads would wait on the cores that torch's need.
    script = (
        "import re, torch; from minimoe import kernels; assert kernels.available(); "
        "print(len(set(re.findall(r'/\\S*omp\\S*so\\S*', open('/proc/self/maps').read()))))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "1"


def library_of_a_new_process(tmp_path, **environment):
    script = "from minimoe import kernels; print(kernels.available())"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment}
    return subprocess.check_output([sys.executable, "-c", script], text=True, env=env).strip()


def test_without_a_compiler_there_are_none(tmp_path):
    assert library_of_a_new_process(tmp_path, CC="no-such-compiler") == "False"
    assert library_of_a_new_process(tmp_path, CC="false") == "False"  # one that fails


@needs_compiler
def test_they_are_compiled_once_and_again_when_the_file_is_broken(tmp_path):
    assert library_of_a_new_process(tmp_path) == "True"
    (compiled,) = (tmp_path / ".cache" / "minimoe").iterdir()
    written = compiled.stat().st_mtime_ns
    assert library_of_a_new_process(tmp_path) == "True"
    assert compiled.stat().st_mtime_ns == written
    compiled.write_bytes(b"")
    assert library_of_a_new_process(tmp_path) == "True"
    assert compiled.stat().st_size > 0
