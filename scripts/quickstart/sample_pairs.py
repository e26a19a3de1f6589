"""Preferences for `minimoe dpo`: right and wrong answers of the quickstart's model itself, told apart by a program.

python -m scripts.quickstart.sample_pairs --model runs/quickstart/sft/final
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from scripts.quickstart.instructions import check_answer
from scripts.quickstart.more_tasks import as_lines
from scripts.quickstart.score import read_rows

Row = dict[str, Any]
ANSWERS, PREFERENCE_PROMPTS = 8, 1500


def sample_pairs(model_dir: str, rows: list[Row], answers: int, seed: int) -> list[Row]:
    """For each prompt that the model answers both ways, pairs of a right and a wrong answer, no answer twice."""
    from minimoe.config import GenerationSection
    from minimoe.generation.engine import Engine

    engine = Engine.from_pretrained(model_dir, device="cpu")
    settings = GenerationSection(chat=True, temperature=1.0, top_p=1.0, max_new_tokens=160, batch_size=64, seed=seed)
    asked = [row["messages"] for row in rows for _ in range(answers)]
    texts = [completion.text for completion in engine.generate(asked, settings)]
    rng, pairs = random.Random(seed), []
    for number, row in enumerate(rows):
        given = list(dict.fromkeys(texts[number * answers : (number + 1) * answers]))
        right = [text for text in given if check_answer(row, text)]
        wrong = [text for text in given if text.strip() and not check_answer(row, text)]
        rng.shuffle(right)
        for chosen, rejected in zip(right, wrong, strict=False):
            pairs.append({"prompt": row["messages"], "chosen": chosen, "rejected": rejected})
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample pairs of a right and a wrong answer from a quickstart model.")
    parser.add_argument("--model", default="runs/quickstart/sft/final", help="folder of the fine-tuned model")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="folder of the corpus")
    parser.add_argument("--prompts", type=int, default=PREFERENCE_PROMPTS, help="prompts (default 1500: 90 s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    options = parser.parse_args()
    rows = read_rows(options.data / "prompts.jsonl")[: options.prompts]
    pairs = sample_pairs(options.model, rows, ANSWERS, options.seed)
    (options.data / "preferences.jsonl").write_text(as_lines(pairs), encoding="utf-8")
    print(f"{len(pairs):,} pairs from {len(rows):,} prompts, written to {options.data / 'preferences.jsonl'}")


if __name__ == "__main__":
    main()
