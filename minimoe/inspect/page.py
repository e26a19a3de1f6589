"""One self-contained HTML page out of sections: no network, no script, light and dark as the reader's system is."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import minimoe
from minimoe.inspect.charts import Chart, as_svg


class Note(NamedTuple):
    kind: str  # good, warn or bad
    text: str

    @property
    def sign(self) -> str:
        """The same without colour."""
        return {"good": "✓", "warn": "!", "bad": "✗"}[self.kind]


class Row(NamedTuple):
    cells: Sequence[str]
    differs: bool = False


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Row]


class Figure(NamedTuple):
    title: str
    text: str
    svg: Markup
    wide: bool


@dataclass
class PageSection:
    """A heading and what stands below it."""

    title: str
    text: str = ""
    charts: list[Figure] = field(default_factory=list)
    table: Table | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: str = ""
    pre: str = ""


def drawn(charts: Sequence[Chart]) -> list[Figure]:
    """Charts as a page takes them."""
    return [Figure(chart.title, chart.text, Markup(as_svg(chart)), chart.figure.get_figwidth() > 8) for chart in charts]


def write_page(
    file: Path,
    *,
    title: str,
    subtitle: str,
    sections: Sequence[PageSection],
    notes: Sequence[Note] = (),
    tiles: Sequence[tuple[str, str]] = (),
    live: bool = False,
    template: str = "page.html.j2",
    **extra: Any,
) -> None:
    """Write the page whole or not at all.

    Args:
        live: it will be made anew, so the browser loads it again every minute.
        template: of this folder; what it takes beyond the page's own is in `extra`.
    """
    environment = Environment(
        loader=PackageLoader("minimoe.inspect", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template(template).render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        notes=notes,
        tiles=tiles,
        live=live,
        version=minimoe.__version__,
        **extra,
        made=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    )
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
