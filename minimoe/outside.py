"""Python functions of users, called in a process of their own: rewards, and tools that a model calls.

What users write may hang, crash or leak. There it costs one call, and no run: a call that raises or takes longer than
its time is reported, and the process is started anew where it has to be.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

from minimoe.errors import UserError

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from minimoe.outside import serve
serve(int(sys.argv[1]))
"""
START_SECONDS = 120.0  # to import the modules; they may import torch


class Outside:
    """Context manager around the process.

    Args:
        names: of the functions, module:function or file.py:function; modules are looked for where the command was
            started, too.
        seconds: of one call.

    Raises:
        UserError: a module or function is not there.
    """

    def __init__(self, names: Sequence[str], seconds: float) -> None:
        self._names, self.seconds = list(names), seconds
        self._process: Any = None
        self._start()

    def __enter__(self) -> Outside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def call(self, number: int, *args: Any, **kwargs: Any) -> tuple[Any, str]:
        """What function `number` gives, and what went wrong, if anything did."""
        try:
            if self._process is None:
                self._start()
            self._pipe.send((number, args, kwargs))
            if not self._pipe.poll(self.seconds):
                self.end()
                return None, f"took more than {self.seconds:g} s"
            return self._pipe.recv()
        except (EOFError, OSError):  # it crashed, or left
            self.end()
            return None, "ended its process"

    def end(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        # No process of `multiprocessing`: these import the main module again, which is not ours, and may not have
        # children of their own.
        command = [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps([os.getcwd(), *sys.path])]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        try:
            self._pipe.send(self._names)
            problem = self._pipe.recv() if self._pipe.poll(START_SECONDS) else f"no answer within {START_SECONDS:g} s"
        except (EOFError, OSError):
            problem = "its process ended while it was imported"
        if problem:
            self.end()
            raise UserError(problem, fix="give module:function, the module beside where you start the command")


def find(name: str) -> Any:
    """The function that module:function or file.py:function names."""
    module, _, function = name.rpartition(":")
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("minimoe_users_file", module)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {module}")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return getattr(loaded, function)
    return getattr(importlib.import_module(module), function)


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of a function, as OpenAI has it, from its docstring and hints."""
    from transformers.utils import get_json_schema

    schema = get_json_schema(find(name))
    schema["function"].pop("return", None)  # of `transformers` alone; models are trained without it
    return schema


def serve(descriptor: int) -> None:
    """Body of the process: import, then answer calls until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to every process of a run; the main one decides
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # what they print goes to standard error: the output is the command's own
    pipe = Connection(descriptor)
    functions = []
    for name in pipe.recv():
        try:
            functions.append(find(name))
        except BaseException as error:
            pipe.send(f"{name}: {type(error).__name__}: {error}")
            return
    pipe.send("")
    while True:
        try:
            number, args, kwargs = pipe.recv()
        except (EOFError, OSError):  # the run is over
            return
        result: tuple[Any, str]
        try:
            result = (functions[number](*args, **_plain(kwargs)), "")
        except Exception as error:
            result = (None, f"{type(error).__name__}: {error}")
        try:
            pipe.send(result)
        except Exception as error:  # what it gave cannot be sent
            pipe.send((None, f"{type(error).__name__}: {error}"))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
