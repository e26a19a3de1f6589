"""The jobs that have no model: what the machine can do at most, and the way of the data."""

from __future__ import annotations

import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from minimoe.bpe import train_bpe
from minimoe.config import DataConfig, SourceConfig
from minimoe.data.loader import open_data
from scripts.benchmark.measure import Run, median_seconds
from scripts.benchmark.training import DTYPES, float32_by_onednn


def ceilings(device: str) -> Run:
    """Operations a second of a large matmul, bytes a second of a large copy and sum."""
    size = 2048 if device == "cpu" else 8192
    matrices = {name: torch.randn(size, size, device=device, dtype=dtype) for name, dtype in DTYPES.items()}
    source = torch.randn((64 if device == "cpu" else 1024) << 20, device=device)
    target = torch.empty_like(source)

    def run() -> dict[str, float]:
        with float32_by_onednn(device, size):
            figures = {n: 2 * size**3 / median_seconds(partial(torch.mm, m, m), device) for n, m in matrices.items()}
        figures["read"] = source.numel() * 4 / median_seconds(source.sum, device)
        figures["copy"] = 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), device)
        return figures

    return run


def data() -> Run:
    """Tokenise some megabytes of text, then read batches of packed rows."""
    words = [word for word in Path(__file__).read_text(encoding="utf-8").split() if word.isalpha()]
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(words, k=200)) for _ in range(4000)]  # some 4.5 MB

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            tokenizer = train_bpe(iter(texts[:500]), 2048)
            config = DataConfig(
                train=(SourceConfig(path=f"{folder}/text.jsonl"),),
                sequence_length=512,
                cache_dir=f"{folder}/cache",
                num_processes=1,
            )
            start = time.perf_counter()
            loader = open_data(config, tokenizer, "pretrain", seed=0).train
            tokenising = time.perf_counter() - start
            start = time.perf_counter()
            for step in range(100):
                loader.batch(step, 8)
            loading = time.perf_counter() - start
        return {
            "tokenised_mb_per_second": sum(map(len, texts)) / 1e6 / tokenising,
            "loader_tokens_per_second": 100 * 8 * 512 / loading,
        }

    return run
