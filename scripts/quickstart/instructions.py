"""All instructions about the story world, and the program that marks the answers.

Four tasks: write a `story`, answer a `question` about a given story (`reading.py`), do some `arithmetic`, `reorder`
shuffled words. Each comes with a reference answer and with a `check`, the data that `check_answer` needs to judge any
answer without the reference.

What is held out never occurs in training: combinations of hero, object and place (`story.split_of`), and operand pairs
(`arithmetic.is_held_out_pair`), whatever the operation and the order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from scripts.quickstart.arithmetic import arithmetic_task, check_arithmetic
from scripts.quickstart.reading import QUESTIONS, ask, check_question, check_story, question_tasks, story_task
from scripts.quickstart.reorder import check_reorder, reorder_task
from scripts.quickstart.story import Story
from scripts.quickstart.task import Task

CHECKS = {
    "story": check_story,
    "question": check_question,
    "arithmetic": check_arithmetic,
    "reorder": check_reorder,
}


def check_answer(row: dict[str, Any], answer: str) -> bool:
    """Whether `answer` follows the instruction of a `{"task", "messages", "check"}` row."""
    return CHECKS[row["task"]](row["check"], answer)


def draw_tasks(rng: random.Random, name: str, split: str, turns: int = 1) -> list[Task]:
    """One conversation of `turns` instructions; a story is always one."""
    if name == "story":
        return [story_task(rng, split)]
    if name == "question":
        return question_tasks(rng, split, turns)
    draw = {"arithmetic": arithmetic_task, "reorder": reorder_task}[name]
    return [draw(rng, split) for _ in range(turns)]


def story_page(rng: random.Random, story: Story) -> str:
    """A story for pretraining: often under a title that names what comes, sometimes with questions below."""
    facts, page = story.facts, story.text
    if rng.random() < 0.4:
        page = f"{facts.hero.name}, the {facts.object} and the {facts.place.name}\n\n{page}"
    if rng.random() < 0.3:
        kinds = [kind for kind in QUESTIONS if facts.helper or kind != "helper"]
        asked = [ask(rng, facts, kind) for kind in rng.sample(kinds, 2)]
        page += "\n\n" + "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in asked)
    return page


def exercise_page(rng: random.Random, split: str) -> str:
    """A page of sums or of word puzzles for pretraining."""
    if rng.random() < 0.5:
        return "Sums\n\n" + "\n".join(arithmetic_task(rng, split).answer for _ in range(12))
    puzzles = [reorder_task(rng, split) for _ in range(5)]
    return "Word puzzles\n\n" + "\n".join(f"{puzzle.prompt}\n{puzzle.answer}" for puzzle in puzzles)


def row_of(tasks: Sequence[Task]) -> dict[str, Any]:
    """The conversation as a training row."""
    return {"messages": [message for task in tasks for message in task.messages]}
