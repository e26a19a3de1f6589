"""Worker of a test: trains configs one after the other, alone or as one of several gloo processes.

With LIMIT_RANK and LIMIT_BYTES no file of that rank may be longer, as if its disk were full.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
from functools import partial

from transformers.distributed import fsdp

from minimoe.config.file import TRAINING_RUNS, load_config
from minimoe.train import optim, parallel


def main(*words: str) -> None:
    # Directions of bf16 differ by 1e-3 where gradients differ by 1e-8, and would hide what is compared.
    optim.has_bf16 = lambda device: False
    # On a CPU, nothing is offloaded by going the same way: there is no GPU for which memory could be pinned.
    parallel.begin_offload = lambda *_: None
    fsdp.CPUOffloadPolicy = partial(fsdp.CPUOffloadPolicy, pin_memory=False)
    if os.environ.get("LIMIT_RANK") == os.environ.get("RANK"):
        limit = int(os.environ.get("LIMIT_BYTES", resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    resume = words[0] == "--resume"
    words = words[1:] if resume else words
    for stage, path in zip(words[::2], words[1::2], strict=True):
        config = load_config(TRAINING_RUNS[stage], path)
        importlib.import_module(f"minimoe.train.{stage}").run(config, resume=resume, overwrite=not resume)


if __name__ == "__main__":
    main(*sys.argv[1:])
