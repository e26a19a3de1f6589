"""Which library multiplies float32 on a CPU; the results stay float32."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import relative_error, tiny_config

from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.ops.onednn import few_sizes, float32_by_onednn, onednn_multiplies, pays
from minimoe.train import pretrain

CPU = torch.device("cpu")


@pytest.fixture
def onednn_here():
    """Skip where this machine does not give a model that is large enough to oneDNN."""
    with float32_by_onednn(CPU, 256):
        if not onednn_multiplies(CPU, torch.float32):
            pytest.skip("oneDNN multiplies float32 on CPUs with AVX-512 and without AMX only")


@pytest.fixture
def onednn(onednn_here):
    """Training of a model that is large enough."""
    with float32_by_onednn(CPU, 256):
        yield


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(64, 256, 512), (512, 512, 256), (1000, 96, 1408)], ids=str)
def test_products_stay_float32(shape):
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    exact = a.double() @ b.double()
    for product in (a @ b, a @ b.t().contiguous().t(), a.t().contiguous().t() @ b, torch.bmm(a[None], b[None])[0]):
        assert relative_error(product, exact) <= 1e-6  # one product of bf16 numbers has 2e-3


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("documents", [False, True])
def test_a_training_step_is_the_same_with_both_libraries(documents):
    torch.manual_seed(0)
    model = MiniMoeForCausalLM(tiny_config(attn_implementation="sdpa", max_position_embeddings=300)).train()
    ids = torch.randint(3, 97, (2, 300))
    positions = torch.cat((torch.arange(130), torch.arange(9), torch.arange(161))).repeat(2, 1) if documents else None

    def losses_and_gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, position_ids=positions, skip_logits=True, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    by_onednn = losses_and_gradients()
    torch.set_float32_matmul_precision("highest")
    for value, expected in zip(by_onednn, losses_and_gradients(), strict=True):
        assert relative_error(value, expected) <= 2e-5  # float32 rounding through all layers and back


@pytest.mark.parametrize(
    ("avx512", "amx", "width", "expected"),
    [(True, False, 256, True), (True, False, 255, False), (True, True, 512, False), (False, False, 512, False)],
)
def test_it_is_taken_where_it_is_exact_and_pays(avx512, amx, width, expected):
    assert pays(width, avx512, amx) == expected


@pytest.mark.usefixtures("onednn")
def test_sizes_are_few_where_it_multiplies():
    assert few_sizes(1001, CPU, torch.float32) == 1024


def test_it_multiplies_meanwhile_and_only_on_a_cpu():
    with float32_by_onednn(CPU, 8):
        assert not onednn_multiplies(CPU, torch.float32)
        assert onednn_multiplies(CPU, torch.bfloat16)
        assert few_sizes(1001, CPU, torch.float32) == 1001
    with float32_by_onednn(CPU, 256):
        pass
    assert torch.get_float32_matmul_precision() == "highest"
    with float32_by_onednn(torch.device("cuda"), 256):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("onednn_here")
def test_training_steps_are_multiplied_by_onednn_and_nothing_else(pretrain_config, monkeypatch):
    seen = set()
    for owner, name in ((MiniMoeForCausalLM, "forward"), (torch.Tensor, "backward")):
        method = getattr(owner, name)

        def watched(*args, _method=method, _name=name, **kwargs):
            seen.add((_name, torch.is_grad_enabled(), onednn_multiplies(CPU, torch.float32)))
            return _method(*args, **kwargs)

        monkeypatch.setattr(owner, name, functools.wraps(method)(watched))
    config = pretrain_config("run", max_steps=2, precision="fp32")
    pretrain.run(config.model_copy(update={"model": config.model | {"hidden_size": 256}}))
    assert seen == {("forward", True, True), ("backward", True, True), ("forward", False, False)}
