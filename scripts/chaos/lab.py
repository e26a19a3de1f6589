"""A folder to experiment in: runs that take a few seconds, and what each comes to when nothing disturbs it."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from minimoe.bpe import train_bpe
from minimoe.train import checkpoint
from minimoe.train.metrics import CLOCK_FIELDS
from minimoe.train.snapshot import load_state
from scripts.chaos.processes import minimoe_command, start, wait

ANIMALS, PLACES = "cat dog bird fox mouse owl bear frog".split(), "sea moon hill lake barn mill farm pond".split()
STORIES = [f"The {animal} went to the {place} and came back." for animal, place in zip(ANIMALS, PLACES, strict=True)]
CHATS = [
    [{"role": "user", "content": f"Where is the {animal}?"}, {"role": "assistant", "content": f"At the {place}."}]
    for animal, place in zip(ANIMALS, PLACES, strict=True)
]
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Run:
    """A training command and the folder it writes to."""

    command: str  # pretrain or sft
    config: Path
    folder: Path
    save_every: int  # steps

    def to(self, folder: Path) -> Run:
        """The same training in another folder."""
        return replace(self, folder=folder)

    def start(self, *flags: str, env: Mapping[str, str] | None = None, file_bytes: int | None = None) -> BaseProcess:
        """Start it; what it prints goes to `log()`.

        Args:
            flags: e.g. `--resume`, or `key=value`.
            file_bytes: no file may grow beyond this, as on a disk that is full.
        """
        words = [self.command, str(self.config), f"output_dir={self.folder}", *flags]
        return start(minimoe_command, words, log=self._log, env=env, file_bytes=file_bytes)

    def finish(self, *flags: str, **how: Any) -> int:
        """Start it and wait for its exit status; negative is the signal that ended it."""
        return wait(self.start(*flags, **how))

    def log(self) -> str:
        """What its processes printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl without what depends on the clock; a torn last one is left out."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [{key: value for key, value in row.items() if key not in CLOCK_FIELDS} for row in rows]

    def step(self) -> int:
        """The last step it logged."""
        return max((row["step"] for row in self.rows()), default=0)

    def last_logged(self) -> int:
        """When the metrics changed last."""
        file = self.folder / "metrics.jsonl"
        return file.stat().st_mtime_ns if file.exists() else 0

    def saved_step(self) -> int:
        """The step it would resume from; a checkpoint that is there and cannot be trusted is a failure."""
        found, refused = checkpoint.latest(self.folder / "checkpoints")
        assert not refused, refused
        return load_state(found).step if found else 0

    def result(self) -> dict[str, Any]:
        """Everything that must not depend on how often it was interrupted."""
        (file,) = (self.folder / "final").glob("*model.safetensors")  # of a model, or of an adapter
        rollouts = self.folder / "rollouts.jsonl"
        content = file.read_bytes() + (rollouts.read_bytes() if rollouts.exists() else b"")
        return {"sha256": hashlib.sha256(content).hexdigest(), "rows": self.rows()}

    def leftovers(self) -> list[str]:
        """Temporary files and folders that a run should have removed."""
        patterns = (".writing*", "*.tmp")
        return [str(path) for pattern in patterns for path in self.folder.rglob(pattern)]

    def damaged(self) -> dict[str, str]:
        """Checkpoints that are there and cannot be trusted."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return {folder.name: reason for folder in folders if (reason := checkpoint.verify(folder))}

    @property
    def _log(self) -> Path:
        return self.config.parent / f"{self.folder.name}.log"


def letters(answer: str, row: Mapping[str, Any]) -> float:
    """A reward: the share of letters that the right answer has too."""
    return sum(letter in row["answer"] for letter in answer) / max(len(answer), 1)


class Lab:
    """A folder with a tokenizer, data, and configs of runs that take a few seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        train_bpe(iter(STORIES), vocab_size=300).save_pretrained(folder / "tokenizer")
        files: dict[str, list[Any]] = {
            "stories": [{"text": text} for text in STORIES],
            "chats": [{"messages": messages} for messages in CHATS],
            "preferences": [
                {"prompt": asked["content"], "chosen": answer["content"], "rejected": "I do not know."}
                for asked, answer in CHATS
            ],
            "prompts": [{"prompt": asked["content"], "answer": answer["content"]} for asked, answer in CHATS],
        }
        for name, rows in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def pretrain(self, name: str, *, dense: bool = False, model: Mapping[str, Any] | None = None, **train: Any) -> Run:
        """A pretraining run, by default with a sigmoid router whose selection bias moves."""
        model = MODEL | {"max_position_embeddings": 64} | dict(model or {})
        model |= {"attention_dropout": 0.1, "scoring_func": "sigmoid", "router_bias_update_rate": 0.01}
        model |= {"first_k_dense_replace": MODEL["num_hidden_layers"]} if dense else {}
        values = {"tokenizer": str(self.folder / "tokenizer"), "model": model}
        return self._run("pretrain", name, values, "stories", train)

    def sft(self, name: str, start: Run, **train: Any) -> Run:
        """A fine-tuning run of the final model of another."""
        return self._run("sft", name, {"init_from": str(start.folder / "final")}, "chats", train)

    def later(self, stage: str, name: str, start: Run, **train: Any) -> Run:
        """A run of a stage after SFT: lora, distil, dpo or grpo, from the final model of another."""
        base: dict[str, Any] = {"init_from": str(start.folder / "final")}
        if stage == "lora":
            return self._run("sft", name, base | {"lora": {}}, "chats", train)
        if stage == "distil":
            return self._run(
                "distil", name, {"model": MODEL, "distil": {"teacher": base["init_from"]}}, "stories", train
            )
        if stage == "dpo":
            return self._run("dpo", name, base | {"data": {"sequence_length": 64}}, "preferences", train)
        assert stage == "grpo"
        grpo = {"rewards": [{"function": "scripts.chaos.lab:letters"}], "group_size": 4, "max_new_tokens": 8}
        grpo["updates_per_rollout"] = 3  # a rollout is in the middle at most saves
        train = {"batch_size": 8} | train
        return self._run("grpo", name, base | {"grpo": grpo, "data": {"sequence_length": 64}}, "prompts", train)

    def _run(self, command: str, name: str, values: dict[str, Any], data: str, train: dict[str, Any]) -> Run:
        folder = self.folder / name
        more = values.pop("data", {})
        values |= {
            "output_dir": str(folder),
            "data": {
                "train": str(self.folder / f"{data}.jsonl"),
                "validation_fraction": 0.2,
                "sequence_length": 32,
                "num_processes": 1,
                "cache_dir": str(self.folder / "cache"),
            }
            | more,
            "train": {"max_steps": 8, "batch_size": 4, "precision": "fp32", "device": "cpu"}
            | {"log_every": 1, "eval_every": 5, "save_every": 4}
            | train,
        }
        config = self.folder / f"{name}.yaml"
        config.write_text(json.dumps(values), encoding="utf-8")  # which is YAML too
        return Run(command, config, folder, values["train"]["save_every"])


@dataclass(frozen=True)
class Reference:
    """What a run comes to when nothing disturbs it."""

    run: Run
    result: dict[str, Any]
    start_up: float  # seconds until the first step is logged
    interval: float  # seconds from a save to the next

    @classmethod
    def of(cls, run: Run) -> Reference:
        # Tokenises; the shards are cached from here.
        run.to(run.folder.with_name(f"{run.folder.name}-first")).finish("train.max_steps=1")
        started = time.monotonic()
        process = run.start()
        while process.is_alive() and not run.step():
            time.sleep(0.002)
        start_up = time.monotonic() - started
        assert wait(process) == 0, run.log()
        saves = run.step() / run.save_every
        return cls(run, run.result(), start_up, (time.monotonic() - started - start_up) / saves)

    def moment(self, rng: random.Random, in_start_up: bool) -> float:
        """Seconds after a start, or after the first step, at which to strike: up to three saves later."""
        return rng.uniform(0, self.start_up if in_start_up else 3 * self.interval)

    def check(self, run: Run) -> None:
        """`run`, however often it was interrupted, came to the same."""
        result = run.result()
        missing = [row for row in self.result["rows"] if row not in result["rows"]]
        surplus = [row for row in result["rows"] if row not in self.result["rows"]]
        assert result["rows"] == self.result["rows"], f"metrics.jsonl: {missing=}, {surplus=}"
        assert result["sha256"] == self.result["sha256"], "the final weights differ"
        assert not run.leftovers(), run.leftovers()
        assert not run.damaged(), run.damaged()
