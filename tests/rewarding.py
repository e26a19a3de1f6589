"""Rewards that tests give to `minimoe grpo`."""

from __future__ import annotations

import os
import time


def has_letter(answer: str, row: dict) -> float:
    """The share of letters e."""
    return answer.count("e") / max(len(answer), 1)


def is_short(answer: str, row: dict) -> float:
    return -float(len(answer))


def same(answer: str, row: dict) -> float:
    return 1.0


def wanted(answer: str, row: dict) -> float:
    return float(row["check"] in answer)


def talks(answer: str, row: dict) -> float:
    print("a reward talks")
    return 1.0


def misbehaves(answer: str, row: dict) -> float:
    """As the row says."""
    kind = row.get("kind")
    if kind == "raise":
        raise ValueError("not this one")
    if kind == "hang":
        time.sleep(60)
    if kind == "die":
        os._exit(3)
    if kind == "nan":
        return float("nan")
    if kind == "text":
        return "much"  # type: ignore[return-value]
    return 0.5
