"""The same three accidents for minimoe, `transformers.Trainer` and `accelerate`: what is lost, and who notices?

1. SIGKILL at a random instant while the second checkpoint is being written, then resume.
2. One flipped bit in one file of the newest checkpoint, for every file, then resume.
3. The disk fills up while the second checkpoint is written; then there is room again, and resume.

Each system trains a small model of the same kind on the CPU, single-threaded, with AdamW, and is used as its
documentation recommends: the Trainer with `save_strategy="steps"` and `resume_from_checkpoint=True`; accelerate as in
its checkpointing example (`save_state` to `step_N`, the newest folder by time, `load_state`, `skip_first_batches`),
with its seedable sampler. A run counts as unharmed when its final weights have the SHA-256 of an undisturbed run's.
Prints the table as Markdown. About 4 minutes on 2 cores; the small disk needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from chaos_report import peers_table

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import chaos  # type: ignore[import-not-found]

chaos.SERVER.set_forkserver_preload(
    [
        "pytest",
        "minimoe.train.pretrain",
        "accelerate",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
    ]
)

STEPS, SAVE_EVERY, EPOCH_STEPS, BATCH, LENGTH, VOCABULARY, LR = 24, 6, 10, 2, 16, 2048, 1e-3
# Number, in order of saving, of the checkpoint that the accidents happen to; the one before is there to fall back on.
SECOND = 2 * SAVE_EVERY


def train_with_minimoe(config: Path, folder: Path, resume: bool, dropout: float) -> None:
    words = ["pretrain", str(config), f"output_dir={folder}", f"model.attention_dropout={dropout}"]
    chaos.minimoe_command([*words, "optimizer.name=adamw", f"optimizer.lr={LR}", *(["--resume"] if resume else [])])


def train_with_trainer(folder: Path, resume: bool, dropout: float) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class SayStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(f"resuming from {state.global_step}")

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        save_total_limit=3,
        seed=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    trainer = Trainer(_llama(dropout), arguments, train_dataset=_dataset(), callbacks=[SayStart()])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))


def train_with_accelerate(folder: Path, resume: bool, dropout: float) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(0)
    model = _llama(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    loader: Any = torch.utils.data.DataLoader(_dataset(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    step = 0
    if resume:
        newest = max(folder.glob("step_*"), key=os.path.getctime)
        accelerator.load_state(str(newest))
        step = int(newest.name.removeprefix("step_"))
    print(f"resuming from {step}")
    model.train()
    epoch, done = divmod(step, len(loader))
    while step < STEPS:
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, done) if done else loader:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % SAVE_EVERY == 0:
                accelerator.save_state(str(folder / f"step_{step}"))
            if step == STEPS:
                break
        epoch, done = epoch + 1, 0
    accelerator.unwrap_model(model).save_pretrained(folder / "final")


def _llama(dropout: float) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_dropout=dropout,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _dataset() -> Any:
    ids = torch.randint(VOCABULARY, (EPOCH_STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


@dataclass(frozen=True)
class System:
    """One of the three, and where it puts things."""

    name: str
    body: Callable[[Path, bool, float], None]  # trains in a folder, from the start or resumed, with this dropout
    log: Path
    checkpoint: str  # folder of the checkpoint of a step
    writing: str  # where it is written to
    last_file: str  # of a checkpoint: with it, all of it is there

    def start(self, folder: Path, resume: bool, dropout: float) -> Any:
        """Its process."""
        self.log.unlink(missing_ok=True)
        return chaos.start(self.body, folder, resume, dropout, log=self.log)

    def finish(self, folder: Path, resume: bool = False, dropout: float = 0.0) -> dict[str, Any]:
        """Run to the end; what came of it."""
        status = chaos.wait(self.start(folder, resume, dropout))
        text = self.log.read_text(encoding="utf-8", errors="replace")
        starts = re.findall(r"resuming from (?:\S*step-0*)?(\d+)", text)
        final = folder / "final" / "model.safetensors"
        return {
            "status": status,
            "resumed_from": int(starts[-1]) if starts else None,
            "sha256": hashlib.sha256(final.read_bytes()).hexdigest() if status == 0 else None,
            "message": _message(text) if status else None,
        }

    def complete(self, folder: Path, step: int) -> bool:
        return (folder / self.checkpoint.format(step) / self.last_file).exists()


def _message(log: str) -> str:
    """The error in what a process printed: minimoe's `error: ...`, or the last line of a traceback."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(" ")]
    ours = [line for line in lines if line.startswith("error: ")]
    return (ours or lines or ["no output"])[-1][:200]


def kills_while_saving(system: System, root: Path, trials: int, rng: random.Random, sha: str) -> dict[str, Any]:
    """Kill at a random instant of the second save, resume, and see what comes out."""
    window = _save_seconds(system, root / "timed")
    outcomes: list[dict[str, Any]] = []
    while len(outcomes) < trials:
        folder = root / f"kill-{len(outcomes)}"
        process = system.start(folder, False, 0.0)
        _wait_for(folder / system.writing.format(SECOND), process)
        time.sleep(rng.uniform(0, window))
        process.kill()
        chaos.wait(process)
        torn = not system.complete(folder, SECOND)
        outcome = system.finish(folder, resume=True) | {"torn": torn}
        outcomes.append(outcome | {"verdict": _verdict(outcome, sha)})
        shutil.rmtree(folder)
    return {"window_seconds": window, "trials": outcomes}


def flipped_bits(system: System, root: Path, whole: Path, flips: int, rng: random.Random, sha: str) -> list[Any]:
    """In every file of the newest of two checkpoints: is the damage seen?"""
    outcomes = []
    newest = STEPS - SAVE_EVERY
    start = _cut_back(system, whole, root / "cut", newest)
    for name in sorted(path.name for path in (start / system.checkpoint.format(newest)).iterdir()):
        for _ in range(flips):
            folder = root / "flipped"
            shutil.copytree(start, folder)
            file = folder / system.checkpoint.format(newest) / name
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
            _touch(file.parent)
            outcome = system.finish(folder, resume=True)
            noticed = outcome["status"] != 0 or outcome["resumed_from"] != newest
            outcomes.append({"file": name, "noticed": noticed, "verdict": _verdict(outcome, sha)} | outcome)
            shutil.rmtree(folder)
    return outcomes


def full_disks(system: System, root: Path, whole: Path, sha: str) -> list[Any]:
    """Room for one checkpoint and a part of the second; later there is room enough. Empty where nobody may mount."""
    outcomes: list[Any] = []
    size = _size(whole / system.checkpoint.format(STEPS))
    for part in (0.1, 0.4, 0.7, 0.95):
        disk = root / f"disk-{part}"
        folder = disk / "run"
        try:
            with chaos.small_disk(disk, int((1 + part) * size) + (64 << 10)) as grow:
                full = system.finish(folder)
                torn = [folder / name.format(SECOND) for name in (system.checkpoint, system.writing)]
                left = [str(path.relative_to(folder)) for path in torn if path.exists()]
                grow(12 * size)
                resumed = system.finish(folder, resume=True)
        except PermissionError as error:
            print(error, file=sys.stderr)
            return []
        verdict = _verdict(resumed, sha)
        outcomes.append(resumed | {"room": part, "full": full, "left": left, "verdict": verdict})
    return outcomes


def exactness(system: System, root: Path, whole: Path, sha: str, dropout: float) -> bool:
    """Whether a run resumed in the middle of an epoch ends with an undisturbed run's weights."""
    start = _cut_back(system, whole, root / f"exact-{dropout}", STEPS - SAVE_EVERY)
    return system.finish(start, resume=True, dropout=dropout)["sha256"] == sha


def _verdict(outcome: dict[str, Any], sha: str) -> str:
    if outcome["status"]:
        return "stopped"
    return "unharmed" if outcome["sha256"] == sha else "other weights"


def _cut_back(system: System, whole: Path, folder: Path, step: int) -> Path:
    """A copy of a finished run as it was when it had saved `step`."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / system.checkpoint.format(STEPS))
    for later in range(step + SAVE_EVERY, STEPS, SAVE_EVERY):
        shutil.rmtree(folder / system.checkpoint.format(later), ignore_errors=True)
    _touch(folder / system.checkpoint.format(step))
    return folder


def _touch(checkpoint: Path) -> None:
    """Make it the newest by time, which copying does not keep."""
    os.utime(checkpoint)


def _save_seconds(system: System, folder: Path) -> float:
    """How long a save takes, from its folder to its last file."""
    process = system.start(folder, False, 0.0)
    _wait_for(folder / system.writing.format(SECOND), process)
    started = time.monotonic()
    _wait_for(folder / system.checkpoint.format(SECOND) / system.last_file, process)
    seconds = time.monotonic() - started
    process.kill()
    chaos.wait(process)
    return seconds


def _wait_for(path: Path, process: Any) -> None:
    while not path.exists():
        if process.exitcode is not None:
            raise SystemExit(f"{path} did not appear, the process ended with {process.exitcode}")
        time.sleep(0.0005)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def systems(root: Path) -> list[System]:
    """The three, each with about 2.5 million parameters."""
    model = {"hidden_size": 256, "num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 128}
    train = {"max_steps": STEPS, "save_every": SAVE_EVERY, "batch_size": BATCH, "eval_every": STEPS, "keep_last": 3}
    config = chaos.Lab(root / "lab").pretrain("peer", model=model, **train).config
    step, temporary = "checkpoints/step-{:08d}", "checkpoints/.writing-step-{:08d}"
    ours = partial(train_with_minimoe, config)
    log = root / "log"
    return [
        System("minimoe", ours, log, step, temporary, "manifest.json"),
        System("transformers.Trainer", train_with_trainer, log, "checkpoint-{}", "checkpoint-{}", "trainer_state.json"),
        System("accelerate", train_with_accelerate, log, "step_{}", "step_{}", "random_states_0.pkl"),
    ]


def examine(system: System, root: Path, trials: int, flips: int, seed: int) -> dict[str, Any]:
    """All accidents of one system."""
    rng = random.Random(seed)
    whole, with_dropout = root / "whole", root / "whole-dropout"
    system.finish(root / "warm-up")  # tokenised data is cached from here
    sha = system.finish(whole)["sha256"]
    dropped = system.finish(with_dropout, dropout=0.1)["sha256"]
    assert sha, system.log.read_text()
    return {
        "repeatable": system.finish(root / "again")["sha256"] == sha,
        "exact": exactness(system, root, whole, sha, 0.0),
        "exact_with_dropout": exactness(system, root, with_dropout, dropped, 0.1),
        "kills": kills_while_saving(system, root, trials, rng, sha),
        "flips": flipped_bits(system, root, whole, flips, rng, sha),
        "full_disks": full_disks(system, root, whole, sha),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="minimoe, transformers.Trainer and accelerate in the same accidents")
    parser.add_argument("--trials", type=int, default=12, help="kills while saving, for each system")
    parser.add_argument("--flips", type=int, default=3, help="flipped bits for each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for everything seen")
    options = parser.parse_args()
    packages = ("torch", "transformers", "accelerate", "safetensors")
    results: dict[str, Any] = {"versions": {name: version(name) for name in packages}, "systems": {}}
    with tempfile.TemporaryDirectory() as folder:
        for system in systems(Path(folder)):
            started = time.monotonic()
            root = Path(folder) / system.name
            root.mkdir()
            results["systems"][system.name] = examine(system, root, options.trials, options.flips, options.seed)
            print(f"{system.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(root)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(peers_table(results))


if __name__ == "__main__":
    main()
