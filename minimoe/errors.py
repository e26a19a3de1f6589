"""Errors a person can act on, and the exit codes of every command.

An error of this module is printed as at most three lines (what is wrong, where, how to fix it) without a
traceback; anything else that escapes a command is a bug of ours and exits with 1. How a message shows a value, and
what it suggests for a misspelled name, is here too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_BUG = 1
EXIT_USER = 2
EXIT_NO_CHECKPOINT = 3
EXIT_NON_FINITE = 4
EXIT_IO = 74  # EX_IOERR of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run is saved, start it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT


class MinimoeError(Exception):
    """Base of all errors that are reported without a traceback.

    Args:
        what: what is wrong, naming the field and the value.
        where: the file, line or key it was found at; may be empty.
        fix: what to do about it; may be empty.
    """

    exit_code = EXIT_BUG

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UserError(MinimoeError):
    """The input (config, data, arguments, model folder) is wrong."""

    exit_code = EXIT_USER


class CheckpointError(MinimoeError):
    """No usable checkpoint where one is needed."""

    exit_code = EXIT_NO_CHECKPOINT


class NonFiniteError(MinimoeError):
    """The loss or the gradient is not finite and training cannot go on."""

    exit_code = EXIT_NON_FINITE


class StorageError(MinimoeError):
    """Reading or writing failed: disk full, permission lost, a worker that no longer answers."""

    exit_code = EXIT_IO


@contextmanager
def disk_errors(what: str, where: Path, again: str = "start the same command with --resume") -> Iterator[None]:
    """Turn the system's errors of writing into a `StorageError`: `what` could not be written at `where`."""
    try:
        yield
    except Exception as error:
        # The writers of safetensors and tokenizers, in Rust, raise exceptions of their own for the system's errors.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise StorageError(
            f"cannot write {what}: {reason}",
            where=str(where),
            fix=f"free space or give permission, then {again}",
        ) from error


class Preempted(MinimoeError):
    """The run was asked to stop and has saved its state; start it again with --resume."""

    exit_code = EXIT_PREEMPTED


def shorten(value: Any, limit: int = 60) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def suggestion(key: str, known: Iterable[str]) -> str:
    """', did you mean …?' when a known name is close to `key`, else the empty string."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
