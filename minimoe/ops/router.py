"""The router's logits: float32 matmuls of half-precision tokens that keep the tokens as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.ops.door import FORMS, Form, first_derivative, ordinary


class _Float32Linear(torch.autograd.Function):
    """`F.linear(tokens.float(), weight)` that keeps the tokens for backward as they are, not twice as large."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return F.linear(tokens.float(), weight.float())

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(tokens.dtype), (grad.t() @ tokens.float()).to(weight.dtype)


def _suits_router(tokens: Tensor, weight: Tensor) -> bool:
    return ordinary(tokens, weight) and tokens.dtype != torch.float32


FORMS["router_logits"] += [
    Form("cpu", lambda *args: args[0].is_cpu and _suits_router(*args), _Float32Linear.apply),
    Form("cuda", lambda *args: not args[0].is_cpu and _suits_router(*args), _Float32Linear.apply),
]
