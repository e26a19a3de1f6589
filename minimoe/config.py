"""The schema of one run: `TokenizerRun`, `PretrainRun`, `SftRun` or `GenerateRun`.

Sections are pydantic models: frozen, strict about keys and types, every field with its unit and default, and the rules
between fields beside them. `config_file.py` reads them from YAML.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

# What a training run learns, and so how its documents are encoded: plain text, or conversations.
Stage = Literal["pretrain", "sft"]


class Section(BaseModel):
    """Base of all config sections: frozen, strict about keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_silent_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read True as 1, and the text "no" as False: both hide a typing mistake.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and "bool" not in str(annotation):
            raise ValueError(f"expected {_type_name(annotation)}, not a boolean")
        if isinstance(value, str) and annotation is bool:
            raise ValueError("write true or false")
        return value


def _folder(value: str) -> str:
    expanded = os.path.expanduser(value)  # leaves "~nobody" as it is
    if not value.strip() or expanded.startswith("~"):
        raise ValueError("must name a folder")
    if os.path.exists(expanded) and not os.path.isdir(expanded):
        raise ValueError("is a file, not a folder")
    return value


def _own_folder(value: str) -> str:
    expanded = os.path.expanduser(value)
    folder = os.path.realpath(expanded)
    if folder == os.path.dirname(folder):
        raise ValueError("must name a folder that a run can have for itself")
    return expanded


def _plain_name(value: str) -> str:
    if not value.strip() or value in (".", "..") or set(value) & set("/\\"):
        raise ValueError("must be a plain name, without a path in it")
    return value


Folder = Annotated[str, AfterValidator(_folder)]
OutputDir = Annotated[Folder, AfterValidator(_own_folder)]
Name = Annotated[str, AfterValidator(_plain_name)]
# torch's generators take no larger seed.
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class SourceConfig(Section):
    """Where documents come from: a local path or a hub dataset."""

    path: str | None = Field(None, description="file, folder or glob of txt, jsonl, json, parquet or csv")
    hub: str | None = Field(None, description="Hugging Face hub dataset name, e.g. roneneldan/TinyStories")
    subset: str | None = Field(None, description="hub dataset configuration name")
    split: str = Field("train", description="hub dataset split")
    streaming: bool = Field(False, description="stream the hub dataset instead of downloading it whole")
    format: str = Field("auto", description="row format, see minimoe/data/formats.py; auto looks at the columns")
    text_column: str = Field("text", description="column that holds the text, for the text format")
    weight: float | None = Field(None, gt=0, description="share of the training tokens; relative to other sources")

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path or hub")
        return self


class DataConfig(Section):
    """Documents, how they are split and packed."""

    train: tuple[SourceConfig, ...] = Field(description="training sources: a path, or a list of sources")
    validation: tuple[SourceConfig, ...] | None = Field(
        None, description="validation sources; null: a seeded share of the training documents"
    )
    validation_fraction: float = Field(0.02, ge=0, lt=1, description="share of documents held out, 0 = none")
    max_validation_documents: int | None = Field(
        2000, ge=1, description="held-out documents scored at each validation; the rest stay unused"
    )
    sequence_length: int = Field(512, ge=8, le=1 << 20, description="tokens per training row")
    max_documents: int | None = Field(None, ge=1, description="read at most this many documents per source")
    on_bad_rows: Literal["error", "skip"] = Field("error", description="malformed rows: stop, or skip and count")
    num_processes: int | None = Field(None, ge=1, le=1024, description="tokenisation processes; null: one per core")
    cache_dir: Folder = Field("~/.cache/minimoe", description="folder of tokenised shards")

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _accept_paths(cls, value: Any) -> Any:
        """A bare path, or a list with bare paths, is short for {path: ...}."""
        if value is None:
            return value
        if isinstance(value, (str, dict)):
            value = [value]
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("expected a path, a source or a non-empty list of them")
        return [{"path": item} if isinstance(item, str) else item for item in value]

    @model_validator(mode="after")
    def _weights_all_or_none(self) -> DataConfig:
        given = [source.weight is not None for source in self.train]
        if any(given) and not all(given):
            raise ValueError("train: give a weight to every source or to none")
        return self


class OptimizerConfig(Section):
    """AdamW, or Muon for the matrices with AdamW for embeddings, norms and routers."""

    name: Literal["muon", "adamw"] = Field("muon", description="optimizer")
    lr: float = Field(0.02, gt=0, description="peak learning rate (of the matrices, with muon)")
    adamw_lr: float = Field(0.01, gt=0, description="with muon: peak learning rate of embeddings, norms, routers")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of matrices and embeddings")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum")

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each beta must be in [0, 1)")
        return value


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step."""

    name: Literal["cosine", "wsd", "constant"] = Field("wsd", description="shape after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    decay_fraction: float = Field(0.4, gt=0, le=1, description="wsd: final share of the steps that decays linearly")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate as a share of the peak")

    def problem(self, total_steps: int) -> str | None:
        """Why it does not fit a run of so many steps; None when it does."""
        if self.warmup_steps <= total_steps:
            return None
        return f"schedule.warmup_steps {self.warmup_steps} is more than the run's {total_steps} steps"


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
    compile: bool = Field(False, description="torch.compile the model")
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
        return self.micro_batch_size or max(self.batch_size // num_processes, 1)


class LoggingConfig(Section):
    """Where metrics go beside the console and metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases; offline needs no key")
    project: Name = Field("minimoe", description="wandb project")
    run_name: Name | None = Field(None, description="wandb run name; null: the output folder's name")


class TokenizerSection(Section):
    """Byte-level BPE."""

    vocab_size: int = Field(
        4096, ge=266, le=1 << 20, description="tokens, with the 256 bytes and 10 special ones; 266: a token is a byte"
    )
    max_training_bytes: int = Field(
        200_000_000, ge=1, description="bytes of text the merges are learned from, read from the start"
    )


WeightsName = Literal["exact", "int8"]


class GenerationSection(Section):
    """Decoding settings."""

    max_new_tokens: int = Field(256, ge=1, description="tokens generated per prompt at most")
    temperature: float = Field(0.8, ge=0, le=1000, description="0 is greedy, else at least 0.001")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens, 0 = all")
    top_p: float = Field(0.95, gt=0, le=1, description="keep the smallest set with this probability mass")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens below this share of the likeliest one's")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="divide logits of tokens already seen; 1 = off")
    stop: tuple[str, ...] = Field((), description="texts that end the generation")
    seed: Seed = Field(0, description="seed of the sampling")
    chat: bool = Field(False, description="wrap the prompt in the chat template")
    batch_size: int = Field(8, ge=1, description="prompts decoded together")
    compile: bool = Field(False, description="torch.compile the step, on a GPU; the weights are then bf16")
    weights: WeightsName = Field(
        "exact", description="int8 rounds them to 8 bits: few prompts at once get faster on a CPU"
    )

    @field_validator("temperature")
    @classmethod
    def _greedy_or_divisible(cls, value: float) -> float:
        if 0 < value < 1e-3:  # logits divided by it overflow float32
            raise ValueError("must be 0 (greedy) or at least 0.001")
        return value


class TokenizerRun(Section):
    """`minimoe tokenizer`: train a tokenizer."""

    output_dir: OutputDir = Field(description="folder the tokenizer is written to")
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataConfig


class TrainingRun(Section):
    """What the config of every training stage has; a stage adds where its model comes from."""

    stage: ClassVar[Stage]  # fixed by the class, never read from a file

    output_dir: OutputDir = Field(description="folder of the run")
    seed: Seed = Field(0, description="seed of new weights, data order and split")
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainingRun:
        problem = self.train.max_steps and self.schedule.problem(self.train.max_steps)
        if problem:
            raise ValueError(problem)
        return self

    @property
    def tokenizer_source(self) -> str:
        """Folder or hub name of the tokenizer."""
        raise NotImplementedError

    @property
    def chat(self) -> bool:
        """Whether the sample prompts are messages to answer, rather than the beginnings of documents."""
        return self.stage != "pretrain"


class PretrainRun(TrainingRun):
    """`minimoe pretrain`: train a model from scratch."""

    stage: ClassVar[Stage] = "pretrain"

    tokenizer: str = Field(description="tokenizer folder or hub name")
    model: dict[str, Any] = Field(description="architecture, the keys of MiniMoeConfig")

    @property
    def tokenizer_source(self) -> str:
        """The tokenizer is given by itself."""
        return self.tokenizer

    @field_validator("model")
    @classmethod
    def _architecture(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Imported here: the architecture's rules need transformers, and most configs are read without it.
        from minimoe.model.config import architecture_problems, num_parameters

        problems = architecture_problems(value)
        if problems:
            raise ValueError("; ".join(f"{key}: {problem}" for key, problem in problems.items()))
        count, memory = num_parameters(value), _physical_memory()
        if 4 * count > memory:
            raise ValueError(
                f"{count:,} float32 parameters need {4 * count / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB"
            )
        return value


class SftRun(TrainingRun):
    """`minimoe sft`: fine-tune a model on conversations."""

    stage: ClassVar[Stage] = "sft"

    init_from: str = Field(description="model folder to start from; architecture and tokenizer come from it")

    @property
    def tokenizer_source(self) -> str:
        """A model folder holds its tokenizer."""
        return self.init_from


class GenerateRun(Section):
    """`minimoe generate --config`: decoding settings in a file."""

    generation: GenerationSection = GenerationSection()


def _physical_memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
