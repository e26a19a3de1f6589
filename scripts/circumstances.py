"""The head of a page of results: when, where and how it was made."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path


def circumstances(title: str, started: str, command: str) -> str:
    """Markdown: a heading and a list.

    Args:
        started: date and time, as it is to be read.
        command: what made it.
    """
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    return (
        f"# {title}\n\n"
        f"- {started}\n"
        f"- {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}\n"
        f"- Python {platform.python_version()}, {packages}\n"
        f"- `{command}`\n"
    )
