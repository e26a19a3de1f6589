"""Watches every step: NaN and infinity, loss spikes, experts that no token chooses.

Its state is saved with the run, so that a resumed run skips and warns at the same steps as an undisturbed one.
A spike is a loss more than 6 standard deviations above its running mean, as in OLMo's step skipping (arXiv 2501.00656).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimoe.config import TrainConfig
from minimoe.data.loader import Batch
from minimoe.errors import NonFiniteError, disk_errors
from minimoe.failpoints import failpoint
from minimoe.train.files import SKIPPED_FOLDER
from minimoe.train.metrics import MetricsLogger

SPIKE_DEVIATIONS = 6.0
SPIKE_WARMUP = 50  # losses seen before any can be a spike
COLLAPSED_SHARE = 0.01  # of an expert's fair share of tokens
COLLAPSED_STEPS = 100  # in a row, before the warning
_MEMORY = 0.98  # of the running mean and variance: about the last 50 losses


class Verdict(NamedTuple):
    problem: str | None  # "non-finite", "spike" or nothing
    skipped: bool


@dataclass
class StepGuard:
    """One per run; L MoE layers, E experts."""

    loss_mean: float = 0.0
    loss_variance: float = 0.0
    losses_seen: int = 0
    non_finite_in_a_row: int = 0
    spikes_skipped_in_a_row: int = 0
    idle_steps: list[list[int]] = field(default_factory=list)  # (L, E): steps in a row without work

    def judge(self, loss: float, grad_norm: float, train: TrainConfig) -> Verdict:
        """Whether to take a step with this loss and gradient: the same on every rank, and so is the verdict."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.non_finite_in_a_row += 1
            return Verdict("non-finite", skipped=True)
        self.non_finite_in_a_row = 0
        limit = self.loss_mean + SPIKE_DEVIATIONS * math.sqrt(self.loss_variance)
        spike = self.losses_seen >= SPIKE_WARMUP and loss > limit
        # A loss that stays high is a new level after some steps, and no spike.
        if spike and train.on_loss_spike == "skip" and self.spikes_skipped_in_a_row < train.max_skipped_steps:
            self.spikes_skipped_in_a_row += 1
            return Verdict("spike", skipped=True)
        self.spikes_skipped_in_a_row = 0
        self._remember(loss)
        return Verdict("spike" if spike else None, skipped=False)

    def raise_if_lost(self, train: TrainConfig, step: int) -> None:
        """End the run when too many steps in a row had a NaN or an infinity."""
        if self.non_finite_in_a_row > train.max_skipped_steps:
            raise NonFiniteError(
                f"loss or gradient NaN or infinite for {self.non_finite_in_a_row} steps in a row, up to step {step}",
                fix="lower optimizer.lr or lengthen schedule.warmup_steps; --resume goes back to the last good save",
            )

    def collapsed(self, expert_counts: Tensor) -> list[tuple[int, int]]:
        """(layer, expert) of those now idle for `COLLAPSED_STEPS` steps; counts of a step's tokens are (L, E)."""
        idle = (expert_load(expert_counts) < COLLAPSED_SHARE).tolist()
        before = self.idle_steps or [[0] * len(layer) for layer in idle]
        self.idle_steps = [
            [steps + 1 if is_idle else 0 for steps, is_idle in zip(*layers, strict=True)]
            for layers in zip(before, idle, strict=True)
        ]
        return [
            (layer, expert)
            for layer, row in enumerate(self.idle_steps)
            for expert, steps in enumerate(row)
            if steps == COLLAPSED_STEPS
        ]

    def _remember(self, loss: float) -> None:
        self.losses_seen += 1
        # A plain mean at first, so that nothing depends on the zeros it starts from.
        rate = max(1 - _MEMORY, 1 / self.losses_seen)
        deviation = loss - self.loss_mean
        self.loss_mean += rate * deviation
        self.loss_variance = (1 - rate) * (self.loss_variance + rate * deviation * deviation)


def expert_load(expert_counts: Tensor) -> Tensor:
    """Each expert's tokens over its layer's fair share: counts (L, E) -> (L, E) float64, 1 when balanced."""
    counts = expert_counts.cpu().double()  # MPS has no float64
    return counts / counts.mean(dim=1, keepdim=True).clamp(min=1e-9)


def log_problem(
    verdict: Verdict, batch: Batch, row: dict[str, Any], folder: Path, rank: int, logger: MetricsLogger
) -> None:
    """Report a step that went wrong; every rank writes its part of a skipped batch for inspection.

    Args:
        row: step, loss and grad_norm.
    """
    file = None
    if verdict.skipped:
        file = f"{SKIPPED_FOLDER}/step-{row['step']:08d}-rank-{rank}.safetensors"
        with disk_errors("the batch of a skipped step", folder / file):
            (folder / SKIPPED_FOLDER).mkdir(exist_ok=True)
            # Copies: a file can hold neither views nor tensors that share memory.
            copies = {
                name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in batch.tensors().items()
            }
            save_file(copies, folder / file)
    consequence = f"step skipped, its batch is in {folder / file}" if file else "step taken"
    logger.log_event(
        row | {"event": verdict.problem, "skipped": verdict.skipped, "batch_file": file, "batch_hash": batch.digest()},
        f"{verdict.problem}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}; {consequence}",
    )


def log_collapse(experts: list[tuple[int, int]], step: int, logger: MetricsLogger) -> None:
    """Warn of experts that have stopped learning."""
    if experts:
        names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts)
        logger.log_event(
            {"step": step, "event": "router_collapse", "experts": experts},
            f"router collapse: {names} had under {COLLAPSED_SHARE:.0%} of a fair share for {COLLAPSED_STEPS} steps; "
            "raise model.router_aux_loss_coef or model.router_bias_update_rate",
        )


def poison(terms: dict[str, Tensor], model: Any) -> None:
    """Failpoint `train.loss`: make the loss and its gradients NaN, infinite or a million times too large."""
    action = failpoint("train.loss")
    if action is not None:
        factor = {"nan": math.nan, "inf": math.inf, "spike": 1e6}[action]
        terms["loss"] = terms["loss"] * factor
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
