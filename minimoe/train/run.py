"""One training run: what its stage gave, and what the loop keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from minimoe.config import TrainingRun
from minimoe.data.loader import Data
from minimoe.train.checkpoint import BackgroundSaver, TrainerState
from minimoe.train.metrics import MetricsLogger
from minimoe.train.objectives import Objective
from minimoe.train.preemption import StopRequest


@dataclass
class Run:
    """Made by `fit`, which documents the stage's part."""

    config: TrainingRun
    model: Any
    tokenizer: Any
    data: Data
    objective: Objective
    accelerator: Accelerator

    wrapped: Any  # the model as training calls it: compiled, data-parallel
    optimizers: list[Optimizer]
    state: TrainerState
    total_steps: int
    stop: StopRequest
    logger: MetricsLogger
    saver: BackgroundSaver
    logged_tokens: int  # at the last training row, for its tokens per second
    logged_seconds: float

    @property
    def micro_rows(self) -> int:
        """Rows of one forward pass on one rank."""
        return self.config.train.micro_rows(self.accelerator.num_processes)

    @property
    def done(self) -> bool:
        """Whether the last step is behind it."""
        return self.state.step >= self.total_steps

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps, and after the last one, happens now."""
        return self.state.step % every == 0 or self.done
