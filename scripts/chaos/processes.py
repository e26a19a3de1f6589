"""Training commands as real processes that can be killed.

Importing torch and transformers takes seconds and a hundred kills need a hundred starts, so processes are forked from
a server (multiprocessing's) that has imported everything and done nothing else. It has run no tensor operation, so
OpenMP, whose threads would not survive a fork, has started none.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from minimoe import cli

PATIENCE = 120.0  # seconds after which a process counts as hanging

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "minimoe.train.pretrain", "minimoe.train.sft"])


def wait(process: BaseProcess, seconds: float = PATIENCE) -> int:
    """Exit status of a process; one that hangs is killed and is a failure."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"process {process.pid} did not end within {seconds:.0f} s")
    return process.exitcode


def start(
    body: Callable[..., None],
    *arguments: Any,
    log: Path,
    env: Mapping[str, str] | None = None,
    file_bytes: int | None = None,
    daemon: bool = True,
) -> BaseProcess:
    """Run a function in a forked process, on one thread, with its output appended to `log`.

    Args:
        daemon: it ends with the harness, should that fail, and may start no processes of its own.
    """
    arguments = (body, arguments, log, dict(env or {}), file_bytes)
    process = SERVER.Process(target=_forked, args=arguments, daemon=daemon)
    process.start()
    return process


def _forked(
    body: Callable[..., None], arguments: tuple[Any, ...], log: Path, env: dict[str, str], file_bytes: int | None
) -> None:
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(env)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    torch.set_num_threads(1)
    body(*arguments)


def minimoe_command(words: list[str]) -> None:
    """The `minimoe` command itself."""
    sys.argv = ["minimoe", *words]
    cli.main()
