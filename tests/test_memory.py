"""Freed memory stays with the process, and a run copies its state once at a time."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import weakref

import pytest

from minimoe.train import loop, pretrain
from minimoe.train import snapshot as snapshots

PROGRAM = """
from minimoe.train.memory import keep_freed_memory

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

def left():
    before = resident()
    block = b"x" * (100 << 20)
    del block
    return resident() - before

print(left())
keep_freed_memory()
print(left())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    by_default, kept = map(int, done.stdout.split())
    assert by_default < 10 << 20
    assert kept > 90 << 20


def test_a_run_never_has_two_copies_of_its_state(pretrain_config, monkeypatch):
    copies: list[weakref.ref] = []

    def take(*arguments):
        deadline = time.monotonic() + 5  # of the thread that has just said that it is done with the one before
        while any(copy() for copy in copies):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        copies.append(weakref.ref(snapshot := snapshots.take_snapshot(*arguments)))
        return snapshot

    monkeypatch.setattr(loop, "take_snapshot", take)
    pretrain.run(pretrain_config(max_steps=3, save_every=1))
    assert len(copies) == 3
