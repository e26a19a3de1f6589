"""Three systems that train the same kind of small model: minimoe, `transformers.Trainer`, `accelerate`.

Each trains on the CPU, single-threaded, with AdamW, and is used as its documentation recommends: the Trainer with
`save_strategy="steps"` and `resume_from_checkpoint=True`; accelerate as in its checkpointing example (`save_state` to
`step_N`, the newest folder by time, `load_state`, `skip_first_batches`), with its seedable sampler.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.chaos.lab import Lab
from scripts.chaos.processes import minimoe_command, start, wait

# What the server imports before the first process is forked
PRELOADED = "minimoe.train.pretrain accelerate transformers.trainer transformers.models.llama.modeling_llama".split()

STEPS, SAVE_EVERY, EPOCH_STEPS, BATCH, LENGTH, VOCABULARY, LR = 24, 6, 10, 2, 16, 2048, 1e-3


def train_with_minimoe(config: Path, folder: Path, resume: bool, dropout: float) -> None:
    words = ["pretrain", str(config), f"output_dir={folder}", f"model.attention_dropout={dropout}"]
    minimoe_command([*words, "optimizer.name=adamw", f"optimizer.lr={LR}", *(["--resume"] if resume else [])])


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
        return start(self.body, folder, resume, dropout, log=self.log)

    def finish(self, folder: Path, resume: bool = False, dropout: float = 0.0) -> dict[str, Any]:
        """Run to the end; what came of it."""
        status = wait(self.start(folder, resume, dropout))
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


def systems(root: Path) -> list[System]:
    """The three, each with about 2.5 million parameters."""
    model = {"hidden_size": 256, "num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 128}
    train: dict[str, Any] = {
        "max_steps": STEPS,
        "save_every": SAVE_EVERY,
        "batch_size": BATCH,
        "eval_every": STEPS,
        "keep_last": 3,
    }
    config = Lab(root / "lab").pretrain("peer", model=model, **train).config
    step, temporary = "checkpoints/step-{:08d}", "checkpoints/.writing-step-{:08d}"
    ours = partial(train_with_minimoe, config)
    log = root / "log"
    return [
        System("minimoe", ours, log, step, temporary, "manifest.json"),
        System("transformers.Trainer", train_with_trainer, log, "checkpoint-{}", "checkpoint-{}", "trainer_state.json"),
        System("accelerate", train_with_accelerate, log, "step_{}", "step_{}", "random_states_0.pkl"),
    ]
