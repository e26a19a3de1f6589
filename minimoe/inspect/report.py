"""`minimoe report`: a run's folder -> `report.html` and its charts as PNGs; several runs -> a page that compares them.

Torch is not imported: a report takes seconds, beside a training that it must not disturb.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minimoe.errors import UserError
from minimoe.inspect.charts import DEAD, UNITS, Chart, Line, curves, load_entropy, run_charts, save_png
from minimoe.inspect.page import Note, PageSection, Row, Table, drawn, write_page
from minimoe.inspect.record import Record, read_run
from minimoe.train.files import CHARTS_FOLDER, REPORT_FILE
from minimoe.train.metrics import duration

_SHOWN_EVENTS, _SHOWN_SAMPLES = 40, 12


def run(folders: Sequence[str], out: str | None = None, *, background: bool = False) -> list[Path]:
    """Write the report of one run, or the comparison of several; returns the files.

    Args:
        out: the page; None is report.html in the run's folder, or here for several runs.
        background: give way to every other process, and write the page alone.
    """
    if background:
        os.nice(19)
    runs = [read_run(Path(folder)) for folder in folders]
    if len(runs) > 1:
        file = Path(out or REPORT_FILE)
        charts = comparison_charts(named(runs))
        write_comparison(file, runs, charts)
        charts_folder = file.with_name(f"{file.stem}-{CHARTS_FOLDER}")
    else:
        file = Path(out) if out else runs[0].folder / REPORT_FILE
        charts_folder = file.with_name(f"{file.stem}-{CHARTS_FOLDER}" if out else CHARTS_FOLDER)
        charts = run_charts(runs[0])
        write_report(file, runs[0], charts)
    if background:
        return [file]
    charts_folder.mkdir(parents=True, exist_ok=True)
    return [file, *(save_png(chart, charts_folder) for chart in charts)]


def write_report(file: Path, run: Record, charts: Sequence[Chart]) -> None:
    """The page of one run."""
    experts = [chart for chart in charts if chart.name in _EXPERTS]
    others = [chart for chart in charts if chart.name not in _EXPERTS]
    sections = [PageSection("Training", _drawn_of(run), drawn(others))]
    if experts:
        sections.append(PageSection("Experts", charts=drawn(experts), table=expert_table(run)))
    if run.events:
        rows = [
            Row([f"{row['step']:,}", str(row["event"]).replace("_", " "), _event(row)])
            for row in run.events[-_SHOWN_EVENTS:]
        ]
        sections.append(PageSection("What went wrong", table=Table(("step", "what", "details"), rows)))
    if run.samples:
        sections.append(PageSection("Samples", "The last ones first.", samples=_samples(run)))
    sections.append(_environment(run))
    state, note = how_it_ended(run)
    stage = run.facts.get("stage", "run")
    write_page(
        file,
        title=f"{run.name}: {stage}",
        subtitle=f"{run.folder} · {run.status.get('started', 'start unknown')}",
        sections=sections,
        notes=[note, *([_LIVE] if state == "running" else [])],
        tiles=_tiles(run),
        live=state == "running",
    )


_NONE = "-"
_LIVE = Note("good", "This page loads itself again every minute.")
_EXPERTS = ("expert_load", "load_entropy", "dead_experts", "router_confidence", "selection_bias")


def how_it_ended(run: Record) -> tuple[str, Note]:
    """The run's state, and a sentence about it."""
    state, total = run.status.get("state", "unknown"), run.facts.get("total_steps")
    step = int(run.steps[-1]) if len(run.steps) else 0
    place = f"step {step:,}" + (f" of {total:,}" if total else "")
    if state == "finished":
        return state, Note("good", f"Finished: {place}.")
    if state == "running" and _alive(run.status):
        return state, Note("warn", f"Running: {place}.")
    if state == "running":
        return "killed", Note("bad", f"Killed at about {place}: the process is gone. --resume goes on.")
    message = run.status.get("message", "")
    kind = "warn" if state == "preempted" else "bad"
    return state, Note(kind, f"{state.capitalize()} at {place}" + (f": {message}" if message else "."))


def _alive(status: dict[str, Any]) -> bool:
    if status.get("host") != socket.gethostname():
        return True  # nothing is known of another machine's processes
    try:
        os.kill(int(status["pid"]), 0)
    except ProcessLookupError:
        return False
    except (KeyError, TypeError, ValueError, PermissionError):
        return True
    return True


def _tiles(run: Record) -> list[tuple[str, str]]:
    parameters, train, held = run.facts.get("parameters", {}), run.training, run.validation
    tiles = []
    if parameters:
        tiles.append(("parameters", f"{_si(parameters['total'])}, {_si(parameters['active'])} active"))
    if len(run.steps):
        tiles += [
            ("tokens", _si(float(train["tokens"][-1]))),
            ("training took", duration(float(train["seconds"][-1]))),
            ("tokens/s, median", _si(float(np.nanmedian(train["tokens_per_second"])))),
            ("last training loss", f"{train['lm_loss' if 'lm_loss' in train else 'loss'][-1]:.4f}"),
        ]
    for name, title in (("val_loss", "best held-out loss"), ("val_bits_per_byte", "best bits per byte")):
        if name in held:
            tiles.append((title, f"{np.nanmin(held[name]):.4f}"))
    for name in ("val_reward", "val_reward_accuracy"):
        if name in held:
            tiles.append((name.removeprefix("val_").replace("_", " ") + ", held out", f"{held[name][-1]:.3f}"))
    if "memory_bytes" in train:
        tiles.append(("memory", f"{_si(float(train['memory_bytes'][-1]))}B"))
    if "flops_per_token" in run.facts and len(run.steps):
        tiles.append(("FLOPs", f"{run.facts['flops_per_token'] * train['tokens'][-1]:.2e}"))
    return tiles


def expert_table(run: Record) -> Table | None:
    """The last tenth of the run, a row for each MoE layer: what the heatmap shows, as text."""
    loads = run.layers.get("expert_load")
    if loads is None or not loads.shape[1]:
        return None
    last = np.nanmean(loads[-max(1, len(loads) // 10) :], axis=0)  # (L, E)
    layers = run.facts.get("moe_layers") or list(range(len(last)))
    rows = []
    for layer, row in zip(layers, last, strict=False):
        dead = ", ".join(map(str, np.flatnonzero(row < DEAD))) or "none"
        ends = [f"{row[expert]:.2f} (expert {expert})" for expert in (int(row.argmin()), int(row.argmax()))]
        rows.append(Row([str(layer), *ends, f"{float(load_entropy(row)):.3f}", dead]))
    return Table(("layer", "least load", "largest load", "entropy", "dead experts"), rows)


def _event(row: dict[str, Any]) -> str:
    details = {
        key: value for key, value in row.items() if key not in ("step", "event", "seconds") and value is not None
    }
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in details.items())


def _samples(run: Record) -> list[dict[str, Any]]:
    by_step: dict[int, list[dict[str, str]]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append({"prompt": sample["prompt"], "text": sample["text"]})
    steps = sorted(by_step, reverse=True)[:_SHOWN_SAMPLES]
    return [{"title": f"step {step:,}", "texts": by_step[step]} for step in steps]


def _environment(run: Record) -> PageSection:
    found = run.facts.get("environment", {})
    rows = [Row([name, str(value)]) for name, value in found.items() if name != "packages"]
    rows += [Row([name, version]) for name, version in found.get("packages", {}).items()]
    if "command" in run.facts:
        rows.insert(0, Row(["command", run.facts["command"]]))
    return PageSection(
        "Config and environment",
        table=Table(("what", "value"), rows) if rows else None,
        summary="config.yaml",
        pre=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


def _drawn_of(run: Record) -> str:
    if run.drawn_of > len(run.steps) + 1:
        return f"{len(run.steps):,} of {run.drawn_of:,} logged rows are drawn."
    return ""


def named(runs: Sequence[Record]) -> Sequence[Record]:
    """The runs, each with a name that no other has: the last parts of their folders."""
    for depth in range(1, 8):
        names = ["/".join(run.folder.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    for run, name in zip(runs, names, strict=True):
        run.name = name
    return runs


def comparison_charts(runs: Sequence[Record]) -> list[Chart]:
    """Loss in training and on held-out documents over tokens, FLOPs and seconds, a line for each run."""
    charts = []
    for axis in ("tokens", "FLOPs", "seconds"):
        for kind, title in (("lm_loss", "Training loss"), ("val_loss", "Held-out loss")):
            lines = []
            for run in runs:
                columns = run.validation if kind == "val_loss" else run.training
                name = kind if kind in columns else "loss"
                if name in columns and "step" in columns:
                    x = run.axis(axis, columns["step"])
                    lines.append(Line(run.name, x, columns[name], marked=kind == "val_loss"))
            text = f"Nats per token over {UNITS[axis]}."
            charts.append(curves(f"{kind}_{axis}", f"{title} over {axis}", text, lines, x=axis, y="nats per token"))
    for name, title in (("tokens_per_second", "Speed"), ("grad_norm", "Gradient norm")):
        lines = [
            Line(run.name, run.axis("tokens", run.steps), run.training[name]) for run in runs if name in run.training
        ]
        charts.append(curves(name, title, "Over tokens.", lines, log=name == "grad_norm"))
    return [chart for chart in charts if chart is not None]


def write_comparison(file: Path, runs: Sequence[Record], charts: Sequence[Chart]) -> None:
    """The page of several runs."""
    names = [run.name for run in runs]
    tiles = [dict(_tiles(run)) for run in runs]
    titles = dict.fromkeys(title for found in tiles for title in found)
    results = [Row(["how it ended", *(how_it_ended(run)[1].text for run in runs)])]
    results += [Row([title, *(found.get(title, _NONE) for found in tiles)]) for title in titles]
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = []
    for key in keys:
        cells = [str(config.get(key, _NONE)) for config in flat]
        rows.append(Row([key, *cells], differs=len(set(cells)) > 1))
    rows.sort(key=lambda row: not row.differs)
    count = sum(row.differs for row in rows)
    if not charts:
        raise UserError("the runs have no rows to compare", fix="give runs that have logged a step")
    write_page(
        file,
        title=f"{len(runs)} runs compared",
        subtitle=" · ".join(str(run.folder) for run in runs),
        sections=[
            PageSection("Results", table=Table(("", *names), results)),
            PageSection("Curves", charts=drawn(charts)),
            PageSection("Config", f"{count} keys differ; they come first.", table=Table(("key", *names), rows)),
        ],
    )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        name: leaf for key, value in config.items() for name, leaf in _flat(value, f"{prefix}.{key}".strip(".")).items()
    }


def _si(number: float) -> str:
    for limit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}\N{NO-BREAK SPACE}{sign}"
    return f"{number:.3g}\N{NO-BREAK SPACE}"
