"""`minimoe report`, and what else looks inside."""

from __future__ import annotations

from typing import Annotated

import typer

from minimoe.cli.app import app


@app.command(epilog="Example: minimoe report runs/quickstart/pretrain; minimoe report runs/a runs/b --out compare.html")
def report(
    folders: Annotated[list[str], typer.Argument(metavar="RUN…", help="folders of runs; several are compared")],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="the page [RUN/report.html; ./report.html]")] = None,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Write a page about a run, or one that compares several: curves, experts, samples, config."""
    from minimoe.inspect.report import run

    page, *charts = run(folders, out, background=background)
    print(f"{page}" + (f", and {len(charts)} charts in {charts[0].parent}/" if charts else ""))
