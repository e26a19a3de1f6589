"""The attention written for training on a CPU is the same function as torch's, in values and in gradients."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from tiny import relative_error, tiny_config

from minimoe.model import causal_attention
from minimoe.model.attention import MiniMoeAttention
from minimoe.model.norm import MiniMoeRMSNorm
from minimoe.model.rotary import MiniMoeRotaryEmbedding, norm_and_rotate

# Norm-relative. float32: sums of a few hundred products. bf16: one rounding each (4e-3) of projections, normed
# heads, scores, probabilities and the output, and again backwards.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2}


def run(block, x, positions, documents, dtype):
    """Output and gradients of x and every parameter."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, _ = block(x, positions, documents=documents)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * target).sum().backward()
    return {"output": y, "x": x.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}


@pytest.mark.parametrize(("length", "width"), [(300, 32), (299, 32), (300, 31)], ids=["kept", "too long", "too wide"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, [1, 299, 1, 2, 150, 147]], ids=["rows", "documents"])
def test_training_attention_equals_torch_attention_in_values_and_gradients(
    documents, kv_heads, dtype, length, width, monkeypatch
):
    torch.manual_seed(0)
    monkeypatch.setattr(causal_attention, "_KEPT_LENGTH", length)  # of the longest rows whose probabilities are kept
    monkeypatch.setattr(causal_attention, "_KEPT_BYTES", width * dtype.itemsize)
    monkeypatch.setattr(causal_attention, "_TOGETHER", 300)  # so that each row is a part of its own
    computed = MagicMock(side_effect=causal_attention._probabilities)
    monkeypatch.setattr(causal_attention, "_probabilities", computed)
    config = tiny_config(
        num_attention_heads=4, num_key_value_heads=kv_heads, attn_implementation="sdpa", max_position_embeddings=300
    )
    block = MiniMoeAttention(config, 0).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    x = torch.randn(2, 300, config.hidden_size)  # more than two blocks of queries, and a part of one
    positions = MiniMoeRotaryEmbedding(config)(x, torch.arange(300)[None])
    monkeypatch.setattr(MiniMoeAttention, "_blocks_pay", lambda *_: True)
    results = run(block, x, positions, documents, dtype)
    keeps = (length, width) == (300, 32)
    assert computed.call_count == (6 if keeps else 12)  # three blocks a row; once, or again backwards
    monkeypatch.setattr(MiniMoeAttention, "_blocks_pay", lambda *_: False)
    expected = run(block, x, positions, documents, torch.float32)
    for name, value in results.items():
        assert relative_error(value, expected[name]) <= TOLERANCE[dtype], name


def test_norm_of_training_equals_the_formula_in_values_and_gradients():
    torch.manual_seed(0)
    norm = MiniMoeRMSNorm(24, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 7, 24, requires_grad=True)
    target = torch.randn(3, 7, 24)
    results = torch.autograd.grad((norm(x) * target).sum(), [x, norm.weight])
    by_hand = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    expected = torch.autograd.grad((by_hand * target).sum(), [x, norm.weight])
    assert relative_error(norm(x), by_hand) <= 1e-6  # float32 rounding
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) <= 1e-6


def test_norm_and_rotation_of_training_equal_the_plain_ones_in_values_and_gradients():
    torch.manual_seed(0)
    norm = MiniMoeRMSNorm(8, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    angles = torch.rand(2, 5, 4).repeat(1, 1, 2)
    target = torch.randn(2, 5, 3, 8)
    trained = norm_and_rotate(x, norm, angles.cos(), angles.sin())
    results = torch.autograd.grad((trained * target).sum(), [x, norm.weight])
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    first, second = normed.chunk(2, dim=-1)
    cos, sin = (y[:, :, None].double() for y in (angles.cos(), angles.sin()))
    by_hand = normed * cos + torch.cat((-second, first), dim=-1) * sin
    expected = torch.autograd.grad((by_hand * target).sum(), [x, norm.weight])
    assert relative_error(trained, by_hand) <= 1e-6  # float32 rounding
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) <= 1e-6
    with torch.no_grad():
        assert relative_error(norm_and_rotate(x, norm, angles.cos(), angles.sin()), by_hand) <= 1e-6


def hook(block):
    block.v_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def call_of_its_own(block):
    plain = block.v_proj.forward
    block.v_proj.forward = lambda x: 2 * plain(x)


def bias(block):
    block.v_proj = torch.nn.Linear(block.v_proj.in_features, block.v_proj.out_features)


@pytest.mark.parametrize("change", [hook, call_of_its_own, bias])
def test_a_changed_projection_counts_in_training_attention_too(change, monkeypatch):
    torch.manual_seed(0)
    block = MiniMoeAttention(tiny_config(attn_implementation="sdpa"), 0).train()
    x = torch.randn(1, 40, 32)
    positions = MiniMoeRotaryEmbedding(block.config)(x, torch.arange(40)[None])
    change(block)  # as adapters do
    outputs = []
    for blocks in (True, False):
        monkeypatch.setattr(MiniMoeAttention, "_blocks_pay", lambda *_, blocks=blocks: blocks)
        outputs.append(block(x, positions)[0])
    assert relative_error(*outputs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["v_proj", "q_norm"])
def test_a_backward_hook_is_called_in_training_attention_too(name, monkeypatch):
    block = MiniMoeAttention(tiny_config(attn_implementation="sdpa"), 0).train()
    monkeypatch.setattr("minimoe.model.attention.onednn_multiplies", lambda *_: True)
    seen = []
    getattr(block, name).register_full_backward_hook(lambda *_: seen.append(name))
    x = torch.randn(1, 40, 32, requires_grad=True)
    block(x, MiniMoeRotaryEmbedding(block.config)(x, torch.arange(40)[None]))[0].sum().backward()
    assert seen == [name]


class Doubled(MiniMoeRMSNorm):
    """Stands in for a norm, as an adapter would."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked_norm(*sizes):
    norm = MiniMoeRMSNorm(*sizes)
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    return norm


@pytest.mark.parametrize("make_norm", [Doubled, hooked_norm])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_norm_that_is_more_than_a_norm_counts_in_training_too(bf16, make_norm):
    torch.manual_seed(0)
    block = MiniMoeAttention(tiny_config(attn_implementation="sdpa"), 0).train()
    x = torch.randn(1, 160, 32)
    positions = MiniMoeRotaryEmbedding(block.config)(x, torch.arange(160)[None])
    block.q_norm = make_norm(block.head_dim, block.q_norm.eps)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        trained = block(x, positions)[0]
        with torch.no_grad():
            expected = block(x, positions)[0]
    assert relative_error(trained, expected) <= TOLERANCE[torch.bfloat16 if bf16 else torch.float32]
