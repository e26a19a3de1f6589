"""Keeps `report.html` fresh while a run goes on, in a process of its own that the run neither waits for nor needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from minimoe.train.files import REPORT_FILE

_FIRST_SECONDS, _SECONDS = 30.0, 180.0  # to the first report, and between two: each takes some seconds of one core
_LAST_SECONDS = 30.0  # that a finished run waits for its last report


class Reporter:
    """Context manager around a run, outside of its status; it does nothing until `begin`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = False
        self.finish_trackers: Callable[[Path, bool], None] | None = None  # of the report, and whether the run failed
        self._process: subprocess.Popen[bytes] | None = None
        self._due = time.monotonic() + _FIRST_SECONDS

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._make_the_last(kind is None)
        finally:
            if self.finish_trackers is not None:
                self.finish_trackers(self._folder / REPORT_FILE, kind is not None)

    def _make_the_last(self, finished: bool) -> None:
        if not self._begun:
            return
        with suppress(OSError, subprocess.TimeoutExpired):  # the rows are there; `minimoe report` makes it again
            if self._process is not None:
                self._process.terminate()  # what it makes is out of date
                self._process.wait(_LAST_SECONDS)
            self._start()
            assert self._process is not None
            if finished and self._process.wait(_LAST_SECONDS):
                print(f"note: no {REPORT_FILE}; `minimoe report {self._folder}` says why", file=sys.stderr)

    def begin(self) -> None:
        """The run's folder is its own from now on."""
        self._begun = os.environ.get("MINIMOE_REPORT") != "off"  # for hundreds of short runs, such as the tests'

    def refresh(self) -> None:
        """Start to make the report anew, if the last one is made and some time ago."""
        if not self._begun or time.monotonic() < self._due:
            return
        if self._process is not None and self._process.poll() is None:
            return
        with suppress(OSError):
            self._start()

    def _start(self) -> None:
        self._due = time.monotonic() + _SECONDS
        command = [sys.executable, "-m", "minimoe.cli", "report", str(self._folder), "--background"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run
        )
