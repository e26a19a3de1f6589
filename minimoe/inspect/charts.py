"""The charts of reports, as matplotlib figures: curves with units, and the experts' loads as heatmaps.

Two colours are placeholders: text and grid. A page puts its theme's in their place (`as_svg`); a PNG has them as they
are, on white. Lines differ in dashes as well as in colour, and what is dead is crossed out.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from minimoe.inspect.record import Record

TEXT, GRID = "#1a1b1c", "#d0d1d2"
COLOURS = ("#3a86c8", "#e07b20", "#2a9d74", "#b05cc0", "#cf4458", "#8d7a3c", "#5f7d95", "#d070a0")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
DEAD = 0.01  # of a fair share
_POINTS = 1200  # of a line at most: of more, the means of neighbours
_BINS = 160  # of a heatmap in time
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "minimoe",  # the same chart is the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_LABEL = 38  # characters of a line
UNITS = {"tokens": "tokens", "seconds": "seconds of training", "FLOPs": "FLOPs of training", "step": "steps"}


class Chart(NamedTuple):
    name: str  # of its file
    title: str
    text: str  # what it shows, for those who do not see it too
    figure: Figure


class Line(NamedTuple):
    label: str
    x: np.ndarray
    y: np.ndarray
    marked: bool = False  # few points, each of which counts


def curves(
    name: str,
    title: str,
    text: str,
    lines: Sequence[Line],
    *,
    x: str = "tokens",
    y: str = "",
    log: bool = False,
    references: dict[str, float] | None = None,
) -> Chart | None:
    """Lines over one axis; None where there is no value to draw."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(lines):
            places, values = thinned(line.x, line.y)
            alone = np.isfinite(values).sum() == 1
            axes.plot(
                places,
                values,
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number // 2 % len(DASHES)],
                linewidth=1.5,
                marker="o" if line.marked or alone else None,
                markersize=3.5,
                label=wrapped(line.label),
            )
        for label, value in (references or {}).items():
            axes.axhline(value, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
            axes.annotate(
                f"{label} {value:.3g}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8
            )
        if log and all((line.y[np.isfinite(line.y)] > 0).all() for line in lines):
            axes.set_yscale("log")
        axes.set_xlabel(UNITS.get(x, x))
        axes.set_ylabel(y)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if y == "B":
            axes.set_ylim(bottom=0)  # where a curve that is almost flat looks so
        if max(np.nanmax(np.abs(line.y[np.isfinite(line.y)])) for line in lines) >= 1e4 and not log:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if len(lines) > 1 or lines[0].label:
            if len(lines) <= 8 and all(len(line.label) <= _LABEL for line in lines):
                axes.legend(ncols=2 if len(lines) > 4 else 1)
            else:  # below, in a taller chart
                heights = [wrapped(line.label).count("\n") + 1 for line in lines]
                figure.set_figheight(3.1 + 0.17 * sum(heights) / 2 + 0.17 * max(heights))
                figure.legend(loc="outside lower left", ncols=2)
    return Chart(name, title, text, figure)


def wrapped(label: str) -> str:
    """On lines that leave room for a chart beside them."""
    return textwrap.fill(label, _LABEL, break_on_hyphens=False, break_long_words=False)


def intervals(name: str, title: str, text: str, rows: Sequence[tuple[str, float, float]], x: str) -> Chart | None:
    """A line for each (label, mean, half width of its interval, NaN for none), the first one on top."""
    rows = [row for row in rows if np.isfinite(row[1])]
    if not rows:
        return None
    with rc_context(_STYLE):
        labels = [wrapped(label) for label, *_ in rows]
        lines = max(label.count("\n") + 1 for label in labels)
        figure = Figure(figsize=(6.4, 1.1 + max(0.3, 0.15 * lines) * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, mean, half) in enumerate(rows):
            width = None if np.isnan(half) else half
            axes.errorbar(
                mean, place, xerr=width, fmt="o", color=COLOURS[place % len(COLOURS)], capsize=3, markersize=4
            )
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x)
    return Chart(name, title, text, figure)


def heatmaps(
    name: str, title: str, text: str, x: np.ndarray, values: np.ndarray, layers: Sequence[int], *, shares: bool
) -> Chart:
    """A panel for each MoE layer, a line for each expert, over tokens.

    Args:
        x: (N,) tokens.
        values: (N, L, E).
        shares: values are loads, 1 = a fair share, drawn from a quarter of one to four; otherwise around 0.
    """
    means, places = binned(x, values)  # (B, L, E)
    count, experts = values.shape[1:]
    columns = 1 if count == 1 else 2
    lines = -(-count // columns)
    limit = 2.0 if shares else float(np.nanmax(np.abs(means), initial=1e-9)) or 1e-9
    with rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(12.8, lines * max(1.5, min(4.0, 0.55 + 0.16 * experts))), layout="constrained")
        panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).flatten()
        image: Any = None
        for layer, axes in enumerate(panels):
            if layer >= count:
                axes.axis("off")
                continue
            shown = means[:, layer].T  # (E, B)
            colours = np.log2(np.maximum(shown, 2.0**-6)) if shares else shown
            extent = (places[0], places[-1], experts - 0.5, -0.5)
            image = axes.imshow(
                colours, aspect="auto", interpolation="nearest", cmap="PuOr_r", vmin=-limit, vmax=limit, extent=extent
            )
            if shares:
                dead_expert, dead_bin = np.nonzero(shown < DEAD)
                every = max(1, len(dead_bin) // 400)
                centres = (places[:-1] + places[1:]) / 2
                axes.plot(centres[dead_bin[::every]], dead_expert[::every], "x", color="white", markersize=3.5)
            step = -(-experts // 16)
            last = values[-1, layer]
            ticks = list(range(0, experts, step))
            axes.set_yticks(ticks, [f"{expert}: {last[expert]:.2f}" for expert in ticks], size=7)
            axes.set_title(f"layer {layers[layer] if layer < len(layers) else layer}", size=9, loc="left")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if layer >= count - columns:
                axes.set_xlabel("tokens")
        bar = figure.colorbar(image, ax=list(panels), fraction=0.025, pad=0.01)
        if shares:
            bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "fair", "2", "≥ 4"])
    return Chart(name, title, text, figure)


def run_charts(run: Record) -> list[Chart]:
    """All charts of one run."""
    tokens = run.axis("tokens", run.steps)
    checked = run.axis("tokens", run.validation.get("step", np.zeros(0)))
    references = run.facts.get("references", {})
    train, held = run.training, run.validation

    def line(label: str, name: str) -> Line:
        return Line(label, tokens, train.get(name, np.full(len(tokens), np.nan)))

    def held_out(label: str, name: str) -> Line:
        return Line(label, checked, held.get(name, np.full(len(checked), np.nan)), marked=True)

    unigram = {"unigram entropy": references["unigram_loss"]} if "unigram_loss" in references else {}
    compressor = {"xz -9": references["xz_bits_per_byte"]} if "xz_bits_per_byte" in references else {}
    loads, charts = run.layers.get("expert_load"), []
    charts.append(
        curves(
            "loss",
            "Loss",
            "Nats per token, in training and on held-out documents.",
            [line("training", "lm_loss" if "lm_loss" in train else "loss"), held_out("held out", "val_loss")],
            y="nats per token",
            references=unigram,
        )
    )
    if "val_bits_per_byte" in held:
        charts.append(
            curves(
                "bits_per_byte",
                "Bits per byte",
                "Of held-out text: what a compressor made of the model would need.",
                [held_out("", "val_bits_per_byte")],
                y="bits per byte",
                references=compressor,
            )
        )
    for name, title, text, unit, log in _SINGLE:
        charts.append(curves(name, title, text, [line("", name)], y=unit, log=log))
    charts += _stage_charts(run, line, held_out)
    if loads is not None and loads.shape[1]:
        charts += _expert_charts(run, tokens, loads)
    return [chart for chart in charts if chart is not None]


_SINGLE = (
    ("lr", "Learning rate", "Of the matrices, at each step.", "", False),
    ("grad_norm", "Gradient norm", "Before it is clipped.", "", True),
    ("tokens_per_second", "Speed", "Tokens a second of training, without validation and saving.", "tokens/s", False),
    ("memory_bytes", "Memory", "The most that was taken so far: by the process, or on a GPU by tensors.", "B", False),
    ("load_balancing_loss", "Load-balancing loss", "Before its coefficient. Balanced: experts per token.", "", False),
    ("router_z_loss", "Router z-loss", "Before its coefficient: how large the router's logits are.", "", False),
    ("router_entropy_loss", "Router entropy", "Before its coefficient: how unsure the router is.", "nats", False),
)  # fmt: skip
_DRAWN_ALREADY = {name for name, *_ in _SINGLE} | {
    *("step", "tokens", "seconds", "loss", "lm_loss", "val_loss", "val_perplexity", "val_bits_per_byte")
}


def _stage_charts(run: Record, line: Any, held_out: Any) -> list[Chart | None]:
    """What only some stages log, such as rewards and margins: a chart each."""
    found = []
    names = dict.fromkeys([*run.training, *(name.removeprefix("val_") for name in run.validation)])
    for name in names:
        if name in _DRAWN_ALREADY or f"val_{name}" in _DRAWN_ALREADY:
            continue
        lines = [line("training", name), held_out("held out", f"val_{name}")]
        title = name.replace("_", " ").capitalize()
        found.append(curves(name, title, f"{title}, as the stage logs it.", lines))
    return found


def _expert_charts(run: Record, tokens: np.ndarray, loads: np.ndarray) -> list[Chart | None]:
    """Of the MoE layers: loads, their entropy, dead experts, selection bias, confidence."""
    layers = run.facts.get("moe_layers") or list(range(loads.shape[1]))
    dead = (loads < DEAD).sum(-1).astype(np.float64)

    def by_layer(values: np.ndarray) -> list[Line]:
        return [Line(f"layer {layer}", tokens, values[:, n]) for n, layer in enumerate(layers[: values.shape[1]])]

    found: list[Chart | None] = [
        heatmaps(
            "expert_load",
            "Load of each expert",
            "Its tokens over a fair share, in each MoE layer; beside it the last value. Crosses: under 1 % of one.",
            tokens,
            loads,
            layers,
            shares=True,
        ),
        curves(
            "load_entropy",
            "Balance of the experts",
            "Entropy of the loads of a layer, 1 when all are equal.",
            by_layer(load_entropy(loads)),
            y="of the maximum",
        ),
        curves(
            "dead_experts",
            "Dead experts",
            "With under 1 % of a fair share, in each layer.",
            by_layer(dead),
            y="experts",
        ),
    ]
    if (confidence := run.layers.get("router_confidence")) is not None:
        text = "The largest probability that a token's router gives, averaged over tokens."
        found.append(
            curves("router_confidence", "Confidence of the routers", text, by_layer(confidence), y="probability")
        )
    if (bias := run.layers.get("selection_bias")) is not None:
        text = "What is added to each expert's score when experts are chosen; beside it the last value."
        found.append(heatmaps("selection_bias", "Selection bias", text, tokens, bias, layers, shares=False))
    return found


def load_entropy(loads: np.ndarray) -> np.ndarray:
    """(..., E) loads -> (...): the entropy of their shares, 1 when all are equal."""
    shares = loads / np.maximum(loads.sum(-1, keepdims=True), 1e-9)
    return -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1) / np.log(max(loads.shape[-1], 2))


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line of not more points than can be seen: finite values only, neighbours averaged."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(x), _POINTS + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def binned(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours: (N, ...) -> (B, ...), and the B + 1 edges of the bins on the axis."""
    count = min(len(x), _BINS)
    edges = np.linspace(0, len(x), count + 1).astype(int)
    means = np.stack([np.nanmean(values[a:b], axis=0) for a, b in pairwise(edges)])
    places = np.append(x[edges[:-1]], x[-1] + (x[-1] - x[0]) / max(len(x) - 1, 1))
    return means, places


def as_svg(chart: Chart) -> str:
    """For a page, in the page's own colours."""
    stream = io.StringIO()
    with rc_context(_STYLE):
        chart.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor").replace(GRID, "var(--grid)")
    # Ids are of one drawing only, and a page has many.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{chart.name}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def save_png(chart: Chart, folder: Path) -> Path:
    """As a file to show elsewhere, on white."""
    file = folder / f"{chart.name}.png"
    with rc_context(_STYLE):
        chart.figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file
