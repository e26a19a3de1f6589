"""Documents: where they come from, how they are split and packed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from minimoe.config.section import Folder, Section


class SourceConfig(Section):
    """Where documents come from: a local path or a hub dataset."""

    path: str | None = Field(None, description="file, folder or glob of txt, jsonl, json, csv, tsv, parquet or arrow")
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
        fields = type(self).model_fields
        of_hub = [name for name in ("subset", "split", "streaming") if getattr(self, name) != fields[name].default]
        if self.path is not None and of_hub:
            raise ValueError(f"{', '.join(of_hub)}: only of a hub dataset, and {self.path} is a local path")
        return self


class PhaseConfig(Section):
    """Another mixture of the sources, from a step on."""

    from_step: int = Field(ge=1, description="the first step of the phase, steps done before it")
    weights: tuple[float, ...] = Field(description="of the sources, in their order; 0 leaves one out")

    @field_validator("weights")
    @classmethod
    def _something(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value, default=0) < 0 or sum(value) <= 0:
            raise ValueError("weights are 0 or more, and at least one is more")
        return value


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
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="other weights of the sources from later steps on; the sources' own are the first phase's"
    )
    sequence_length: int = Field(512, ge=8, le=1 << 20, description="tokens per training row")
    max_documents: int | None = Field(None, ge=1, description="read at most this many documents per source")
    on_bad_rows: Literal["error", "skip"] = Field("error", description="malformed rows: stop, or skip and count")
    num_processes: int | None = Field(None, ge=1, le=1024, description="tokenisation processes; null: one per core")
    cache_dir: Folder | None = Field(
        None, description="folder of tokenised data; null: minimoe in XDG_CACHE_HOME or ~/.cache"
    )

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
        steps = [phase.from_step for phase in self.phases]
        if self.phases and not all(given):
            raise ValueError("phases: give every source of train a weight, for the steps before the first phase")
        if any(len(phase.weights) != len(self.train) for phase in self.phases):
            raise ValueError(f"phases: each has a weight for each of the {len(self.train)} sources of train")
        if steps != sorted(set(steps)):
            raise ValueError(f"phases: from_step must rise, got {', '.join(map(str, steps))}")
        return self
