"""Decoding settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from minimoe.config.section import Section, Seed

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
    enable_thinking: bool | None = Field(
        None, description="in a chat: false puts an empty think part before the answer; null leaves it to the model"
    )
    batch_size: int = Field(8, ge=1, description="prompts decoded together")
    compile: bool = Field(False, description="torch.compile the step, on a GPU; the weights are then bf16")
    weights: WeightsName = Field(
        "exact", description="int8 rounds them to 8 bits: few prompts at once get faster on a CPU"
    )

    @field_validator("stop")
    @classmethod
    def _stops_somewhere(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty text ends nothing")
        return value

    @field_validator("temperature")
    @classmethod
    def _greedy_or_divisible(cls, value: float) -> float:
        if 0 < value < 1e-3:  # logits divided by it overflow float32
            raise ValueError("must be 0 (greedy) or at least 0.001")
        return value
