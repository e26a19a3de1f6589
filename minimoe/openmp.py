"""Stub, replaced at merge: how OpenMP's idle workers wait."""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """The variables that `configure` sets."""
    return {"GOMP_SPINCOUNT": "10000000"}


def configure() -> None:
    """Set them for this process, before torch is loaded."""
    for name, value in environment().items():
        os.environ.setdefault(name, value)


def watch() -> None:
    """Stub: nothing watches."""
