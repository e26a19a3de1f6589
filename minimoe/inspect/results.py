"""What trials reached: means and intervals over seeds, a table, a page with charts, one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimoe.errors import UserError
from minimoe.inspect.charts import Chart, Line, curves, intervals
from minimoe.inspect.page import Note, PageSection, Row, drawn, write_page
from minimoe.inspect.page import Table as PageTable
from minimoe.inspect.record import Record, read_run
from minimoe.inspect.trials import Trial, is_finished

# 97.5th percentile of Student's t with 1, 2, ... degrees of freedom; the normal distribution's after that.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_MOST_LINES = 12  # of a chart


@dataclass
class Outcome:
    """What a trial reached."""

    variant: str
    seed: int
    loss: float  # held out, after the last step; of training, the mean of the last tenth, where nothing is held out
    tokens: float
    seconds: float  # of training
    flops: float
    tokens_per_second: float
    largest_load: float  # of the last tenth: the busiest expert's share over a fair one, the worst layer; NaN if dense
    record: Record = field(repr=False)


def outcome(trial: Trial) -> Outcome:
    """Read a finished trial."""
    run = read_run(trial.folder)
    tokens, seconds = float(run.training["tokens"][-1]), float(run.training["seconds"][-1])
    if "val_loss" in run.validation:
        loss = float(run.validation["val_loss"][-1])
    else:
        losses = run.training["lm_loss" if "lm_loss" in run.training else "loss"]
        loss = float(losses[-max(1, len(losses) // 10) :].mean())
    loads = run.layers.get("expert_load")
    largest = math.nan
    if loads is not None and loads.shape[1]:
        largest = float(np.nanmean(loads[-max(1, len(loads) // 10) :], axis=0).max())
    flops = tokens * run.facts.get("flops_per_token", math.nan)
    return Outcome(trial.variant, trial.seed, loss, tokens, seconds, flops, tokens / seconds, largest, run)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95 % interval by Student's t; NaN of a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.nan
    t = _T[count - 2] if count - 2 < len(_T) else 1.96
    return mean, t * float(np.std(values, ddof=1)) / math.sqrt(count)


def paired(outcomes: Sequence[Outcome], variant: str, baseline: str) -> tuple[float, float]:
    """The change of the loss against the baseline, seed by seed: mean and half width of its interval."""
    by_seed = {(one.variant, one.seed): one.loss for one in outcomes}
    seeds = [one.seed for one in outcomes if one.variant == variant and (baseline, one.seed) in by_seed]
    if not seeds:
        return math.nan, math.nan
    return interval([by_seed[variant, seed] - by_seed[baseline, seed] for seed in seeds])


def verdict(change: float, half: float, baseline: str) -> str:
    """What a change with its interval allows to say."""
    if math.isnan(half):
        return "one seed: no interval"
    if change + half < 0:
        return f"better than {baseline}"
    return f"worse than {baseline}" if change - half > 0 else "no difference shown"


@dataclass
class Result:
    """A variant over its seeds: means, and half widths of 95 % intervals (NaN of one seed)."""

    variant: str
    seeds: int
    loss: float
    loss_interval: float
    change: float  # of the loss against the baseline, seed by seed
    change_interval: float
    verdict: str
    tokens: float
    seconds: float
    flops: float
    tokens_per_second: float
    largest_load: float
    failures: list[str]


def results(trials: Sequence[Trial], outcomes: Sequence[Outcome], baseline: str) -> list[Result]:
    """One for each variant, in the order of the trials."""
    found = []
    for variant in dict.fromkeys(trial.variant for trial in trials):
        mine = [one for one in outcomes if one.variant == variant]
        failures = [f"seed {t.seed}: {t.failure}" for t in trials if t.variant == variant and t.failure]
        loss, half = interval([one.loss for one in mine]) if mine else (math.nan, math.nan)
        change, change_half = paired(outcomes, variant, baseline)
        said = "failed" if not mine else "baseline" if variant == baseline else verdict(change, change_half, baseline)

        def mean(name: str, mine: Sequence[Outcome] = mine) -> float:
            return float(np.mean([getattr(one, name) for one in mine])) if mine else math.nan

        means = {name: mean(name) for name in ("tokens", "seconds", "flops", "tokens_per_second", "largest_load")}
        found.append(Result(variant, len(mine), loss, half, change, change_half, said, **means, failures=failures))
    return found


def show(
    trials: Sequence[Trial],
    folder: Path,
    title: str,
    text: str,
    *,
    baseline: str | None = None,
    findings: Callable[[Sequence[Result]], list[str]] = lambda found: [],
    json_output: bool = False,
) -> list[Result]:
    """Write `results.json`, `results.md` and `report.html` into the folder, and print the table.

    Args:
        baseline: the variant that the others are compared with; None: the first.
        findings: sentences that a comparison draws from the results.

    Raises:
        UserError: no trial has come to its end.
    """
    outcomes = [outcome(trial) for trial in trials if is_finished(trial)]
    if not outcomes:
        reasons = {trial.failure for trial in trials if trial.failure}
        raise UserError(f"no run has come to its end: {'; '.join(sorted(reasons))}", where=str(folder))
    found = results(trials, outcomes, baseline or trials[0].variant)
    said = findings(found)
    words = [*said, *(f"{one.variant} failed: {reason}" for one in found for reason in one.failures)]
    head, rows = table(found)
    page = folder / "report.html"
    write_page(
        page,
        title=title,
        subtitle=f"{text}; {len({trial.seed for trial in trials})} seed(s)",
        sections=[
            PageSection("Results", _LEGEND, table=PageTable(head, [Row(row) for row in rows])),
            PageSection("Curves", "Means over seeds.", charts=drawn(charts(found, outcomes))),
        ],
        notes=[Note("bad" if " failed: " in word else "good", word) for word in words],
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    (folder / "results.md").write_text("\n".join([*words, *lines]) + "\n", encoding="utf-8")
    values = {"budget": text, "page": str(page), "findings": said, "variants": [asdict(one) for one in found]}
    dumped = json.dumps(_without_nan(values))
    (folder / "results.json").write_text(dumped, encoding="utf-8")
    if json_output:
        print(dumped)
        return found
    shown = Table(box=None, padding=(0, 2), title=f"{title}: {text}", title_justify="left")
    for name in head:
        shown.add_column(name, justify="left" if name in (head[0], head[-1]) else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(shown)
    for word in words:
        console.print(Text(word))
    console.print(Text(f"curves: {page}", style="dim"))
    return found


_LEGEND = (
    "Loss: held-out nats per token after the last step, mean over seeds and 95 % interval (Student's t). Change: "
    "against the baseline, seed by seed. Largest load: of the busiest expert at the end, 1 = a fair share."
)


def table(found: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as text."""
    head = ["variant", "loss", "change", "tokens", "seconds", "FLOPs", "tokens/s", "largest load", "verdict"]
    rows = []
    for one in found:
        same = one.verdict in ("baseline", "failed")
        numbers = [
            f"{one.tokens / 1e6:.2f}M",
            f"{one.seconds:.1f}",
            f"{one.flops:.2e}",
            f"{one.tokens_per_second:,.0f}",
        ]
        cells = [one.variant, _with_interval(one.loss, one.loss_interval)]
        cells += ["-" if same else _with_interval(one.change, one.change_interval, "+"), *numbers]
        cells += ["-" if math.isnan(one.largest_load) else f"{one.largest_load:.2f}", one.verdict]
        rows.append(cells)
    return head, rows


def charts(found: Sequence[Result], outcomes: Sequence[Outcome]) -> list[Chart]:
    """The last losses with their intervals, and the curves of the best variants over each axis."""
    ended = [one for one in found if one.seeds]
    best = sorted(ended, key=lambda one: one.loss)[:_MOST_LINES]
    drawn_too = [one for one in ended if one in best]
    rows = [(one.variant, one.loss, one.loss_interval) for one in ended]
    made: list[Chart | None] = [
        intervals(
            "losses", "Held-out loss at the end", "Mean over seeds with its 95 % interval.", rows, "nats per token"
        )
    ]
    for axis in ("seconds", "tokens", "FLOPs"):
        lines = [
            _mean_line(one.variant, axis, [o.record for o in outcomes if o.variant == one.variant]) for one in drawn_too
        ]
        few = f" The {_MOST_LINES} best of {len(ended)}." if len(ended) > _MOST_LINES else ""
        made.append(
            curves(
                f"loss_{axis}",
                f"Loss over {axis}",
                f"Held out, mean over seeds.{few}",
                lines,
                x=axis,
                y="nats per token",
            )
        )
    return [chart for chart in made if chart is not None]


def _mean_line(label: str, axis: str, runs: Sequence[Record]) -> Line:
    """The runs of a variant have the same steps."""
    name, columns = ("val_loss", [run.validation for run in runs])
    if any(name not in one for one in columns):
        name, columns = ("loss", [run.training for run in runs])
    count = min(len(one[name]) for one in columns)
    x = np.mean([run.axis(axis, one["step"][:count]) for run, one in zip(runs, columns, strict=True)], axis=0)
    return Line(label, x, np.mean([one[name][:count] for one in columns], axis=0), marked=name == "val_loss")


def _with_interval(value: float, half: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def _without_nan(value: object) -> object:
    """JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
