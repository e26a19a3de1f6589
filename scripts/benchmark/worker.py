"""One subject in a process of its own: prepares its job, then does it once for each line of standard input.

    python -m scripts.benchmark.worker '{"module": "training", "job": "train_step", "checkout": "...", ...}'

Answers are lines of JSON: an empty one when it is prepared, then figures by name.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import minimoe
from scripts.benchmark.shapes import Shape


def work(request: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    loaded, wanted = Path(minimoe.__file__).resolve(), Path(request.pop("checkout")).resolve()
    assert loaded.is_relative_to(wanted), f"{loaded} is not of {wanted}"
    module = importlib.import_module(f"scripts.benchmark.{request.pop('module')}")
    if "shape" in request:
        request["shape"] = Shape(**request["shape"])
    if request.pop("watch", False):
        from minimoe import openmp

        openmp.watch()
    run = getattr(module, request.pop("job"))(**request)
    print(json.dumps({}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
