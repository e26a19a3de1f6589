"""The jobs of training: a whole step, an optimizer's step, one MoE block, one attention block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minimoe.config import OptimizerConfig
from minimoe.train.optim import build_optimizers
from scripts.benchmark.measure import Run, median_seconds, peak_bytes, repeated, reset_peak, resident_bytes
from scripts.benchmark.models import PEERS, LiteralExperts, build_model, either, minimoe_config
from scripts.benchmark.shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_step(
    subject: str,
    shape: Shape,
    dtype: str,
    device: str,
    optimizer: str = "adamw",
    at_least: float = 0.0,
    settle: float = 0.0,
) -> Run:
    """A whole optimizer step: forward, balance loss, backward, clipping, AdamW or Muon.

    Args:
        at_least: seconds for which steps go on; the time of a run is their median. 0 is one step.
        settle: seconds of steps before them, which do not count.
    """
    before = resident_bytes("VmRSS") if device == "cpu" else 0.0
    training_memory(subject, device)
    model = build_model(subject, shape).to(device).train()
    called = torch.compile(model) if subject.endswith("compiled") else model
    options = {} if subject.startswith("qwen3") else {"skip_logits": True}
    if optimizer == "muon":
        optimizers = build_optimizers(model, OptimizerConfig(name="muon"))
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    ids = random_ids(shape, device)

    def step() -> None:
        with training_matmuls(subject, shape, device):
            with autocast(device, dtype):
                loss = called(input_ids=ids, labels=ids, use_cache=False, **options).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()

    def run() -> dict[str, float]:
        median_seconds(step, device, settle, times=0)
        reset_peak(device)
        seconds = median_seconds(step, device, at_least, times=1)
        return {"seconds": seconds, "peak_bytes": peak_bytes(device) - before}

    return run


def optimizer_step(subject: str, shape: Shape, name: str, device: str) -> Run:
    """The step of `build_optimizers` alone, with gradients that are there already."""
    training_memory(subject, device)
    model = build_model(subject, shape).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = build_optimizers(model, OptimizerConfig.model_validate({"name": name, "lr": 1e-4}))

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return repeated(step, device)


def moe_layer(subject: str, shape: Shape, dtype: str, device: str) -> Run:
    """Forward and backward of one MoE block, router and dispatch included."""
    from minimoe.model.moe import MoEFeedForward

    training_memory(subject, device)
    torch.manual_seed(0)
    block: Any = MoEFeedForward(minimoe_config(shape))
    if subject == "literal loop":
        block.experts = LiteralExperts(shape)
        block.train_dispatch = lambda tokens, expert_ids, weights, experts: experts(tokens, expert_ids, weights)
    block.to(device).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(shape.batch, shape.sequence, shape.hidden, device=device, requires_grad=True)
    return repeated(forward_backward(lambda x: block(x)[0], block, x, subject, shape, dtype, device), device)


def attention(subject: str, shape: Shape, dtype: str, device: str, documents: int) -> Run:
    """Forward and backward of one attention block; every row holds so many documents of unequal lengths."""
    from minimoe.model.attention import MiniMoeAttention
    from minimoe.model.rotary import MiniMoeRotaryEmbedding

    training_memory(subject, device)
    config = minimoe_config(shape, attn_implementation="sdpa")
    torch.manual_seed(0)
    block, rotary = MiniMoeAttention(config, 0).to(device).train(), MiniMoeRotaryEmbedding(config).to(device)
    x = torch.randn(shape.batch, shape.sequence, shape.hidden, device=device, requires_grad=True)
    positions = torch.arange(shape.sequence, device=device).repeat(shape.batch, 1)
    for row in positions:  # documents begin at random columns
        for start in sorted((torch.randperm(shape.sequence - 1)[: documents - 1] + 1).tolist()):
            row[start:] = torch.arange(shape.sequence - start)
    find = either("minimoe.model.documents:Documents", "minimoe.model.attention:document_lengths")
    packed = find(positions, None, (shape.batch, shape.sequence)) if documents > 1 else None

    def attend(x: Tensor) -> Tensor:
        return block(x, rotary(x, positions), documents=packed)[0]

    return repeated(forward_backward(attend, block, x, subject, shape, dtype, device), device)


def forward_backward(
    forward: Callable[[Tensor], Tensor],
    block: nn.Module,
    x: Tensor,
    subject: str,
    shape: Shape,
    dtype: str,
    device: str,
) -> Callable[[], None]:
    """One pass through a block and back, of x (B, S, D) in the step's dtype."""
    gradient = torch.randn_like(x)

    def step() -> None:
        block.zero_grad()
        x.grad = None
        with training_matmuls(subject, shape, device):
            with autocast(device, dtype):
                y = forward(x.to(DTYPES[dtype]))
            y.backward(gradient.to(y.dtype))

    return step


def bare_matmuls(shape: Shape, dtype: str, device: str) -> Run:
    """The six matmuls of each expert's forward and backward, over an even split of the rows."""
    training_memory("minimoe", device)
    rows = shape.batch * shape.sequence * shape.k // shape.experts
    kind: dict[str, Any] = {"dtype": DTYPES[dtype], "device": device}
    x = torch.randn(shape.experts, rows, shape.hidden, **kind)
    wide = torch.randn(shape.experts, rows, 2 * shape.width, **kind)
    activated = torch.randn(shape.experts, rows, shape.width, **kind)
    gate_up = torch.randn(shape.experts, 2 * shape.width, shape.hidden, **kind)
    down = torch.randn(shape.experts, shape.hidden, shape.width, **kind)
    outs = [torch.empty_like(t) for t in (wide, x, activated, down, x, gate_up)]

    def step() -> None:
        with training_matmuls("minimoe", shape, device):
            for e in range(shape.experts):
                torch.mm(x[e], gate_up[e].t(), out=outs[0][e])
                torch.mm(activated[e], down[e].t(), out=outs[1][e])
                torch.mm(x[e], down[e], out=outs[2][e])
                torch.mm(x[e].t(), activated[e], out=outs[3][e])
                torch.mm(wide[e], gate_up[e], out=outs[4][e])
                torch.mm(wide[e].t(), x[e], out=outs[5][e])

    return repeated(step, device)


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def float32_by_onednn(device: str, width: int) -> contextlib.AbstractContextManager:
    """What minimoe's loop lets multiply float32, in this checkout or an older one."""
    switch = either("minimoe.ops.onednn:float32_by_onednn", "minimoe.model.precision:float32_by_onednn")
    return switch(torch.device(device), width)


def training_matmuls(subject: str, shape: Shape, device: str) -> contextlib.AbstractContextManager:
    """The library that multiplies float32 in a subject's training."""
    return contextlib.nullcontext() if subject.startswith(PEERS) else float32_by_onednn(device, shape.hidden)


def training_memory(subject: str, device: str) -> None:
    """What minimoe's training does with memory that was freed."""
    if device == "cpu" and not subject.startswith(PEERS):
        either("minimoe.train.memory:keep_freed_memory")()


def random_ids(shape: Shape, device: str) -> Tensor:
    """Token ids (B, S)."""
    return torch.randint(shape.vocabulary, (shape.batch, shape.sequence), device=device)
