"""`python -m scripts.scale.corpus`, alone or under torchrun: train on a corpus that is larger than memory may be.

The corpus is made of random tokens, as tokenising that much text would take an hour: the shard is written as
`minimoe.data.shards` writes it, into a cache folder of its own. Each rank says what memory it took.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch.distributed as dist

from minimoe.bpe import train_bpe
from minimoe.config import PretrainRun
from minimoe.config.file import load_config
from minimoe.data import shards
from minimoe.tokenizer import load_tokenizer
from minimoe.train import pretrain

_DOCUMENT = 500  # tokens of a document, on average
_BLOCK = 20_000  # documents written at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of tokens, two bytes each")
    parser.add_argument("--out", type=Path, default=Path("runs/corpus"))
    arguments = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config = prepare(arguments.out, arguments.gigabytes, world, rank)
    peak = Peak()
    started = time.monotonic()
    with peak:
        pretrain.run(config, overwrite=True)
    lines = f"rank {rank}: at most {peak.own / 1e6:,.0f} MB of its own, {time.monotonic() - started:.0f} s"
    print(f"{lines}; with the pages of the corpus that it looked at {peak.resident / 1e6:,.0f} MB", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def prepare(out: Path, gigabytes: float, world: int, rank: int) -> PretrainRun:
    """The config of a few steps, and its corpus in the cache: made once, by the first rank."""
    text, tokenizer, ready = out / "text.jsonl", out / "tokenizer", out / f"ready-{gigabytes:g}"
    values = {
        "output_dir": str(out / "run"),
        "tokenizer": str(tokenizer),
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"num_experts": 8, "moe_intermediate_size": 64},
        "data": {"train": str(text), "sequence_length": 512, "cache_dir": str(out / "cache")},
        "train": {"max_steps": 50, "batch_size": 8, "precision": "fp32", "save_every": 25},
    } | ({"parallel": {}} if world > 1 else {})
    file = out / f"config-{world}.yaml"
    if rank == 0 and not ready.exists():
        out.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(json.dumps({"text": f"a text of number {n}"}) + "\n" for n in range(300)))
        train_bpe(iter([f"a text of number {n}" for n in range(300)]), 300).save_pretrained(tokenizer)
    if rank == 0:
        file.write_text(json.dumps(values))
    while rank and not (file.exists() and ready.exists()):
        time.sleep(1)
    config = load_config(PretrainRun, file)
    if rank == 0 and not ready.exists():
        write(config, int(gigabytes * 1e9 / 2))
        ready.touch()
    return config


def write(config: PretrainRun, num_tokens: int) -> None:
    """A shard of so many random tokens, under the name that the config's own source has in the cache."""
    tokenizer = load_tokenizer(config.tokenizer_source)
    (source,) = config.data.train
    fingerprint = shards._fingerprint(source, config.data, tokenizer, config.encoding)
    folder = Path(str(config.data.cache_dir)) / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    rng, documents, total = np.random.default_rng(0), 0, 0
    names = ("tokens.bin", "offsets.bin", "num_bytes.bin")
    with ExitStack() as files:
        tokens, offsets, num_bytes = (files.enter_context((folder / name).open("wb")) for name in names)
        np.zeros(1, np.int64).tofile(offsets)
        while total < num_tokens:
            lengths = rng.integers(2, 2 * _DOCUMENT, _BLOCK)
            rng.integers(0, len(tokenizer), int(lengths.sum()), np.uint16).tofile(tokens)
            (total + np.cumsum(lengths)).astype(np.int64).tofile(offsets)
            (4 * lengths).astype(np.int64).tofile(num_bytes)
            documents, total = documents + len(lengths), total + int(lengths.sum())
    counts = dict.fromkeys(("truncated", "dropped", "bad_rows", "empty_rows"), 0)
    counts |= {"documents": documents, "tokens": total, "bytes": 4 * total}
    sizes = {name: (folder / name).stat().st_size for name in names}
    meta = {"dtype": "uint16", "learned": False, "counts": counts, "ignored": {}, "sizes": sizes}
    (folder / "meta.json").write_text(json.dumps(meta))


class Peak:
    """The most memory this process took, looked at twenty times a second: its own, and with pages of files."""

    def __enter__(self) -> Peak:
        self.own = self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
            self.own, self.resident = max(self.own, sizes["RssAnon"]), max(self.resident, sizes["VmRSS"])


if __name__ == "__main__":
    main()
