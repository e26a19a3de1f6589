"""Accidents that happen to a run, and the check that it ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from minimoe.errors import EXIT_IO, EXIT_PREEMPTED
from minimoe.failpoints import VARIABLE
from minimoe.train import checkpoint
from scripts.chaos.lab import Reference, Run
from scripts.chaos.processes import wait


def save_failpoints() -> list[str]:
    """The failpoints in checkpoint.py, in the order of the source; sharded saves have theirs in
    tests/test_sharded_checkpoint.py."""
    source = Path(checkpoint.__file__).read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r'failpoint\("([^"]+)"', source)))


def steps_for(interruptions: int, save_every: int) -> int:
    """Steps enough that a run cannot end before it was interrupted so often, at `Reference.moment`."""
    return 4 * save_every * max(interruptions, 1)


@dataclass
class Interruptions:
    """What happened to a run that was interrupted again and again."""

    count: int = 0
    in_start_up: int = 0  # before it had done a step
    while_saving: int = 0  # a checkpoint was being written
    redone: list[int] = field(default_factory=list)  # steps lost by each
    seconds: list[float] = field(default_factory=list)  # from the signal to the exit


def interrupt(reference: Reference, run: Run, times: int, number: int, rng: random.Random) -> Interruptions:
    """Send `run` the signal `number` at random moments and resume it, `times` times; then let it end and compare.

    A SIGKILL comes in start-up one time in four, else after the first step, as SIGTERM always does: before that no
    handler is installed. A run that ends before its moment, as the machine is less busy than for the reference, starts
    again from nothing.
    """
    seen = Interruptions()
    expected = -signal.SIGKILL if number == signal.SIGKILL else EXIT_PREEMPTED
    while seen.count < times:
        before, stamp = run.saved_step(), run.last_logged()
        process = run.start("--resume")
        early = number == signal.SIGKILL and rng.random() < 0.25
        if not early:
            # Rows beyond the checkpoint may be there still, of the process before.
            while process.is_alive() and (run.last_logged() == stamp or run.step() <= before):
                time.sleep(0.002)
        process.join(reference.moment(rng, early))
        if not process.is_alive():
            assert process.exitcode == 0, run.log()[-3000:]
            shutil.rmtree(run.folder)
            continue
        assert process.pid is not None
        os.kill(process.pid, number)
        sent = time.monotonic()
        status = wait(process)
        assert status == expected, f"exit status {status}\n{run.log()[-3000:]}"
        seen.seconds.append(time.monotonic() - sent)
        # Killed in start-up, it may have left the rows of the process before it, whose lost steps are counted already.
        trained = run.step() > before and run.last_logged() != stamp
        seen.count += 1
        seen.in_start_up += not trained
        seen.while_saving += any((run.folder / "checkpoints").glob(".writing*"))
        seen.redone.append(max(run.step() - run.saved_step(), 0) if trained else 0)
    status = run.finish("--resume")
    assert status == 0, f"exit status {status}\n{run.log()[-3000:]}"
    reference.check(run)
    return seen


def die_at(reference: Reference, run: Run, place: str, passage: int) -> bool:
    """Kill `run` at a failpoint, resume it and compare; False when it never came by."""
    status = run.finish(env={VARIABLE: f"{place}@{passage}=kill"})
    if status == 0:
        return False
    assert status == -signal.SIGKILL, f"exit status {status}\n{run.log()[-3000:]}"
    resume_and_check(reference, run)
    return True


def fill_disk_at(reference: Reference, run: Run, place: str, passage: int) -> None:
    """Fail at a failpoint as a full disk does, resume the run and compare."""
    check_stopped_by_full_disk(run, run.finish(env={VARIABLE: f"{place}@{passage}=full"}))
    resume_and_check(reference, run)


def check_stopped_by_full_disk(run: Run, status: int) -> None:
    """It said so, kept the older checkpoint and took its temporary files away."""
    assert status == EXIT_IO, f"exit status {status}\n{run.log()[-3000:]}"
    assert "Traceback" not in run.log(), run.log()[-3000:]
    assert run.saved_step() > 0
    assert not run.leftovers(), run.leftovers()


def resume_and_check(reference: Reference, run: Run) -> None:
    status = run.finish("--resume")
    assert status == 0, f"exit status {status}\n{run.log()[-3000:]}"
    reference.check(run)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of `size` bytes at `folder`; yields a function that gives it another size.

    Raises:
        PermissionError: only root may do that, or not even root in this container.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise PermissionError(f"cannot mount a small file system: {result.stderr.strip()}")

    if shutil.which("mount") is None:
        raise PermissionError("cannot mount a small file system: no mount command")
    mount(f"size={size}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
