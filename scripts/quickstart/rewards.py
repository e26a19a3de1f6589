"""Rewards of the quickstart's tasks for `minimoe grpo`: a program marks the answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.quickstart.instructions import check_answer


def is_right(answer: str, row: Mapping[str, Any]) -> float:
    """1 for an answer that follows the instruction of a {"task", "messages", "check"} row, else 0."""
    return float(check_answer(dict(row), answer))
