"""What readers of files and of hub datasets yield: rows, and rows that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    place: str  # "file:line"


class BadRow(Exception):
    """A row that cannot be used: what is wrong with it, where it is, and what to do where that is known."""

    def __init__(self, what: str, place: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.place, self.fix = what, place, fix
