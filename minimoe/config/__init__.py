"""The schema of one run: `TokenizerRun`, a stage of training, `GenerateRun` or `EvaluateRun`.

Sections are pydantic models: frozen, strict about keys and types, every field with its unit and default, and the rules
between fields beside them. Each has its file here; `file.py` reads them from YAML.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from minimoe.config.data import DataConfig as DataConfig
from minimoe.config.data import SourceConfig as SourceConfig
from minimoe.config.generation import GenerationSection as GenerationSection
from minimoe.config.generation import WeightsName as WeightsName
from minimoe.config.section import OutputDir, Section, Seed
from minimoe.config.stages import ContextConfig as ContextConfig
from minimoe.config.stages import DistilConfig as DistilConfig
from minimoe.config.stages import DpoConfig as DpoConfig
from minimoe.config.stages import GrpoConfig as GrpoConfig
from minimoe.config.stages import LoraConfig as LoraConfig
from minimoe.config.stages import RewardConfig as RewardConfig
from minimoe.config.training import LoggingConfig, OptimizerConfig, TrainConfig
from minimoe.config.training import ParallelConfig as ParallelConfig
from minimoe.config.training import ScheduleConfig as ScheduleConfig

# How documents are encoded: plain text, conversations whose answers are learned, pairs of these, or ones with a label.
Encoding = Literal["pretrain", "sft", "pairs", "labels"]


class TokenizerSection(Section):
    """Byte-level BPE."""

    vocab_size: int = Field(
        4096, ge=266, le=1 << 20, description="tokens, with the 256 bytes and 10 special ones; 266: a token is a byte"
    )
    max_training_bytes: int = Field(
        200_000_000, ge=1, description="bytes of text the merges are learned from, read from the start"
    )


class TokenizerRun(Section):
    """`minimoe tokenizer`: train a tokenizer."""

    output_dir: OutputDir = Field(description="folder the tokenizer is written to")
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataConfig


class TrainingRun(Section):
    """What the config of every training stage has; a stage adds where its model comes from."""

    stage: ClassVar[str]  # the command's name: fixed by the class, never read from a file

    output_dir: OutputDir = Field(description="folder of the run")
    seed: Seed = Field(0, description="seed of new weights, data order and split")
    data: DataConfig
    chat_template: str | None = Field(
        None, description="for the tokenizer: chatml, or the path of a Jinja template; null: the one it has"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    logging: LoggingConfig = LoggingConfig()
    parallel: ParallelConfig | None = Field(None, description="sharded training on several ranks; null: copies")

    @property
    def tokenizer_source(self) -> str:
        """Folder or hub name of the tokenizer."""
        raise NotImplementedError

    @property
    def encoding(self) -> Encoding:
        """How its documents are encoded."""
        return "sft"

    @property
    def chat(self) -> bool:
        """Whether the sample prompts are messages to answer, rather than the beginnings of documents."""
        return self.encoding != "pretrain"


class PretrainRun(TrainingRun):
    """`minimoe pretrain`: train a model from scratch, or go on with one."""

    stage: ClassVar[str] = "pretrain"

    tokenizer: str | None = Field(None, description="tokenizer folder or hub name")
    model: dict[str, Any] | None = Field(None, description="architecture of a new model, the keys of MiniMoeConfig")
    init_from: str | None = Field(None, description="model folder to continue from, instead of tokenizer and model")
    context: ContextConfig | None = Field(None, description="with init_from: a longer context; null: the model's")

    @property
    def tokenizer_source(self) -> str:
        """The tokenizer is given by itself, or is that of the model to continue from."""
        return self.tokenizer or self.init_from or ""

    @property
    def encoding(self) -> Encoding:
        """Plain text."""
        return "pretrain"

    @model_validator(mode="after")
    def _one_beginning(self) -> PretrainRun:
        missing = [name for name in ("tokenizer", "model") if getattr(self, name) is None]
        if self.init_from is None and missing:
            raise ValueError(
                f"{' and '.join(missing)}: required, but missing (or give init_from, a model to continue from)"
            )
        if self.init_from is not None and len(missing) < 2:
            raise ValueError(
                "init_from: architecture and tokenizer come from that model; leave out tokenizer and model"
            )
        if self.context is not None and self.init_from is None:
            raise ValueError("context: lengthens a trained model; a new one has model.max_position_embeddings")
        return self

    @field_validator("model")
    @classmethod
    def _architecture(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return _checked_architecture(value)


class FineTuningRun(TrainingRun):
    """What every stage has that goes on from a model."""

    init_from: str = Field(description="model folder to start from; architecture and tokenizer come from it")
    lora: LoraConfig | None = Field(None, description="train low-rank adapters instead of the weights; null: no")

    @model_validator(mode="before")
    @classmethod
    def _optimizer_of_adapters(cls, values: Any) -> Any:
        return _adamw_for_lora(values)

    @property
    def tokenizer_source(self) -> str:
        """A model folder holds its tokenizer."""
        return self.init_from


class SftRun(FineTuningRun):
    """`minimoe sft`: fine-tune a model on conversations."""

    stage: ClassVar[str] = "sft"


class DpoRun(FineTuningRun):
    """`minimoe dpo`: learn which of two answers is preferred, or which answers are wanted."""

    stage: ClassVar[str] = "dpo"

    dpo: DpoConfig = DpoConfig()

    @property
    def encoding(self) -> Encoding:
        """Pairs, or single answers."""
        return "labels" if self.dpo.loss == "kto" else "pairs"


class GrpoRun(FineTuningRun):
    """`minimoe grpo`: learn from rewards of the model's own answers."""

    stage: ClassVar[str] = "grpo"

    grpo: GrpoConfig

    @model_validator(mode="after")
    def _whole_groups(self) -> GrpoRun:
        if self.train.batch_size % self.grpo.group_size:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} (answers a step) is no multiple of grpo.group_size "
                f"{self.grpo.group_size}"
            )
        return self


class DistilRun(TrainingRun):
    """`minimoe distil`: learn from another model beside the text."""

    stage: ClassVar[str] = "distil"

    distil: DistilConfig
    model: dict[str, Any] | None = Field(None, description="architecture of a new student, the keys of MiniMoeConfig")
    init_from: str | None = Field(None, description="model folder of a student to continue, instead of model")
    lora: LoraConfig | None = Field(None, description="with init_from: train low-rank adapters; null: no")

    @property
    def tokenizer_source(self) -> str:
        """The student speaks as its teacher does."""
        return self.distil.teacher

    @property
    def encoding(self) -> Encoding:
        """Plain text, or conversations."""
        return "pretrain" if self.distil.learn == "documents" else "sft"

    @model_validator(mode="before")
    @classmethod
    def _optimizer_of_adapters(cls, values: Any) -> Any:
        return _adamw_for_lora(values)

    @model_validator(mode="after")
    def _one_student(self) -> DistilRun:
        if (self.model is None) == (self.init_from is None):
            raise ValueError("give exactly one of model (a new student) and init_from")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora: adapters are of a trained model; give init_from")
        return self

    @field_validator("model")
    @classmethod
    def _architecture(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return value if value is None else _checked_architecture(value)


class GenerateRun(Section):
    """`minimoe generate --config`: decoding settings in a file."""

    generation: GenerationSection = GenerationSection()


class EvaluateRun(Section):
    """`minimoe evaluate`: how the documents to score are read."""

    data: DataConfig

    @field_validator("data")
    @classmethod
    def _all_of_it(cls, data: DataConfig) -> DataConfig:
        given = data.model_fields_set & {"validation", "validation_fraction", "max_validation_documents"}
        if given:
            raise ValueError(f"{', '.join(sorted(given))}: every document is scored, none is held out")
        return data


def _checked_architecture(value: dict[str, Any]) -> dict[str, Any]:
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


def _adamw_for_lora(values: Any) -> Any:
    """Adapters are trained by AdamW: an update of Muon's has full rank, which the two thin factors cannot have."""
    if not isinstance(values, dict) or values.get("lora") is None:
        return values
    optimizer = values.get("optimizer", {})
    if not isinstance(optimizer, dict):
        return values
    if optimizer.get("name", "adamw") != "adamw":
        raise ValueError("optimizer.name: adapters (lora) are trained by adamw; set it to adamw, or leave it out")
    return values | {"optimizer": optimizer | {"name": "adamw"}}


def _physical_memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
