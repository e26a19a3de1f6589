"""What single stages of training add: adapters, a teacher, preferences, rewards."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from minimoe.config.section import Section

LoraTarget = Literal["attention", "dense", "shared_experts", "experts", "router", "control_tokens"]


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) on frozen weights: what is trained and saved is the adapter alone."""

    rank: int = Field(8, ge=1, description="rank of the update of each matrix")
    alpha: float = Field(16, gt=0, description="the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of the attention's adapters; others have none")
    targets: tuple[LoraTarget, ...] = Field(
        ("attention", "dense", "shared_experts", "experts"),
        min_length=1,
        description="what has an adapter; what the model does not have is passed over. control_tokens are the "
        "embeddings of tokens such as <|im_end|>, for a base that has never seen them",
    )

    @model_validator(mode="after")
    def _dropout_of_modules(self) -> LoraConfig:
        others = [target for target in self.targets if target not in ("attention", "control_tokens")]
        if self.dropout and others:
            raise ValueError(
                f"dropout {self.dropout}: only attention can have it; set it to 0, or targets: [attention]"
            )
        return self


class ContextConfig(Section):
    """A longer context for a trained model, by scaled rotary positions."""

    length: int = Field(ge=16, le=1 << 20, description="positions of the model from now on")
    rope_type: Literal["yarn", "linear", "dynamic", "default"] = Field(
        "yarn", description="yarn (arXiv 2309.00071), linear (2306.15595), dynamic (NTK), or default: theta alone"
    )
    rope_theta: float | None = Field(None, gt=1, description="base of the rotary angles; null: the model's")


class DistilConfig(Section):
    """A teacher (arXiv 1503.02531)."""

    teacher: str = Field(description="model folder of the teacher, dense or MoE, with the student's tokenizer")
    weight: float = Field(
        0.5, gt=0, le=1, description="of the teacher's divergence in the loss; the rest is the texts' cross-entropy"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="both sides' logits are divided by it")
    top_k: int | None = Field(
        None, ge=1, description="the teacher's likeliest tokens, and all others as one; null: every token"
    )
    cache: bool = Field(False, description="keep what the teacher says on disk, in data.cache_dir; needs top_k")
    learn: Literal["documents", "answers"] = Field(
        "documents", description="documents: every token, as pretraining; answers: the assistant's turns, as SFT"
    )

    @model_validator(mode="after")
    def _cache_of_few(self) -> DistilConfig:
        if self.cache and self.top_k is None:
            raise ValueError("cache: true needs top_k, such as 32: all logits of all tokens would fill the disk")
        return self


class DpoConfig(Section):
    """Preferences."""

    loss: Literal["sigmoid", "ipo", "simpo", "orpo", "kto"] = Field(
        "sigmoid",
        description="sigmoid: DPO (arXiv 2305.18290); ipo (2310.12036); simpo (2405.14734) and orpo (2403.07691), "
        "without a reference; kto (2402.01306), for rows with a label",
    )
    beta: float = Field(0.1, gt=0, description="the larger, the closer to the reference; of orpo: weight of its ratio")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="sigmoid: share of pairs taken for the wrong way round"
    )
    simpo_margin: float = Field(0.5, ge=0, description="simpo: by how much the chosen answer should be ahead")
    desirable_weight: float = Field(1.0, ge=0, description="kto: weight of the rows with label true")
    undesirable_weight: float = Field(1.0, ge=0, description="kto: weight of the rows with label false")
    sft_weight: float = Field(0.0, ge=0, description="weight of the chosen answers' cross-entropy beside the loss")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model that training starts from."""
        return self.loss not in ("simpo", "orpo")


class RewardConfig(Section):
    """One reward: a Python function of an answer and its row."""

    function: str = Field(description="module:function, called with the answer (text) and the row (dict)")
    weight: float = Field(1.0, description="of its value in the sum")

    @field_validator("function")
    @classmethod
    def _is_named(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
            raise ValueError("must be module:function, such as my_rewards:is_right")
        return value


class GrpoConfig(Section):
    """Rewards of groups of answers (arXiv 2402.03300)."""

    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="functions, whose weighted sum is the reward")
    group_size: int = Field(8, ge=2, description="answers to each prompt, compared with each other")
    max_new_tokens: int = Field(128, ge=1, description="tokens of an answer at most; a longer one is truncated")
    temperature: float = Field(1.0, ge=1e-3, le=100, description="of sampling, and of the probabilities trained on")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on the same answers")
    loss: Literal["grpo", "dr_grpo", "cispo"] = Field(
        "grpo",
        description="grpo: a mean over each answer's tokens, then over answers; dr_grpo: a sum of tokens over a fixed "
        "length, advantages not divided by their deviation (arXiv 2503.20783); cispo: clipped weights (2506.13585)",
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="the ratio of probabilities is clipped below 1 - this")
    clip_high: float = Field(0.2, ge=0, description="and above 1 + this")
    kl_weight: float = Field(0.0, ge=0, description="of the divergence from the first model; 0 needs no reference")
    learn_truncated: bool = Field(True, description="whether answers that reached max_new_tokens are learned from")
    reward_seconds: float = Field(10.0, gt=0, description="time of one call of a reward; then the answer is left out")
    eval_prompts: int = Field(100, ge=1, description="held-out prompts answered at each validation, at temperature 0")
