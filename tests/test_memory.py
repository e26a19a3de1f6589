"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
