"""Worker of a test: trains configs one after the other, alone or as one of several gloo processes."""

from __future__ import annotations

import importlib
import sys

from minimoe.config.file import TRAINING_RUNS, load_config


def main(*words: str) -> None:
    for stage, path in zip(words[::2], words[1::2], strict=True):
        config = load_config(TRAINING_RUNS[stage], path)
        importlib.import_module(f"minimoe.train.{stage}").run(config, overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
