"""`python -m scripts.docs`: write the reference pages."""

from __future__ import annotations

from pathlib import Path

from scripts.docs.reference import PAGES

for name, make in PAGES.items():
    file = Path("docs/reference") / name
    file.write_text(make(), encoding="utf-8")
    print(file)
