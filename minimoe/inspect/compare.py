"""`minimoe compare`: a mixture of experts beside its dense twins, at equal tokens and at equal seconds.

One twin has as many parameters as the MoE uses for a token, the other as many as it has in all. All runs of a seed take
turns on the machine, and have the same data in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from minimoe.config import PretrainRun, TrainingRun
from minimoe.config.file import load_config
from minimoe.errors import UserError
from minimoe.inspect.results import Result, show
from minimoe.inspect.sweep import Budget, steps_of
from minimoe.inspect.trials import Trial, progress_bar, run_by_seeds, step_seconds
from minimoe.model.config import with_defaults

MOE = "MoE"
TWINS = {"dense, equal active": True, "dense, equal total": False}


def dense_twin(config: PretrainRun, active: bool) -> PretrainRun:
    """The same run with dense layers alone, as wide as what a token uses, or as all that there is."""
    values = with_defaults(config.model or {})
    layers, dense = values["num_hidden_layers"], min(values["first_k_dense_replace"], values["num_hidden_layers"])
    routed = values["num_experts_per_tok" if active else "num_experts"]
    width = (routed + values["n_shared_experts"]) * values["moe_intermediate_size"]
    mean = (dense * values["intermediate_size"] + (layers - dense) * width) / layers
    own = {"first_k_dense_replace": layers, "intermediate_size": max(round(mean), 1)}
    own |= {"router_bias_update_rate": 0.0, "num_zero_computation_experts": 0, "frozen_experts": None}
    dumped = config.model_dump(mode="json")
    return PretrainRun.model_validate(dumped | {"model": {**(config.model or {}), **own}})


def run(
    config: str,
    words: Sequence[str],
    *,
    seconds: float | None,
    seeds: int,
    out: str | None,
    json_output: bool,
) -> None:
    """Run what is missing, then write the table and the page."""
    moe = load_config(TrainingRun, config, words)
    if not isinstance(moe, PretrainRun) or moe.init_from is not None or moe.model is None:
        raise UserError(
            "a comparison needs a run that pretrains from scratch", fix="give a config with a model: section"
        )
    values = with_defaults(moe.model)
    if values["first_k_dense_replace"] >= values["num_hidden_layers"]:
        raise UserError("the model is dense: there is nothing to compare", fix="lower model.first_k_dense_replace")
    folder = Path(out or f"{moe.output_dir}-compare")
    trials = run_all(moe, seconds, folder, seeds=seeds)
    show(
        trials,
        folder,
        f"{Path(config).name} beside its dense twins",
        "the same tokens or the same seconds of training",
        baseline=MOE,
        findings=findings,
        json_output=json_output,
    )


def run_all(moe: PretrainRun, seconds: float | None, folder: Path, *, seeds: int) -> list[Trial]:
    """The MoE once, each twin twice: with the MoE's tokens, and with its seconds."""
    configs = {MOE: moe} | {name: dense_twin(moe, active) for name, active in TWINS.items()}
    with progress_bar() as bar:
        timed = step_seconds(configs, folder, len(configs), bar)
        steps = steps_of(moe, Budget("seconds" if seconds else "steps", seconds), timed[MOE])
        planned = [(MOE, moe, steps)]
        for name in TWINS:
            planned.append((f"{name}, tokens", configs[name], steps))
            planned.append((f"{name}, seconds", configs[name], max(round(steps * timed[MOE] / timed[name]), 1)))
        return run_by_seeds(planned, folder, seeds, len(planned), bar)


def findings(found: Sequence[Result]) -> list[str]:
    """A sentence for each twin and axis: who wins, by how much, or that nothing is shown."""
    moe = found[0]
    sentences = []
    for one in found[1:]:
        twin, _, axis = one.variant.rpartition(", ")
        change, half = one.change, one.change_interval
        if math.isnan(change):
            continue
        by = f"{abs(change):.4f} nats per token"
        if math.isnan(half):
            ahead = "the MoE" if change > 0 else "the dense twin"
            said = f"{ahead} is ahead by {by} (one seed: by chance or not is not known)"
        elif abs(change) <= half:
            said = f"no difference shown ({change:+.4f} ± {half:.4f} for the twin)"
        else:
            said = f"{'the MoE' if change > 0 else 'the dense twin'} is ahead by {by} (± {half:.4f})"
        used = f"{one.seconds:.0f} s against {moe.seconds:.0f} s" if axis == "tokens" else _tokens(one, moe)
        sentences.append(f"{twin} parameters, equal {axis}: {said}; {used}.")
    return sentences


def _tokens(one: Result, moe: Result) -> str:
    tokens = f"{one.tokens / 1e6:.2f}M tokens against {moe.tokens / 1e6:.2f}M"
    return f"{tokens}, {one.seconds:.0f} s against {moe.seconds:.0f} s"
