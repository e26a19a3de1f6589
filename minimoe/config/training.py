"""Optimizer, schedule, loop and logging of a training run."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from minimoe.config.section import Name, Section


class Rate(NamedTuple):
    """A peak learning rate: the default, and the range outside which it is probably a mistake."""

    default: float
    lowest: float
    highest: float


# Muon's step has the same size whatever the gradient; AdamW's has too, but an entry at a time.
RATES = {"muon": Rate(0.02, 1e-3, 0.1), "adamw": Rate(2e-3, 1e-6, 0.01)}
MUONS_ADAMW = Rate(0.01, 1e-5, 0.05)  # of embeddings, norms and routers beside Muon


class OptimizerConfig(Section):
    """AdamW, or Muon for the matrices with AdamW for embeddings, norms and routers."""

    name: Literal["muon", "adamw"] = Field("muon", description="optimizer")
    lr: float = Field(
        RATES["muon"].default,
        gt=0,
        description="peak learning rate (of the matrices, with muon); null: 0.02 for muon, 0.002 for adamw",
    )
    adamw_lr: float = Field(
        MUONS_ADAMW.default, gt=0, description="with muon: peak learning rate of embeddings, norms, routers"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of matrices and embeddings")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_optimizer(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("lr") is None and values.get("name", "muon") in RATES:
            values = values | {"lr": RATES[values.get("name", "muon")].default}
        return values

    def doubts(self) -> list[str]:
        """What is probably a mistake: a rate of another optimizer, or one that lost a digit."""
        rates = {"optimizer.lr": (self.lr, RATES[self.name])}
        if self.name == "muon":
            rates["optimizer.adamw_lr"] = (self.adamw_lr, MUONS_ADAMW)
        return [
            f"{key} {rate:g} is far from what {self.name} is usually given, {usual.lowest:g} to {usual.highest:g}"
            for key, (rate, usual) in rates.items()
            if not usual.lowest <= rate <= usual.highest
        ]

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each beta must be in [0, 1)")
        return value


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step."""

    name: Literal["cosine", "wsd", "constant"] = Field("wsd", description="shape after warm-up")
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up from 0; a run that is shorter warms up for half of its steps"
    )
    warmup_start_ratio: float = Field(
        0.0, ge=0, le=1, description="learning rate that warm-up starts from, as a share of the peak: re-warming"
    )
    decay_fraction: float = Field(0.4, gt=0, le=1, description="wsd: final share of the steps that decays linearly")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate as a share of the peak")

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of so many."""
        return self.warmup_steps if self.warmup_steps <= total_steps else total_steps // 2


class TrainConfig(Section):
    """The training loop."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over the data; give this or max_steps")
    batch_size: int = Field(32, ge=1, description="rows per optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="rows per forward pass and process; null: no gradient accumulation"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    max_skipped_steps: int = Field(
        3, ge=0, description="steps with a NaN or infinite loss or gradient skipped in a row; one more ends the run"
    )
    on_loss_spike: Literal["warn", "skip"] = Field(
        "warn", description="a loss more than 6 standard deviations above its running mean: warn, or skip the step too"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: the fastest one present")
    gradient_checkpointing: bool = Field(False, description="recompute layers in backward to save memory")
    compile: bool = Field(False, description="torch.compile the model, on a GPU")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    eval_every: int = Field(200, ge=1, description="steps between validations")
    sample_every: int | None = Field(None, ge=1, description="steps between generated samples; null: never")
    sample_prompts: tuple[str, ...] = Field((), description="prompts of the samples")
    sample_tokens: int = Field(64, ge=1, description="new tokens per sample")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps or epochs")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self

    def total_steps(self, rows_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps or math.ceil((self.epochs or 0) * rows_per_epoch / self.batch_size)

    def micro_rows(self, num_processes: int) -> int:
        """Rows of one forward pass on one rank."""
        return self.micro_batch_size or -(-self.batch_size // num_processes)


class ParallelConfig(Section):
    """Sharded training: ranks share out the weights, by `transformers`' engine. Without it each rank has a copy."""

    fsdp_size: int | Literal["auto"] = Field(
        "auto", description="ranks that share out the weights; auto: all there are"
    )
    replicate_size: int = Field(1, ge=1, description="copies of such a group of ranks (HSDP)")
    expert_size: int = Field(1, ge=1, description="ranks that share out the experts, to which tokens travel; 1: no")
    cpu_offload: bool = Field(
        False, description="keep weights, gradients and moments in the host's memory; a GPU holds the layers at work"
    )
    timeout_seconds: int = Field(600, ge=1, description="that a rank waits for another before it takes it for dead")

    @field_validator("fsdp_size")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1, got {value}")
        return value


Tracker = Literal["wandb", "tensorboard", "trackio"]


class LoggingConfig(Section):
    """Where metrics go beside the console and metrics.jsonl."""

    trackers: tuple[Tracker, ...] = Field((), description="of wandb, tensorboard and trackio")
    online: bool = Field(False, description="wandb sends to its server, which needs a key; else it keeps local files")
    report: bool = Field(True, description="keep report.html in the run's folder, refreshed while training")
    project: Name = Field("minimoe", description="project in wandb and trackio")
    run_name: Name | None = Field(None, description="run name in wandb and trackio; null: the output folder's name")

    @model_validator(mode="after")
    def _one_of_each(self) -> LoggingConfig:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: one is named twice in {', '.join(self.trackers)}")
        if self.online and "wandb" not in self.trackers:
            raise ValueError("online is for wandb, which trackers does not name")
        return self
