"""The data of the stages after SFT: marked by a program, and nothing of the tests is in the rest."""

from __future__ import annotations

import pytest

from minimoe.generation.tools import Toolbox
from scripts.quickstart import more_tasks
from scripts.quickstart.instructions import check_answer


@pytest.fixture(scope="module")
def files() -> dict[str, list]:
    return more_tasks.make_more(0)


def operands(rows: list) -> set[tuple[int, int]]:
    return {tuple(sorted((row["check"]["a"], row["check"]["b"]))) for row in rows}


def test_held_out_sums_are_in_no_other_file(files):
    assert not operands(files["large_sums"]) & operands(files["large_sums_test"])
    assert len(files["large_sums_test"]) == 200
    texts = [message["content"] for row in files["sft_large_sums"] for message in row["messages"]]
    for row in files["large_sums_test"]:
        a, b = row["check"]["a"], row["check"]["b"]
        assert not any(f"{a} {sign} {b}" in text for text in texts for sign in "+-")


def test_worked_sums_are_right(files):
    for row in files["large_sums"][:200]:
        task = more_tasks.Task("arithmetic", "", more_tasks.worked(tuple(row["check"].values())[:3]), {})
        assert check_answer(row, task.answer)


def test_the_calculator_of_the_rows_is_the_one_that_generation_has(files):
    box = Toolbox("calculator")
    assert box.schemas == [more_tasks.CALCULATOR]
    for row in files["sft_tools"][:20]:
        calls = [call for message in row["messages"] for call in message.get("tool_calls", ())]
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        assert [box.call(c["function"]["name"], c["function"]["arguments"]) for c in calls] == results
    box.end()


def test_the_same_seed_makes_the_same_files(files):
    assert more_tasks.make_more(0)["prompts"] == files["prompts"]
    assert more_tasks.make_more(1)["prompts"] != files["prompts"]
