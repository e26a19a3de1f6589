"""What the stages after SFT learn from, and are marked by: prompts, sums that SFT hardly covers, and calls of tools.

prompts.jsonl, more_test.jsonl: {"task", "messages", "check"}; instructions of the training split for rewards, and 1,000
    held-out ones, for figures with less noise than 200 give
large_sums.jsonl, large_sums_test.jsonl: the same, of sums with operands from 50 to 99, where SFT has operands up to 49;
    the test has pairs of operands that are in no other file
sft_large_sums.jsonl: {"messages"}; such sums, worked out
sft_tools.jsonl: {"messages", "tools"}; sums of three digits by a calculator, and answers that need none
tools_test.jsonl: {"prompt", "result"}; held-out sums of three digits

python -m scripts.quickstart.more_tasks --out data/quickstart
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from scripts.quickstart.arithmetic import ARITHMETIC_PROMPTS, OPERATIONS, WORDS, Problem, worked
from scripts.quickstart.instructions import draw_tasks, row_of
from scripts.quickstart.story import stable_hash
from scripts.quickstart.task import Task

Row = dict[str, Any]
MIXTURE = ("story", "story", "question", "question", "question", "arithmetic", "arithmetic", "reorder", "reorder")
COUNTS = {"prompts": 6000, "large_sums": 3000, "large_sums_test": 200, "more_test": 1000}
TOOL_ROWS = {"sft_tools": 3000, "tools_test": 200}
WORKED_ROWS = {"sft_large_sums": 3000}
CALCULATOR: Row = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "numbers, brackets and + - * / // %, such as 12 * (3 + 4)",
                }
            },
            "required": ["expression"],
        },
    },
}


def marked(task: Task) -> Row:
    """A task as a row with what its checker needs."""
    return {"task": task.name, "messages": task.messages[:1], "check": task.check}


def instructions(rng: random.Random, split: str, count: int) -> list[Row]:
    """Single instructions of all tasks."""
    return [marked(draw_tasks(rng, rng.choice(MIXTURE), split)[0]) for _ in range(count)]


def sum_task(rng: random.Random, low: int, high: int, held_out: bool) -> Task:
    """A sum or difference of numbers in a range; one pair of operands in eight is held out."""
    while True:
        sign = rng.choice("+-")
        a, b = rng.randint(low, high), rng.randint(low, high)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        result = OPERATIONS[sign](a, b)
        pair = f"{min(a, b)},{max(a, b)}"
        if (stable_hash(pair) % 8 == 0) == held_out and result not in (a, b):
            break
    problem: Problem = (a, sign, b)
    prompt = rng.choice(ARITHMETIC_PROMPTS).format(a=a, b=b, sign=sign, word=WORDS[sign])
    return Task("arithmetic", prompt, worked(problem), {"a": a, "operation": sign, "b": b, "result": result})


def tool_row(rng: random.Random) -> Row:
    """A conversation with the calculator at hand: a sum of three digits by a call, or something else without."""
    if rng.random() < 0.2:
        row = row_of(draw_tasks(rng, rng.choice(("reorder", "question")), "train"))
        return row | {"tools": [CALCULATOR]}
    task = sum_task(rng, 100, 999, held_out=False)
    a, sign, b, result = (task.check[key] for key in ("a", "operation", "b", "result"))
    call = {"name": "calculator", "arguments": {"expression": f"{a} {sign} {b}"}}
    messages = [
        task.messages[0],
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": str(result)},
        {"role": "assistant", "content": f"{a} {sign} {b} = {result}."},
    ]
    return {"messages": messages, "tools": [CALCULATOR]}


def make_more(seed: int) -> dict[str, list[Row]]:
    """The rows of every file, from a generator of its own each."""
    rng = {name: random.Random(f"{seed} {name}") for name in (*COUNTS, *TOOL_ROWS, *WORKED_ROWS)}
    tests = [sum_task(rng["tools_test"], 100, 999, held_out=True) for _ in range(TOOL_ROWS["tools_test"])]
    return {
        "prompts": instructions(rng["prompts"], "train", COUNTS["prompts"]),
        "more_test": instructions(rng["more_test"], "test", COUNTS["more_test"]),
        "large_sums": [marked(sum_task(rng["large_sums"], 50, 99, False)) for _ in range(COUNTS["large_sums"])],
        "large_sums_test": [
            marked(sum_task(rng["large_sums_test"], 50, 99, True)) for _ in range(COUNTS["large_sums_test"])
        ],
        "sft_large_sums": [
            row_of([sum_task(rng["sft_large_sums"], 50, 99, False) for _ in range(rng["sft_large_sums"].randint(1, 6))])
            for _ in range(WORKED_ROWS["sft_large_sums"])
        ],
        "sft_tools": [tool_row(rng["sft_tools"]) for _ in range(TOOL_ROWS["sft_tools"])],
        "tools_test": [{"prompt": task.messages[0]["content"], "result": task.check["result"]} for task in tests],
    }


def write_more(out: Path, seed: int = 0) -> None:
    """Make every file."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_more(seed).items():
        (out / f"{name}.jsonl").write_text(as_lines(rows), encoding="utf-8")


def as_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files that the stages after SFT learn from.")
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other files (default 0)")
    options = parser.parse_args()
    write_more(options.out, options.seed)
    print(f"written to {options.out}: {', '.join((*COUNTS, *TOOL_ROWS, *WORKED_ROWS))}")


if __name__ == "__main__":
    main()
