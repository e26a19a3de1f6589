"""Fixtures shared by all tests: a tiny tokenizer, and a way to write small data files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import CHATS, MODEL, STORIES

from minimoe import failpoints
from minimoe.bpe import train_bpe
from minimoe.config import DataConfig, PretrainRun, SftRun
from minimoe.tokenizer import load_tokenizer

os.environ["MINIMOE_REPORT"] = "off"  # of hundreds of runs; test_report.py has one that keeps it

SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "Once upon a time there was a small boat that wanted to see the sea.",
    "What is 3 + 4? It is 7, and 7 + 8 is 15.",
    "The boat said hello to the cat, and the cat said hello to the boat.\n\nThey went home.",
    "Grüße aus München, naïve café: 日本語 😀",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take long too, as scripts/test.sh does")
    parser.addoption("--all", action="store_true", help="and those that only run on demand")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    everything = config.getoption("--all")
    for item in items:
        if item.get_closest_marker("long") and not (everything or config.getoption("--long")):
            item.add_marker(pytest.mark.skip(reason="takes long: pytest --long, or scripts/test.sh"))
        if item.get_closest_marker("on_demand") and not everything:
            item.add_marker(pytest.mark.skip(reason="runs on demand: pytest --all"))


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(SENTENCES * 4), vocab_size=400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_dir: Path):
    return load_tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def switch_on(monkeypatch) -> Callable[[str], None]:
    """Switch failpoints on for this test, their passages counted from here."""

    def switch(spec: str) -> None:
        failpoints.passages.clear()
        monkeypatch.setenv(failpoints.VARIABLE, spec)

    return switch


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A DataConfig whose cache is in the test's folder."""

    def make(train: Any, **values: Any) -> DataConfig:
        defaults = {"cache_dir": str(tmp_path / "cache"), "sequence_length": 32, "num_processes": 1}
        return DataConfig.model_validate(defaults | {"train": train} | values)

    return make


@pytest.fixture
def pretrain_config(tmp_path, write_jsonl, tiny_tokenizer_dir):
    data = write_jsonl([{"text": text} for text in STORIES], "stories.jsonl")

    def make(output: str = "run", model: dict | None = None, **train) -> PretrainRun:
        values = {
            "output_dir": str(tmp_path / output),
            "tokenizer": str(tiny_tokenizer_dir),
            "model": MODEL | (model or {}),
            "data": {
                "train": str(data),
                "validation_fraction": 0.2,
                "sequence_length": 32,
                "cache_dir": str(tmp_path / "cache"),
            },
            "optimizer": {"lr": 0.02},
            "train": {
                "max_steps": 6,
                "batch_size": 4,
                "precision": "fp32",
                "log_every": 1,
                "eval_every": 3,
                "save_every": 2,
            }
            | train,
        }
        return PretrainRun.model_validate(values)

    return make


@pytest.fixture
def sft_config(tmp_path, write_jsonl):
    data = write_jsonl(CHATS, "chats.jsonl")

    def make(init_from: Path, output: str = "sft", **train) -> SftRun:
        values = {
            "output_dir": str(tmp_path / output),
            "init_from": str(init_from),
            "data": {
                "train": str(data),
                "validation_fraction": 0,
                "sequence_length": 32,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"max_steps": 6, "batch_size": 4, "precision": "fp32", "log_every": 1, "save_every": 2} | train,
        }
        return SftRun.model_validate(values)

    return make
