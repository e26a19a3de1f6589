"""Scores a fine-tuned quickstart model: does it follow 200 instructions it has never seen?

Every instruction of `test.jsonl` is answered greedily and marked by `instructions.check_answer`. With
`--pretrained`, the bits per byte of the held-out documents are shown beside those of `xz -9` on the same
texts, a compressor that learns each file from nothing: a yardstick, not a rival.

    python -m scripts.quickstart.score --model runs/quickstart/sft/final --out runs/quickstart/score.json
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from scripts.quickstart.instructions import CHECKS, check_answer

PARTS = ("stories", "english", "code")
MAX_NEW_TOKENS = 256  # the longest stories of the world take about 170 tokens

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_all(model_dir: str, tests: list[Row], device: str) -> list[Row]:
    """The test rows with the model's answer and its mark."""
    from minimoe.config import GenerationSection
    from minimoe.generation.engine import Engine

    engine = Engine.from_pretrained(model_dir, device=device)
    settings = GenerationSection(chat=True, temperature=0, max_new_tokens=MAX_NEW_TOKENS, batch_size=32)
    completions = engine.generate([row["messages"] for row in tests], settings)
    answers = [completion.text for completion in completions]
    return [
        {**row, "answer": answer, "correct": check_answer(row, answer)}
        for row, answer in zip(tests, answers, strict=True)
    ]


def count_correct(answered: list[Row]) -> dict[str, Any]:
    """Per task and over all: how many were asked and how many answers the checker accepted."""
    tasks = {
        task: {
            "correct": sum(row["correct"] for row in answered if row["task"] == task),
            "total": sum(row["task"] == task for row in answered),
        }
        for task in CHECKS
    }
    correct = sum(counts["correct"] for counts in tasks.values())
    return {"tasks": tasks, "correct": correct, "total": len(answered), "share": correct / len(answered)}


def bits_per_byte(model_dir: str, data: Path, device: str) -> dict[str, dict[str, float]]:
    """Of the model and of xz, for the held-out documents of each part."""
    from minimoe.evaluate.perplexity import evaluate_source

    result = {}
    for part in PARTS:
        path = data / f"valid_{part}.jsonl"
        evaluation = evaluate_source(model_dir, str(path), device=device)
        # The bytes the model is scored on: the texts, without the JSON around them.
        text = "\n".join(row["text"] for row in read_rows(path)).encode()
        compressed = len(lzma.compress(text, preset=9))
        result[part] = {
            "model": evaluation.bits_per_byte,
            "xz": 8 * compressed / len(text),
            "perplexity": evaluation.perplexity,
            "num_bytes": evaluation.num_bytes,
        }
    return result


def examples(answered: list[Row]) -> tuple[Row, list[Row]]:
    """The first accepted story, or else the first one, and one answer of each other task, good or bad."""
    stories = [row for row in answered if row["task"] == "story"]
    story = next((row for row in stories if row["correct"]), stories[0])
    others = [next(row for row in answered if row["task"] == task) for task in CHECKS if task != "story"]
    return story, others


def show(console: Console, report: Row) -> None:
    story = report["story"]
    console.print(Text(story["messages"][0]["content"], style="dim"))
    console.print(Panel(Text(story["answer"])))
    for row in report["instructions"]:
        tick = "[green]✓[/]" if row["correct"] else "[red]✗[/]"
        console.print(Text(row["messages"][0]["content"], style="dim"))
        console.print(tick, Text(row["answer"]), "\n")
    score = report["score"]
    table = Table("task", "followed", "of", "share", title="Held-out instructions")
    for task, counts in score["tasks"].items():
        share = counts["correct"] / max(counts["total"], 1)
        table.add_row(task, str(counts["correct"]), str(counts["total"]), f"{share:.1%}")
    console.print(table)
    if report["bits_per_byte"]:
        table = Table("part", "model", "xz -9", title="Held-out bits per byte")
        for part, values in report["bits_per_byte"].items():
            table.add_row(part, f"{values['model']:.3f}", f"{values['xz']:.3f}")
        console.print(table)
    console.print(
        f"{score['correct']} of {score['total']} held-out instructions followed: {score['share']:.1%}",
        style="bold",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a quickstart model on its held-out instructions.")
    parser.add_argument("--model", required=True, help="folder of the fine-tuned model")
    parser.add_argument("--pretrained", help="folder of the pretrained model; adds bits per byte")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="folder of the corpus")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", type=Path, help="JSON file for the score, all answers included")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    tests = arguments.data / "test.jsonl"
    if not tests.exists():
        parser.error(f"{tests} not found; make it with: python -m scripts.quickstart.make_data")
    answered = answer_all(arguments.model, read_rows(tests), arguments.device)
    story, instructions = examples(answered)
    report = {
        "score": count_correct(answered),
        "bits_per_byte": (
            bits_per_byte(arguments.pretrained, arguments.data, arguments.device) if arguments.pretrained else {}
        ),
        "story": story,
        "instructions": instructions,
        "answers": answered,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(Console(), report)


if __name__ == "__main__":
    main()
