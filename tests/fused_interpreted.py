"""Run by test_fused.py, with TRITON_INTERPRET=1 from the start: Triton's kernels against the dispatch paths."""

from __future__ import annotations

import pytest
import torch
from tiny import relative_error, tiny_model

from minimoe.model.dispatch import replicated
from minimoe.model.experts import Experts
from minimoe.ops import enabled, fused, using


def make(num_experts: int, hidden: int, width: int) -> Experts:
    config = tiny_model(
        num_experts=num_experts, hidden_size=hidden, moe_intermediate_size=width, num_attention_heads=4
    ).config
    experts = Experts(config)
    torch.nn.init.normal_(experts.gate_up_proj, std=hidden**-0.5)
    torch.nn.init.normal_(experts.down_proj, std=width**-0.5)
    return experts


def gradients(function, tokens, expert_ids, weights, experts):
    inputs = [tensor.detach().requires_grad_() for tensor in (tokens, weights)]
    experts.zero_grad()
    out = function(inputs[0], expert_ids, inputs[1], experts)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(x.grad for x in (*inputs, experts.gate_up_proj, experts.down_proj))]


CASES = {
    "even": (4, 64, 64, 2, 130),
    "widths beside the tiles": (3, 72, 40, 2, 37),
    "more experts than rows": (16, 32, 32, 1, 5),
    "one token": (4, 32, 32, 2, 1),
    "three of each": (6, 96, 80, 3, 70),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case):
    num_experts, hidden, width, k, num_tokens = CASES[case]
    torch.manual_seed(0)
    experts = make(num_experts, hidden, width)
    tokens = torch.randn(num_tokens, hidden)
    scores = torch.randn(num_tokens, num_experts).softmax(-1)
    weights, expert_ids = scores.topk(k)
    if num_experts == 4:
        expert_ids = expert_ids.where(expert_ids != 1, torch.tensor(2))  # one idle expert, and a token's twice the same
    with using():
        expected = gradients(replicated, tokens, expert_ids, weights, experts)
    with torch.autocast("cpu", torch.bfloat16), using("triton"):
        assert fused._suits(tokens, expert_ids, weights, experts)
        found = gradients(replicated, tokens, expert_ids, weights, experts)
    # bf16 keeps 8 bits: 4e-3 of each factor.
    for name, value, wanted in zip(("out", "tokens", "weights", "gate_up", "down"), found, expected, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value.float(), wanted) < 2e-2, name


def test_kernels_are_used_only_where_they_are_asked_for():
    assert "triton" not in enabled()
    with using("triton", "cuda"):
        assert enabled() == {"triton", "cuda"}
    assert "triton" not in enabled()
    experts, tokens = make(4, 32, 32), torch.randn(3, 32)
    ids, weights = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, 2)
    assert not fused._suits(tokens, ids, weights, experts)  # float32
