"""Turns: several runs on one machine, a process each, of which one computes at a time.

So what disturbs the machine disturbs all of them alike, and each has all threads while it works. A run waits between
two steps, where its clock stands still; `minimoe sweep` and `minimoe compare` give the turns (inspect/trials.py).
"""

from __future__ import annotations

import os
import time

VARIABLE = "MINIMOE_TURNS"  # read end, write end, seconds: "5,8,4.0"


class Turns:
    """A run's side of it: one byte says that its turn is over, one that is read begins the next.

    Args:
        seconds: that a turn lasts, up to the end of a step.
    """

    def __init__(self, read_end: int, write_end: int, seconds: float) -> None:
        self._read_end, self._write_end, self._seconds = read_end, write_end, seconds
        self._until = 0.0  # the start is a turn of its own, and ends before the first step

    @classmethod
    def from_environment(cls) -> Turns | None:
        """None for a run that has the machine for itself."""
        if VARIABLE not in os.environ:
            return None
        read_end, write_end, seconds = os.environ[VARIABLE].split(",")
        return cls(int(read_end), int(write_end), float(seconds))

    def wait(self) -> bool:
        """Return when the next step may begin; False when nobody gives turns any more, and the run is to stop."""
        if time.monotonic() < self._until:
            return True
        try:
            os.write(self._write_end, b".")
        except BrokenPipeError:
            return False
        given = os.read(self._read_end, 1)
        self._until = time.monotonic() + self._seconds
        return bool(given)
