"""`minimoe sweep`: one config with other values of some keys, at an equal budget, over seeds; one table.

Every combination of the values is a variant. Its runs are ordinary ones; they take turns on the machine, those of one
seed together, and start with the same data in the same order. Started again, the command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minimoe.config import TrainingRun
from minimoe.config.file import load_config
from minimoe.errors import UserError
from minimoe.inspect.results import show
from minimoe.inspect.trials import progress_bar, run_by_seeds, step_seconds
from minimoe.model.config import with_defaults
from minimoe.model.costs import training_flops
from minimoe.tokenizer import load_tokenizer
from minimoe.train.metrics import duration
from minimoe.train.pretrain import complete_architecture

MOST_VARIANTS = 200
AS_IT_IS = "as it is"


class Budget(NamedTuple):
    """What every run may use."""

    kind: Literal["seconds", "tokens", "flops", "steps"]  # steps: those of its config
    amount: float | None

    def __str__(self) -> str:
        if self.amount is None:
            return "the config's own steps"
        return f"{duration(self.amount)} of training" if self.kind == "seconds" else f"{self.amount:,.3g} {self.kind}"


def variants_of(config: str, words: Sequence[str], also: Sequence[str] = ()) -> dict[str, TrainingRun]:
    """Each combination of `key=a,b,c`, by its name; `key=a` holds for all.

    Args:
        also: variants of their own, as "key=a key=b"; beside them the config as it is, where no key has several values.

    Raises:
        UserError: a value is wrong, or there is nothing to vary.
    """
    fixed, axes = [], []
    for word in words:
        key, _, text = word.partition("=")
        values = split_values(text)
        if len(values) > 1:
            axes.append([f"{key}={value}" for value in values])
        else:
            fixed.append(word)
    count = math.prod(len(axis) for axis in axes)
    if not axes and not also:
        raise UserError("there is nothing to vary", fix="give a key several values: optimizer.lr=0.001,0.002")
    if count > MOST_VARIANTS:
        raise UserError(f"{count} combinations, at most {MOST_VARIANTS}", fix="give fewer values")
    found = {}
    for chosen in itertools.product(*axes):
        found[" ".join(chosen) or AS_IT_IS] = load_config(TrainingRun, config, [*fixed, *chosen])
    for text in also:
        found[text] = load_config(TrainingRun, config, [*fixed, *text.split()])
    if len(found) < count + len(also):
        raise UserError("a value is given twice", fix="give each once")
    return found


def split_values(text: str) -> list[str]:
    """Parts between commas that stand in no brackets or quotes: 'a,[b,c],"d,e"' -> a | [b,c] | "d,e"."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
            if sign == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += sign
    return [part.strip() for part in parts]


def steps_of(config: TrainingRun, budget: Budget, seconds_a_step: float | None) -> int:
    """Steps that the budget buys."""
    tokens_a_step = config.train.batch_size * config.data.sequence_length
    if budget.amount is None:
        if config.train.max_steps is None:
            raise UserError("the config counts epochs", fix="give --seconds, --tokens, --flops or train.max_steps")
        return config.train.max_steps
    if budget.kind == "seconds":
        assert seconds_a_step is not None
        steps = budget.amount / seconds_a_step
    elif budget.kind == "tokens":
        steps = budget.amount / tokens_a_step
    else:
        values = getattr(config, "model", None)
        if values is None:
            raise UserError("--flops needs a model: section", fix="give --tokens or --seconds")
        steps = budget.amount / (tokens_a_step * _flops(config))
    return max(round(steps), 1)


def _flops(config: Any) -> float:
    """Of training on a token."""
    values = complete_architecture(config.model, load_tokenizer(config.tokenizer_source), config.data.sequence_length)
    return training_flops(with_defaults(values), config.data.sequence_length)


def run(
    config: str,
    words: Sequence[str],
    budget: Budget,
    *,
    also: Sequence[str],
    seeds: int,
    out: str | None,
    at_once: int,
    json_output: bool,
) -> None:
    """Run what is missing, then write the table and the page."""
    variants = variants_of(config, words, also)
    folder = Path(out or f"{next(iter(variants.values())).output_dir}-sweep")
    with progress_bar() as bar:
        timed = step_seconds(variants, folder, at_once, bar) if budget.kind == "seconds" else {}
        planned = [(name, config, steps_of(config, budget, timed.get(name))) for name, config in variants.items()]
        trials = run_by_seeds(planned, folder, seeds, at_once, bar)
    show(trials, folder, f"Sweep of {Path(config).name}", f"{budget} for each run", json_output=json_output)
