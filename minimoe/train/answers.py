"""Answers of a group, what each teaches, and the rows that they are packed into: pure functions.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.data.batch import Batch
from minimoe.data.packing import best_fit
from minimoe.model.losses import IGNORE_INDEX


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """Packed prompts with their answers. What belongs to a token stands where it is predicted, one place before it."""

    advantages: Tensor  # (B, S) float32
    weights: Tensor  # (B, S) float32: of the token in the step's loss; they are 0 where nothing is learned
    old_logprobs: Tensor  # (B, S) float32: when it was sampled
    reference_logprobs: Tensor  # (B, S) float32: under the first model, 0 without one


@dataclass
class Answer:
    """One answer on its way into a batch."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    truncated: bool
    reward: float | None  # None: a reward failed
    rewards: list[float | None]
    advantage: float = 0.0
    learned: bool = True


def set_advantages(group: Sequence[Answer], loss: str, learn_truncated: bool) -> bool:
    """Each answer's reward against its group's mean, divided by the deviation but in dr_grpo.

    Answers whose reward failed, and on demand those that were truncated, are not learned from.

    Returns:
        Whether the group teaches anything: its rewards differ.
    """
    for answer in group:
        answer.learned = answer.reward is not None and (learn_truncated or not answer.truncated)
    rewards = np.array([answer.reward for answer in group if answer.learned], np.float64)
    if len(rewards) == 0 or np.ptp(rewards) == 0:
        return False
    scale = 1.0 if loss == "dr_grpo" else float(rewards.std(ddof=1)) + 1e-4
    for answer in group:
        if answer.learned:
            answer.advantage = (float(answer.reward or 0) - float(rewards.mean())) / scale
    return True


def token_weights(answers: Sequence[Answer], loss: str, max_new_tokens: int) -> list[float]:
    """The weight of each token of each answer: over all tokens of the step they make the mean that the loss is."""
    learned = sum(answer.learned for answer in answers)
    tokens = sum(len(answer.token_ids) for answer in answers if answer.learned)
    weights = []
    for answer in answers:
        if not answer.learned:
            weights.append(0.0)
        elif loss == "grpo":
            weights.append(1 / (learned * len(answer.token_ids)))
        else:
            weights.append(1 / (learned * max_new_tokens) if loss == "dr_grpo" else 1 / tokens)
    return weights


def pack_answers(
    answers: Sequence[Answer], token_weight: Sequence[float], length: int, pad_id: int, world_size: int
) -> RolloutBatch:
    """Rows of `length` tokens, best-fit; their number is a multiple of the ranks'.

    Args:
        token_weight: of each answer's tokens in the loss.
    """
    lengths = [len(answer.prompt_ids) + len(answer.token_ids) for answer in answers]
    order = sorted(range(len(answers)), key=lambda index: -lengths[index])
    rows = best_fit([lengths[index] for index in order], length)
    shape = (-(-(max(rows) + 1) // world_size) * world_size, length)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    positions, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    advantages, weights, old = (np.zeros(shape, np.float32) for _ in range(3))
    filled = [0] * shape[0]
    for index, row in zip(order, rows, strict=True):
        answer, start = answers[index], filled[row]
        first = start + len(answer.prompt_ids)
        stop = first + len(answer.token_ids)
        input_ids[row, start:stop] = answer.prompt_ids + answer.token_ids
        labels[row, first:stop] = answer.token_ids
        positions[row, start:stop] = np.arange(stop - start)
        mask[row, start:stop] = 1
        ahead = slice(first - 1, stop - 1)
        advantages[row, ahead] = answer.advantage
        weights[row, ahead] = token_weight[index]
        old[row, ahead] = answer.logprobs
        filled[row] = stop
    for row, stop in enumerate(filled):
        positions[row, stop:] = np.arange(length - stop)
    columns = (input_ids, labels, positions, mask, advantages, weights, old, np.zeros(shape, np.float32))
    return RolloutBatch(*map(torch.from_numpy, columns))


def answers_mask(batch: Batch) -> Tensor:
    """(B, S) float32: 1 where a position predicts a token of an answer."""
    return F.pad(batch.labels[:, 1:] != IGNORE_INDEX, (0, 1)).float()
