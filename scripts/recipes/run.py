"""The recipes: each trains by the commands that a user has, and scores what came out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.quickstart.more_tasks import as_lines, write_more
from scripts.quickstart.sample_pairs import ANSWERS, PREFERENCE_PROMPTS, sample_pairs
from scripts.quickstart.score import answer_all, count_correct, read_rows

QUICKSTART, DATA, OUT = Path("runs/quickstart"), Path("data/quickstart"), Path("runs/recipes")
SFT, BASE = QUICKSTART / "sft" / "final", QUICKSTART / "pretrain" / "final"
CONFIGS = Path("configs/quickstart")

Figures = dict[str, float]


def minimoe(command: str, config: str, output: Path, seed: int, *overrides: str) -> float:
    """Train; returns the seconds of training that its metrics count."""
    words = [command, str(CONFIGS / config), f"output_dir={output}", f"seed={seed}", *overrides, "--overwrite"]
    subprocess.run([sys.executable, "-m", "minimoe.cli", *words], check=True, stdout=subprocess.DEVNULL)
    rows = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(rows[-1])["seconds"])


def share(model: Path, test: str) -> float:
    """Percent of the held-out instructions that the model follows."""
    answered = answer_all(str(model), read_rows(DATA / f"{test}.jsonl"), "cpu")
    return 100 * float(count_correct(answered)["share"])


def tools_share(model: Path, with_tools: bool) -> float:
    """Percent of three-digit sums answered, with the calculator or without."""
    from minimoe.config import GenerationSection
    from minimoe.generation.engine import Engine
    from minimoe.generation.tools import Toolbox, answer_with_tools

    rows = read_rows(DATA / "tools_test.jsonl")
    engine = Engine.from_pretrained(model, device="cpu")
    settings = GenerationSection(chat=True, temperature=0, max_new_tokens=96, batch_size=32)
    if with_tools:
        toolbox = Toolbox("calculator")
        asked: list[Any] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        texts = [last.text for _, last in answer_with_tools(engine, asked, settings, toolbox)]
        toolbox.end()
    else:
        texts = [completion.text for completion in engine.generate([row["prompt"] for row in rows], settings)]
    right = [text.rstrip(". \n").endswith(f" {row['result']}") for text, row in zip(texts, rows, strict=True)]
    return 100 * sum(right) / len(right)


def start(seed: int) -> Figures:
    """The SFT model that the others begin with."""
    return {
        "SFT, all tasks": share(SFT, "more_test"),
        "SFT, sums of 50 to 99": share(SFT, "large_sums_test"),
        "SFT, sums of three digits": tools_share(SFT, with_tools=False),
    }


def grpo(seed: int) -> Figures:
    """Rewards on all tasks."""
    seconds = minimoe("grpo", "grpo.yaml", OUT / "grpo", seed)
    return {"GRPO, all tasks": share(OUT / "grpo" / "final", "more_test"), "GRPO, seconds": seconds}


def grpo_sums(seed: int) -> Figures:
    """Rewards on a task that SFT hardly covers."""
    sums = ["data.train=data/quickstart/large_sums.jsonl", "grpo.max_new_tokens=48", "optimizer.lr=0.0003"]
    seconds = minimoe("grpo", "grpo.yaml", OUT / "grpo_sums", seed, *sums, "train.max_steps=150")
    return {
        "GRPO on sums, sums of 50 to 99": share(OUT / "grpo_sums" / "final", "large_sums_test"),
        "GRPO on sums, seconds": seconds,
    }


def early() -> Path:
    """An SFT model that has not learned all its tasks, made once: 800 steps instead of 1,150, from the same start."""
    folder = OUT / "early" / "final"
    if not folder.exists():
        minimoe("sft", "sft.yaml", OUT / "early", 0, f"train.max_steps={EARLY_STEPS}")
    return folder


def grpo_early(seed: int) -> Figures:
    """Rewards for a model that still has much to learn."""
    start = early()
    words = [f"init_from={start}", "optimizer.lr=0.0005", "train.max_steps=120"]
    seconds = minimoe("grpo", "grpo.yaml", OUT / "grpo_early", seed, *words)
    return {
        "early SFT, all tasks": share(start, "more_test"),
        "early SFT, then GRPO, all tasks": share(OUT / "grpo_early" / "final", "more_test"),
        "early SFT, then GRPO, seconds": seconds,
    }


def dpo_early(seed: int) -> Figures:
    """Preferences between the answers of the same model."""
    start = early()
    pairs = sample_pairs(str(start), read_rows(DATA / "prompts.jsonl")[:PREFERENCE_PROMPTS], ANSWERS, seed)
    (OUT / "preferences.jsonl").write_text(as_lines(pairs), encoding="utf-8")
    words = [f"init_from={start}", f"data.train={OUT / 'preferences.jsonl'}", "dpo.sft_weight=1"]
    seconds = minimoe("dpo", "dpo.yaml", OUT / "dpo_early", seed, *words, "optimizer.lr=0.0005", "train.epochs=4")
    return {
        "early SFT, then DPO, all tasks": share(OUT / "dpo_early" / "final", "more_test"),
        "early SFT, then DPO, pairs": len(pairs),
        "early SFT, then DPO, seconds": seconds,
    }


def dpo(seed: int) -> Figures:
    """Preferences between the model's own answers."""
    started = time.monotonic()
    pairs = sample_pairs(str(SFT), read_rows(DATA / "prompts.jsonl")[:PREFERENCE_PROMPTS], ANSWERS, seed)
    sampling = time.monotonic() - started
    (DATA / "preferences.jsonl").write_text(as_lines(pairs), encoding="utf-8")
    seconds = minimoe("dpo", "dpo.yaml", OUT / "dpo", seed)
    return {
        "DPO, all tasks": share(OUT / "dpo" / "final", "more_test"),
        "DPO, pairs": len(pairs),
        "DPO, seconds": seconds,
        "DPO, seconds of sampling": sampling,
    }


def lora(seed: int) -> Figures:
    """Sums of 50 to 99, learned by adapters and by all weights."""
    adapters = minimoe("sft", "lora.yaml", OUT / "lora", seed)
    full = minimoe("sft", "lora.yaml", OUT / "full", seed, "lora=null", "optimizer.lr=0.001")
    return {
        "LoRA, sums of 50 to 99": share(OUT / "lora" / "final", "large_sums_test"),
        "LoRA, seconds": adapters,
        "all weights, sums of 50 to 99": share(OUT / "full" / "final", "large_sums_test"),
        "all weights, seconds": full,
    }


def tools(seed: int) -> Figures:
    """Calls of a calculator."""
    seconds = minimoe("sft", "tools.yaml", OUT / "tools", seed)
    return {
        "tools, sums of three digits": tools_share(OUT / "tools" / "final", with_tools=True),
        "tools, seconds": seconds,
    }


def teacher() -> Path:
    """The quickstart's model after more SFT, made once."""
    folder = OUT / "teacher" / "final"
    if not folder.exists():
        minimoe("sft", "sft.yaml", OUT / "teacher", 0, f"init_from={SFT}", f"train.max_steps={TEACHER_STEPS}")
    return folder


def distil(seed: int) -> Figures:
    """A smaller model, fine-tuned alone and with a teacher, whose answers are computed in the first of two runs and
    read from the disk in the second."""
    small, taught, alone, said = OUT / "small" / "final", OUT / "distil", OUT / "twin", OUT / "said"
    shutil.rmtree(said, ignore_errors=True)
    minimoe("pretrain", "pretrain.yaml", OUT / "small", seed, *(f"model.{key}={value}" for key, value in SMALL.items()))
    answers = ["model=null", "distil.learn=answers", "data.train=data/quickstart/sft.jsonl"]
    answers += ["data.validation=data/quickstart/sft_valid.jsonl", f"distil.teacher={teacher()}", "distil.weight=0.7"]
    answers += ["distil.top_k=32", "distil.cache=true", f"data.cache_dir={said}"]

    def sft(steps: int) -> tuple[float, float]:
        seconds = minimoe("sft", "sft.yaml", alone, seed, f"init_from={small}", f"train.max_steps={steps}")
        return seconds, share(alone / "final", "more_test")

    steps = f"train.max_steps={SMALL_STEPS}"
    asked, read = (minimoe("distil", "distil.yaml", taught, seed, f"init_from={small}", *answers, steps) for _ in "12")
    seconds, score = sft(SMALL_STEPS)
    longer, longer_score = sft(round(SMALL_STEPS * read / seconds))
    longest, longest_score = sft(round(SMALL_STEPS * asked / seconds))
    return {
        "teacher, all tasks": share(teacher(), "more_test"),
        "half size with a teacher, all tasks": share(taught / "final", "more_test"),
        "half size with a teacher, seconds when asked": asked,
        "half size with a teacher, seconds when read": read,
        "half size alone, equal steps, all tasks": score,
        "half size alone, equal steps, seconds": seconds,
        "half size alone, seconds of reading, all tasks": longer_score,
        "half size alone, seconds of reading, seconds": longer,
        "half size alone, seconds of asking, all tasks": longest_score,
        "half size alone, seconds of asking, seconds": longest,
    }


SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "moe_intermediate_size": 96}
SMALL_STEPS = 600
TEACHER_STEPS = 1500
EARLY_STEPS = 800
RECIPES: dict[str, Callable[[int], Figures]] = {
    "start": start,
    "grpo": grpo,
    "grpo_sums": grpo_sums,
    "grpo_early": grpo_early,
    "dpo_early": dpo_early,
    "dpo": dpo,
    "lora": lora,
    "tools": tools,
    "distil": distil,
}


def prepare() -> None:
    """The files that the quickstart itself does not need."""
    write_more(DATA)
