"""SIGTERM and Ctrl-C ask a run to stop: it finishes its step, saves once and exits with 75, ready for --resume."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from minimoe.errors import EXIT_INTERRUPTED, Preempted


class StopRequested(Exception):
    """Raised out of an evaluation that is abandoned because the run is to stop."""


class _StopNow(BaseException):
    """Raised by the signal handler; no `except Exception` on the way may take it for a failure of its own."""


class StopRequest:
    """Context manager that listens for SIGTERM and SIGINT; a second Ctrl-C ends the process at once with 130.

    While data is prepared there is nothing to save, and a signal ends the run right there. From `defer()` on it is
    only noted, and the training loop asks for it between steps.

    Args:
        on_abort: called before a second Ctrl-C ends the process.

    Raises:
        Preempted: at the end of the `with`, for a signal before `defer()`.
    """

    def __init__(self, on_abort: Callable[[], None] = lambda: None) -> None:
        self.signal_name: str | None = None
        self._on_abort = on_abort
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is _StopNow:
            raise Preempted(
                f"stopped by {self.signal_name} before the first step; there was nothing to save",
                fix="start the same command with --resume",
            ) from None

    def defer(self) -> None:
        """From now on there is a state worth saving: signals wait for the end of the step."""
        self._deferred = True

    def agreed(self, accelerator: Any) -> bool:
        """Whether any process was asked to stop: all of them stop after the same step."""
        asked = self.signal_name is not None
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(int(asked), device=accelerator.device)).item())

    def check(self, accelerator: Any) -> None:
        """Raise `StopRequested` once the processes agree to stop."""
        if self.agreed(accelerator):
            raise StopRequested

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            self._on_abort()
            os._exit(EXIT_INTERRUPTED)
        self.signal_name = signal.Signals(number).name
        if not self._deferred:
            raise _StopNow
