"""SFT, then DPO, on rows of your own, beside TRL's trainer from the same weights in the same seconds.

    python -m scripts.recipes.preferences --base runs/quickstart/pretrain/final --sft SFT.jsonl --pairs PAIRS.jsonl

Both learn the same pairs in the same order of seeds, with the same loss, rate and precision; each is stopped after as
many seconds of training. Ours goes through more pairs in them, so a third run takes as many pairs as TRL did. A fifth
of the pairs is held out, and scored by one program: how often is the chosen answer ahead of the rejected one, compared
with the model that both began with? Chance is 50 %.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

OUT = Path("runs/recipes/preferences")
RATE, BETA, PAIRS_A_STEP, ROWS_A_STEP = 2e-4, 0.1, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="runs/quickstart/pretrain/final", help="model folder to fine-tune")
    parser.add_argument("--sft", required=True, help="conversations, in any form that SFT takes")
    parser.add_argument("--pairs", required=True, help="preferences, as jsonl with prompt, chosen and rejected")
    parser.add_argument("--sft-steps", type=int, default=300, help="of 4 rows of 512 tokens (default 300)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of DPO, for each (default 60)")
    parser.add_argument("--seeds", type=int, default=3, help="splits and runs (default 3)")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    start = OUT / "sft" / "final"
    if not start.exists():
        words = [f"init_from={options.base}", f"data.train={options.sft}", "data.validation_fraction=0.02"]
        words += [f"train.max_steps={options.sft_steps}", "data.on_bad_rows=skip", "train.sample_every=null"]
        minimoe("sft", "sft.yaml", OUT / "sft", *words)
    for seed in range(options.seeds):
        train, test = split(options.pairs, seed)
        figures: dict[str, Any] = {
            "seed": seed,
            "pairs": sum(1 for _ in train.open()),
            "held out": sum(1 for _ in test.open()),
        }
        ours, theirs = OUT / f"ours-{seed}", OUT / f"trl-{seed}"
        figures |= {"ours": learn(ours, start, train, options.seconds, seed)}
        figures |= {"trl": learn_by_trl(theirs, start, train, options.seconds, seed)}
        same = OUT / f"ours-same-pairs-{seed}"
        figures["ours, same pairs"] = learn_pairs(same, start, train, PAIRS_A_STEP * figures["trl"]["steps"], seed)
        for name, folder in (("ours", ours / "final"), ("ours, same pairs", same / "final"), ("trl", theirs)):
            figures[name] |= accuracy(folder, start, test)
        print(json.dumps(figures), flush=True)


def minimoe(command: str, config: str, output: Path, *overrides: str) -> None:
    words = [command, f"configs/quickstart/{config}", f"output_dir={output}", *overrides, "--overwrite"]
    subprocess.run([sys.executable, "-m", "minimoe.cli", *words], check=True, stdout=subprocess.DEVNULL)


def split(file: str, seed: int) -> tuple[Path, Path]:
    """Four fifths to learn from and one to be scored on, as files."""
    from minimoe.config import SourceConfig
    from minimoe.data.sources import read_rows

    rows = [row.values for row in read_rows(SourceConfig(path=file)) if hasattr(row, "values")]
    random.Random(seed).shuffle(rows)
    cut = len(rows) * 4 // 5
    paths = []
    for name, part in (("train", rows[:cut]), ("test", rows[cut:])):
        path = OUT / f"{name}-{seed}.jsonl"
        lines = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def learn(output: Path, start: Path, pairs: Path, seconds: float, seed: int) -> dict[str, float]:
    """By `minimoe dpo`: a run of 20 steps tells how many fit into the seconds, and if the machine is slower then or
    faster, the run after it does."""
    steps = 20
    for _ in range(4):
        last = take(output, start, pairs, steps, seed)
        if abs(last["seconds"] / seconds - 1) < 0.05:
            break
        steps = max(round(seconds * last["step"] / last["seconds"]), 1)
    return {"steps": last["step"], "seconds": round(last["seconds"], 1)}


def learn_pairs(output: Path, start: Path, pairs: Path, count: int, seed: int) -> dict[str, float]:
    """By `minimoe dpo`, so many pairs; their rows hold as many as fit."""
    take(output, start, pairs, 1, seed)
    rows = json.loads((output / "run.json").read_text(encoding="utf-8"))["rows_per_epoch"]
    total = sum(1 for _ in pairs.open(encoding="utf-8"))
    last = take(output, start, pairs, max(round(count * rows / total / ROWS_A_STEP), 1), seed)
    return {"steps": last["step"], "seconds": round(last["seconds"], 1)}


def take(output: Path, start: Path, pairs: Path, steps: int, seed: int) -> dict[str, Any]:
    """The last row of so many steps."""
    words = [f"init_from={start}", f"data.train={pairs}", f"optimizer.lr={RATE}", f"dpo.beta={BETA}", f"seed={seed}"]
    words += ["dpo.sft_weight=0", "data.validation_fraction=0", f"train.batch_size={ROWS_A_STEP}"]
    words += ["train.log_every=1", "train.save_every=100000", f"train.max_steps={steps}"]
    minimoe("dpo", "dpo.yaml", output, *words)
    return last_row(output)


def last_row(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def learn_by_trl(output: Path, start: Path, pairs: Path, seconds: float, seed: int) -> dict[str, float]:
    """By TRL's DPOTrainer, with its defaults but for what the two share; stopped after the seconds."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    import minimoe  # noqa: F401  (makes transformers know the architecture)
    from minimoe.loading import load_model

    model, tokenizer = load_model(start, "cpu")
    reference, _ = load_model(start, "cpu")
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    talks = [
        {
            "prompt": row["prompt"]
            if isinstance(row["prompt"], list)
            else [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]

    class Stop(TrainerCallback):
        """After so many seconds; the rate falls as ours does, by steps that a first stretch has told."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = time.monotonic() - self.started > seconds

    def trainer(steps: int, stop: bool) -> Any:
        arguments = DPOConfig(
            output_dir=str(output / "trl"),
            max_steps=steps,
            per_device_train_batch_size=PAIRS_A_STEP,
            learning_rate=RATE,
            warmup_steps=min(10, steps // 2),
            beta=BETA,
            max_length=512,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
        )
        return DPOTrainer(
            model, reference, args=arguments, train_dataset=Dataset.from_list(talks), processing_class=tokenizer,
            callbacks=[Stop()] if stop else [],
        )  # fmt: skip

    first = trainer(4, False)
    began = time.monotonic()
    first.train()
    steps = max(int(seconds / ((time.monotonic() - began) / 4)), 1)
    model.load_state_dict(reference.state_dict())
    second = trainer(steps, True)
    began = time.monotonic()
    second.train()
    spent = time.monotonic() - began
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {"steps": second.state.global_step, "seconds": round(spent, 1)}


def accuracy(folder: Path, start: Path, test: Path) -> dict[str, float]:
    """Of the model in a folder, compared with the one it began with."""
    from minimoe.config import DpoRun
    from minimoe.config.file import load_config
    from minimoe.data.loader import open_data
    from minimoe.loading import load_minimoe
    from minimoe.train.dpo import held_out_preferences, with_reference
    from minimoe.train.parallel import make_accelerator

    words = [f"init_from={start}", f"data.train={test}", "data.validation_fraction=0", f"dpo.beta={BETA}"]
    config = load_config(DpoRun, "configs/quickstart/dpo.yaml", [*words, f"data.validation={test}"])
    accelerator = make_accelerator(config.train)
    reference, tokenizer = load_minimoe(start, "cpu")
    pad = tokenizer.pad_token_id
    annotate = partial(with_reference, config=config, model=reference, pad_id=pad, accelerator=accelerator)
    data = open_data(config.data, tokenizer, "pairs", 0, annotate)
    model, _ = load_minimoe(folder, "cpu")
    found = held_out_preferences(config.dpo, model, data.validation, 8, accelerator, lambda: None).row
    return {"accuracy": round(100 * found["val_reward_accuracy"], 1), "margin": round(found["val_reward_margin"], 3)}


if __name__ == "__main__":
    main()
