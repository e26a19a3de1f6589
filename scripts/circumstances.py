"""The head of a page of results: when, where and how it was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from minimoe.train.facts import processor


def circumstances(title: str, started: str, command: str) -> str:
    """Markdown: a heading and a list.

    Args:
        started: date and time, as it is to be read.
        command: what made it.
    """
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    return (
        f"# {title}\n\n"
        f"- {started}\n"
        f"- {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}\n"
        f"- Python {platform.python_version()}, {packages}\n"
        f"- `{command}`\n"
    )
