"""Tiny whole runs: their data, their model, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimoe.cli import main
from minimoe.config.file import dump_config
from minimoe.train.metrics import CLOCK_FIELDS

STORIES = [
    f"The {animal} went to the {place} and found a {thing}."
    for animal, place, thing in [
        ("cat", "sea", "boat"),
        ("dog", "moon", "hat"),
        ("bird", "hill", "kite"),
        ("fox", "lake", "drum"),
        ("mouse", "barn", "bell"),
        ("owl", "mill", "lamp"),
        ("bear", "farm", "cake"),
        ("frog", "pond", "ring"),
    ]
]
CHATS = [
    {"messages": [{"role": "user", "content": f"Where is the {a}?"}, {"role": "assistant", "content": f"On the {b}."}]}
    for a, b in [("cat", "mat"), ("boat", "sea"), ("moon", "sky"), ("hat", "head"), ("bell", "barn"), ("kite", "hill")]
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


def rows(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def training_rows(folder: str | Path) -> list[dict]:
    """Rows of training steps without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows(folder) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:

    return load_file(folder / "model.safetensors")


def outcome(folder: str | Path) -> dict[str, object]:
    """All that a run leaves behind, without what depends on the clock."""
    folder = Path(folder)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    files = [file for place in (newest, folder / "final") for file in sorted(place.iterdir())]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files} | {
        "rows": [{key: value for key, value in row.items() if key not in CLOCK_FIELDS} for row in rows(folder)]
    }


def cut_back(folder: str | Path, step: int) -> Path:
    """Make a finished run one that was killed after its checkpoint of `step`; returns that checkpoint."""
    folder = Path(folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "final", ignore_errors=True)
    return folder / "checkpoints" / f"step-{step:08d}"


def run_command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["minimoe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def on_ranks(ranks: int, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """stages_on_ranks.py, alone or under torchrun."""
    worker = Path(__file__).with_name("stages_on_ranks.py")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(worker), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=worker.parent,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stderr[-5000:]
    return done


def write_yaml(path: Path, config) -> Path:

    path.write_text(dump_config(config), encoding="utf-8")
    return path
