"""Failpoints: named places in the code where a test makes the process die, wait or fail, switched on from outside.

`MINIMOE_FAILPOINTS=save.renamed@2=kill,train.loss@5=nan` acts at the second passage of `save.renamed` and the fifth
of `train.loss`; without `@N` at every passage, and `train.step#1` on rank 1 alone. Actions: `kill` (SIGKILL to this
process), `signal:NAME` (this one), `sleep:SECONDS`, `full` (as if the disk were full); any other word is returned for
the place to act on. Without the variable a failpoint costs a dictionary lookup.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

VARIABLE = "MINIMOE_FAILPOINTS"
passages: Counter[str] = Counter()  # of this process, by name


def failpoint(name: str) -> str | None:
    """Pass the place called `name`; returns the word of an action that is the caller's to do, else None.

    Raises:
        OSError: the action is `full`.
    """
    spec = os.environ.get(VARIABLE)
    if not spec:
        return None
    passages[name] += 1
    for entry in spec.split(","):
        place, _, action = entry.partition("=")
        place, _, rank = place.partition("#")
        place, _, passage = place.partition("@")
        here = not rank or rank == os.environ.get("RANK", "0")
        if place == name and here and (not passage or int(passage) == passages[name]):
            return _act(action)
    return None


def _act(action: str) -> str | None:
    word, _, argument = action.partition(":")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "signal":
        os.kill(os.getpid(), signal.Signals[argument])
        return None
    if word == "sleep":
        time.sleep(float(argument))
        return None
    if word == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return word
