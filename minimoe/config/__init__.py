"""The schema of one run: `TokenizerRun`, `PretrainRun`, `SftRun`, `GenerateRun` or `EvaluateRun`.

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
from minimoe.config.training import LoggingConfig, OptimizerConfig, TrainConfig
from minimoe.config.training import ScheduleConfig as ScheduleConfig

# What a training run learns, and so how its documents are encoded: plain text, or conversations.
Stage = Literal["pretrain", "sft"]


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

    stage: ClassVar[Stage]  # fixed by the class, never read from a file

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

    @property
    def tokenizer_source(self) -> str:
        """Folder or hub name of the tokenizer."""
        raise NotImplementedError

    @property
    def chat(self) -> bool:
        """Whether the sample prompts are messages to answer, rather than the beginnings of documents."""
        return self.stage != "pretrain"


class PretrainRun(TrainingRun):
    """`minimoe pretrain`: train a model from scratch, or go on with one."""

    stage: ClassVar[Stage] = "pretrain"

    tokenizer: str | None = Field(None, description="tokenizer folder or hub name")
    model: dict[str, Any] | None = Field(None, description="architecture of a new model, the keys of MiniMoeConfig")
    init_from: str | None = Field(None, description="model folder to continue from, instead of tokenizer and model")

    @property
    def tokenizer_source(self) -> str:
        """The tokenizer is given by itself, or is that of the model to continue from."""
        return self.tokenizer or self.init_from or ""

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
        return self

    @field_validator("model")
    @classmethod
    def _architecture(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
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


def _physical_memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
