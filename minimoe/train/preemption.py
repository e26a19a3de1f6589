"""SIGTERM and Ctrl-C ask a run to stop: it finishes its step, saves once and exits with 75, ready for --resume."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from minimoe.errors import EXIT_INTERRUPTED


class StopRequest:
    """Context manager that listens for SIGTERM and SIGINT; a second Ctrl-C ends the process at once with 130."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
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

    def agreed(self, accelerator: Any) -> bool:
        """Whether any process was asked to stop: all of them stop after the same step."""
        asked = self.signal_name is not None
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(int(asked), device=accelerator.device)).item())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        self.signal_name = signal.Signals(number).name
