"""Gradients of one optimizer step: micro-batches on every rank, exactly as if they were one batch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from minimoe.train.objectives import Objective


def forward_backward(
    model: Any, batch: Any, objective: Objective, micro_rows: int, accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor]:
    """Add up the gradients of this rank's rows.

    Args:
        model: as `accelerator.prepare` gave it.
        batch: this rank's part of the step's batch.

    Returns:
        The step's `loss` and its terms, scalars; and its expert counts (L, E); both over all ranks.
    """
    world = accelerator.num_processes
    batch = batch.to(accelerator.device)
    num_items = accelerator.reduce(batch.num_items())
    micros = list(batch.split(micro_rows))
    names: list[str] = []
    totals = counts = None
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            losses = objective(model, micro, num_items)
            # Data-parallel training averages gradients over ranks; the loss is already divided by the global count.
            accelerator.backward(losses.loss * world)
        names = ["loss", *losses.terms]
        values = torch.stack([losses.loss, *losses.terms.values()]).detach()
        totals = values if totals is None else totals + values
        counts = losses.expert_counts if counts is None else counts + losses.expert_counts
    assert totals is not None
    assert counts is not None
    if world > 1:
        totals, counts = accelerator.reduce(totals), accelerator.reduce(counts)
    return dict(zip(names, totals, strict=True)), counts
