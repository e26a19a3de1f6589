"""Rewards: Python functions of an answer and its row. One that fails costs the answer, and is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from minimoe.config import RewardConfig
from minimoe.errors import UserError
from minimoe.outside import Outside


class Rewards:
    """Context manager around the functions, which run in a process of their own.

    Args:
        rewards: the functions, with their weights.
        seconds: of one call.

    Raises:
        UserError: a module or function is not there.
    """

    def __init__(self, rewards: Sequence[RewardConfig], seconds: float) -> None:
        self._rewards = rewards
        self.last_error = ""  # of a call that failed
        try:
            self._outside = Outside([reward.function for reward in rewards], seconds)
        except UserError as error:
            raise UserError(f"grpo.rewards: {error.what}", fix=error.fix) from None

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._outside.end()

    def __call__(self, answer: str, row: Mapping[str, Any]) -> tuple[float | None, list[float | None]]:
        """The weighted sum, and what each function gave; None where one raises, gives no finite number or takes too
        long."""
        values = [self._value(number, answer, row) for number in range(len(self._rewards))]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None, values
        return sum(reward.weight * value for reward, value in zip(self._rewards, known, strict=True)), values

    def _value(self, number: int, answer: str, row: Mapping[str, Any]) -> float | None:
        value, problem = self._outside.call(number, answer, dict(row))
        try:
            value = math.nan if problem else float(value)
        except (TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem and not math.isfinite(value):
            problem = f"{value} is no finite number"
        if problem:
            self.last_error = f"{self._rewards[number].function}: {problem}"
            return None
        return value
