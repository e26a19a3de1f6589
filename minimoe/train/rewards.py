"""Rewards: Python functions of an answer and its row, called in a process of their own.

What users write may hang, crash or leak. There it costs one answer, and no run: a call that raises, gives no finite
number, or takes longer than its time is counted, and the process is started anew where it has to be.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from minimoe.config import RewardConfig
from minimoe.errors import UserError

START_SECONDS = 120.0  # to import the modules; they may import torch


class Rewards:
    """Context manager around the process.

    Args:
        rewards: the functions, with their weights.
        seconds: of one call.

    Raises:
        UserError: a module or function is not there.
    """

    def __init__(self, rewards: Sequence[RewardConfig], seconds: float) -> None:
        self._names, self._seconds = [reward.function for reward in rewards], seconds
        self._weights = [reward.weight for reward in rewards]
        self._process: Any = None
        self.last_error = ""  # of a call that failed
        self._start()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, answer: str, row: Mapping[str, Any]) -> tuple[float | None, list[float | None]]:
        """The weighted sum, and what each function gave; None where one failed."""
        values = [self._call(number, answer, row) for number in range(len(self._names))]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None, values
        return sum(weight * value for weight, value in zip(self._weights, known, strict=True)), values

    def _call(self, number: int, answer: str, row: Mapping[str, Any]) -> float | None:
        name = self._names[number]
        try:
            if self._process is None:
                self._start()
            self._pipe.send((number, answer, dict(row)))
            if not self._pipe.poll(self._seconds):
                self.last_error = f"{name} took more than {self._seconds:g} s"
                self._end()
                return None
            value, problem = self._pipe.recv()
        except (EOFError, OSError):  # it crashed, or left
            self.last_error = f"{name} ended its process"
            self._end()
            return None
        if problem:
            self.last_error = f"{name}: {problem}"
        return value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Functions lie beside the config as a rule: where the command was started.
        arguments = (theirs, self._names, [os.getcwd(), *sys.path])
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            problem = self._pipe.recv() if self._pipe.poll(START_SECONDS) else f"no answer within {START_SECONDS:g} s"
        except (EOFError, OSError):
            problem = "its process ended while it was imported"
        if problem:
            self._end()
            raise UserError(
                f"grpo.rewards: {problem}", fix="give module:function, the module beside where you start the command"
            )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, names: Sequence[str], path: Sequence[str]) -> None:
    """Body of the process: import, then answer calls until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to every process of a run; the main one decides
        signal.signal(number, signal.SIG_IGN)
    sys.path[:] = path
    functions = []
    for name in names:
        module, _, function = name.partition(":")
        try:
            functions.append(getattr(importlib.import_module(module), function))
        except BaseException as error:
            pipe.send(f"{name}: {type(error).__name__}: {error}")
            return
    pipe.send("")
    while True:
        try:
            number, answer, row = pipe.recv()
        except (EOFError, OSError):  # the run is over
            return
        try:
            value = float(functions[number](answer, row))
            problem = "" if math.isfinite(value) else f"{value} is no finite number"
        except Exception as error:
            value, problem = math.nan, f"{type(error).__name__}: {error}"
        pipe.send((None if problem else value, problem))
