"""Sums and differences of numbers up to 49, worked out step by step; some pairs of operands are held out."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from scripts.quickstart.story import stable_hash
from scripts.quickstart.task import Task

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
}
WORDS = {"+": "plus", "-": "minus"}
# The look-ahead finds overlapping pairs: "43 - 10 - 7" holds (43, 10) and (10, 7).
PAIR = re.compile(r"(?<!\d)(?=(\d+)\s*(?:\+|-|plus|minus)\s*(\d+)(?!\d))")

ARITHMETIC_PROMPTS = (
    "What is {a} {sign} {b}?",
    "{a} {sign} {b} = ?",
    "Calculate {a} {sign} {b}.",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
)

Problem = tuple[int, str, int]


def is_held_out_pair(a: int, b: int) -> bool:
    """About one pair in eight; small numbers and whole tens are the tables one counts with."""
    low, high = sorted((a, b))
    if high <= 10 or high > 49 or low < 2 or low % 10 == 0 or high % 10 == 0:
        return False
    return stable_hash(f"{low},{high}") % 8 == 0


def held_out_pairs_in(text: str) -> list[tuple[int, int]]:
    pairs = [(int(a), int(b)) for a, b in PAIR.findall(text)]
    return [pair for pair in pairs if is_held_out_pair(*pair)]


def worked(problem: Problem) -> str:
    """The calculation, tens and ones apart: "17 + 26 = 30 + 13 = 43."

    A small model cannot carry in its head, as the first digit it writes depends on the last ones it reads;
    each part of this chain needs one digit of each operand only.
    """
    a, sign, b = problem
    result = OPERATIONS[sign](a, b)
    if sign == "+" and max(a, b) > 9 and a % 10 and b % 10:
        return f"{a} + {b} = {a - a % 10 + b - b % 10} + {a % 10 + b % 10} = {result}."
    if sign == "-" and b > 9 and b % 10:
        return f"{a} - {b} = {a - b + b % 10} - {b % 10} = {result}."
    return f"{a} {sign} {b} = {result}."


def draw_problem(rng: random.Random, held_out: bool) -> Problem:
    """A problem with a held-out pair of operands, or one without such a pair, in its steps too."""
    while True:
        sign = rng.choice("+-")
        if rng.random() < 0.2:  # tables: whole tens and small numbers, as they occur in the steps
            a, b = rng.choice(((10 * rng.randint(1, 9), rng.randint(1, 72)), (rng.randint(1, 49), rng.randint(1, 9))))
        else:
            a, b = rng.randint(2, 49), rng.randint(2, 49)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        problem = (a, sign, b)
        if OPERATIONS[sign](a, b) in (a, b):
            continue  # the answer must not stand in the question
        held_out_pairs = set(held_out_pairs_in(worked(problem)))
        if held_out_pairs == ({(a, b)} if held_out else set()):
            return problem


def arithmetic_task(rng: random.Random, split: str) -> Task:
    problem = draw_problem(rng, held_out=split == "test")
    a, sign, b = problem
    prompt = rng.choice(ARITHMETIC_PROMPTS).format(a=a, b=b, sign=sign, word=WORDS[sign])
    check = {"a": a, "operation": sign, "b": b, "result": OPERATIONS[sign](a, b)}
    return Task("arithmetic", prompt, worked(problem), check)


def check_arithmetic(check: dict[str, Any], answer: str) -> bool:
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and int(numbers[-1]) == check["result"]
