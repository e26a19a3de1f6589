"""`minimoe plan`: what a run will cost, before it starts.

Parameters, operations and tokens are arithmetic. Time, memory and disk are measured: the run's own command takes a few
steps in a temporary folder, with its validation and its checkpoint, and what it took is carried on to the whole run.
Whatever a stage does in a step is so counted, and a change of the code needs no change here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimoe.config import TrainingRun
from minimoe.config.file import dump_config
from minimoe.device import pick_device
from minimoe.errors import MinimoeError, UserError
from minimoe.inspect.cluster import GPUS, check_cluster, choose, estimate
from minimoe.inspect.record import Record, read_run
from minimoe.model.config import num_parameters, with_defaults
from minimoe.model.costs import TRAINING, flops_by_part, parameters_by_part
from minimoe.tokenizer import load_tokenizer
from minimoe.train.files import CHECKPOINTS
from minimoe.train.memory import process_peak
from minimoe.train.metrics import duration
from minimoe.train.pretrain import complete_architecture
from minimoe.train.sharding import resolve
from minimoe.train.shares import Work, held_by_gpu

_FIRST_STEPS = 8  # of the first rehearsal
# Of training in the second: a share of the run, as machines get slower when they are busy for long.
_SHARE, _LEAST_SECONDS, _MOST_SECONDS = 1 / 6, 12.0, 60.0
_MOST_STEPS = 400
_PROGRAM_BYTES = 450e6  # what Python, torch and transformers take before there is a model


@dataclass
class Plan:
    """What a run will cost. Bytes and seconds."""

    stage: str
    parameters: dict[str, Any]  # total, active, trained, and by_part
    flops: dict[str, Any]  # per_token of training, total, and by_part of a token's forward pass
    steps: int | None  # None: not known before the data is read
    tokens: int | None
    tokens_per_parameter: float | None
    memory: dict[str, Any]  # peak_bytes, available_bytes, by_kind, fits
    # seconds (None: not measured), and of that evaluation_, sample_ and other_seconds; step_seconds is one step's
    time: dict[str, float | None]
    disk_bytes: int
    cluster: dict[str, Any] | None = None  # of --gpus: layout, traffic and times of a step, from formulas
    advice: list[str] = field(default_factory=list)


class _Failed(MinimoeError):
    """The rehearsal's own error, as the run would end."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text.removeprefix("error: "))
        self.exit_code = code


def run(config: TrainingRun, *, gpus: int | None = None, gpu: str = "h100", json_output: bool = False) -> None:
    """Measure here, or estimate for GPUs elsewhere; then print."""
    console = Console(stderr=True)
    with console.status("a few steps of the run, to see what they take"):
        plan = make_plan(config) if gpus is None else cluster_plan(config, gpus, gpu)
    print(json.dumps(asdict(plan))) if json_output else _print(plan, config)


def make_plan(config: TrainingRun) -> Plan:
    """Rehearse the run and add up.

    Raises:
        MinimoeError: the run itself would end so.
    """
    available = physical_memory(config)
    if (refusal := too_large(config, available)) is not None:
        return refusal
    with tempfile.TemporaryDirectory(prefix="minimoe-plan-") as folder:
        seen = _rehearse(config, Path(folder) / "first", _FIRST_STEPS)
        total = config.train.total_steps(seen.run.facts["rows_per_epoch"]) * seen.step_seconds
        seconds = min(max(_SHARE * total, _LEAST_SECONDS), _MOST_SECONDS)
        if seen.training_seconds < seconds / 2:
            steps = min(_MOST_STEPS, math.ceil(seconds / max(seen.step_seconds, 1e-3)))
            seen = _rehearse(config, Path(folder) / "second", max(steps, _FIRST_STEPS))
        return _carried_on(config, seen, available)


@dataclass
class Rehearsal:
    """What a few steps took."""

    run: Record
    architecture: dict[str, Any]
    wall_seconds: float
    training_seconds: float
    step_seconds: float
    sample_seconds: float  # of one round of samples
    peak_bytes: int
    weight_bytes: int  # as saved in a checkpoint
    moment_bytes: int
    checkpoint_bytes: int
    final_bytes: int


def _rehearse(config: TrainingRun, folder: Path, steps: int) -> Rehearsal:
    values = config.model_dump(mode="json")
    values["output_dir"] = str(folder)
    values["train"] |= {"max_steps": steps, "epochs": None, "log_every": 1, "eval_every": steps, "save_every": steps}
    if config.train.sample_every:
        values["train"]["sample_every"] = steps
    values["logging"] |= {"trackers": (), "report": False}
    file = folder.with_suffix(".yaml")
    file.write_text(dump_config(type(config).model_validate(values)), encoding="utf-8")
    started = time.monotonic()
    command = [sys.executable, "-m", "minimoe.cli", config.stage, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wall = time.monotonic() - started
    if result.returncode:
        text = result.stderr.strip() or f"a few steps of the run ended with exit code {result.returncode}"
        raise _Failed(text, result.returncode if result.returncode > 0 else 2)
    seen = read_run(folder)
    seconds = np.diff(seen.training["seconds"], prepend=0.0)
    checkpoint = next((folder / CHECKPOINTS).iterdir())
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    weights = sum(size for name, size in sizes.items() if name.startswith(("model", "adapter_model")))
    on_gpu = "memory_bytes" in seen.training and seen.facts["environment"]["device"] not in ("cpu", "mps")
    peak = int(seen.training["memory_bytes"][-1]) if on_gpu else process_peak(children=True)
    return Rehearsal(
        run=seen,
        architecture=with_defaults(json.loads((folder / "final" / "config.json").read_text(encoding="utf-8")))
        if (folder / "final" / "config.json").is_file()
        else with_defaults(seen.facts["architecture"]),
        wall_seconds=wall,
        training_seconds=float(seen.training["seconds"][-1]),
        step_seconds=float(np.mean(seconds[len(seconds) // 2 :])),  # when the machine has warmed up
        sample_seconds=sum(sample.get("seconds", 0.0) for sample in seen.samples),
        peak_bytes=peak,
        weight_bytes=weights,
        moment_bytes=sum(size for name, size in sizes.items() if name.startswith("optimizer")),
        checkpoint_bytes=sum(sizes.values()),
        final_bytes=sum(file.stat().st_size for file in (folder / "final").iterdir()),
    )


def _carried_on(config: TrainingRun, seen: Rehearsal, available: int) -> Plan:
    """From a few steps to the whole run."""
    facts, train = seen.run.facts, config.train
    steps = train.total_steps(facts["rows_per_epoch"])
    tokens_per_step = float(seen.run.training["tokens"][-1]) / len(seen.run.steps)
    tokens = round(tokens_per_step * steps)
    evaluation = float(np.nansum(seen.run.validation.get("evaluation_seconds", np.zeros(1))))
    evaluations = math.ceil(steps / train.eval_every)
    samples = seen.sample_seconds * math.ceil(steps / (train.sample_every or steps))
    # start, data, the last save, the end
    rest = seen.wall_seconds - seen.training_seconds - evaluation - seen.sample_seconds
    parameters, flops = facts["parameters"], flops_by_part(seen.architecture, config.data.sequence_length)
    per_token = TRAINING * sum(flops.values())
    held = {
        "weights": 4 * parameters["total"],
        "gradients": 4 * parameters["trained"],
        "moments": seen.moment_bytes,
        "copy while saving": seen.weight_bytes + seen.moment_bytes,
    }
    held["program, activations, workspace"] = max(seen.peak_bytes - sum(held.values()), 0)
    checkpoints = min(train.keep_last + 1, math.ceil(steps / train.save_every))  # the best may be an older one
    plan = Plan(
        stage=config.stage,
        parameters=parameters | {"by_part": parameters_by_part(seen.architecture)},
        flops={"per_token": per_token, "total": per_token * tokens, "by_part": flops},
        steps=steps,
        tokens=tokens,
        tokens_per_parameter=tokens / parameters["total"],
        memory={
            "peak_bytes": seen.peak_bytes,
            "available_bytes": available,
            "by_kind": held,
            "fits": seen.peak_bytes <= available,
        },
        time={
            "seconds": steps * seen.step_seconds + evaluations * evaluation + samples + rest,
            "step_seconds": seen.step_seconds,
            "evaluation_seconds": evaluations * evaluation,
            "sample_seconds": samples,
            "other_seconds": rest,
        },
        disk_bytes=checkpoints * seen.checkpoint_bytes + seen.final_bytes,
    )
    if not plan.memory["fits"]:
        plan.advice.append(smaller_batch(config, plan))
    return plan


def cluster_plan(config: TrainingRun, gpus: int, gpu: str) -> Plan:
    """From formulas alone, with the config's `parallel:` section or the layout that takes the least time.

    Raises:
        UserError: no such GPU, rows that cannot be shared out, no architecture or no number of steps in the config.
    """
    train, values = config.train, getattr(config, "model", None)
    if values is None or train.max_steps is None:
        raise UserError("--gpus needs a model: section and train.max_steps", fix="give both")
    check_cluster(gpus, gpu, train.batch_size)
    length = config.data.sequence_length
    architecture = with_defaults(complete_architecture(values, load_tokenizer(config.tokenizer_source), length))
    work = Work(train.batch_size, length, train.micro_batch_size, config.optimizer.name, train.gradient_checkpointing)
    if config.parallel is None:
        found = choose(architecture, work, gpus, gpu)
    else:
        found = estimate(architecture, work, gpus, gpu, resolve(config.parallel, gpus))
    plan = Plan(
        **_arithmetic(config, architecture),
        memory={
            "peak_bytes": int(found.memory_bytes),
            "available_bytes": int(GPUS[gpu].memory),
            "by_kind": held_by_gpu(found.memory, found.layout),
            "kept_by_host": sum(found.memory.values()) - found.memory_bytes,
            "fits": found.fits,
        },
        time={"seconds": train.max_steps * found.step_seconds, "step_seconds": found.step_seconds},
        disk_bytes=int((found.memory["weights"] + found.memory["moments"]) * found.layout.fsdp_size)
        * min(train.keep_last + 1, math.ceil(train.max_steps / train.save_every)),
        cluster=asdict(found)
        | {"layout": found.layout._asdict(), "traffic": found.traffic._asdict(), "described": str(found.layout)},
    )
    if not found.fits:
        plan.advice.append(
            "does not fit: more GPUs, a smaller train.micro_batch_size, train.gradient_checkpointing, or "
            "parallel.cpu_offload"
        )
    return plan


def _arithmetic(config: TrainingRun, architecture: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan that nothing has to run for; None for what the number of steps would tell."""
    total, active = (num_parameters(architecture, active=choice) for choice in (False, True))
    flops, steps = flops_by_part(architecture, config.data.sequence_length), config.train.max_steps
    per_token = TRAINING * sum(flops.values())
    tokens = None if steps is None else steps * config.train.batch_size * config.data.sequence_length
    return {
        "stage": config.stage,
        "parameters": {
            "total": total,
            "active": active,
            "trained": total,
            "by_part": parameters_by_part(architecture),
        },
        "flops": {"per_token": per_token, "total": None if tokens is None else per_token * tokens, "by_part": flops},
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": None if tokens is None else tokens / total,
    }


def too_large(config: TrainingRun, available: int) -> Plan | None:
    """A plan that says so, where weights, gradients and moments alone do not fit."""
    values = getattr(config, "model", None)
    if values is None:
        return None
    tokenizer = load_tokenizer(config.tokenizer_source)
    architecture = with_defaults(complete_architecture(values, tokenizer, config.data.sequence_length))

    def needed(architecture: dict[str, Any]) -> int:
        count = num_parameters(architecture)
        moments = 8 if config.optimizer.name == "adamw" else 4
        return count * (4 + 4 + moments)

    if needed(architecture) <= available:
        return None
    advice = f"this takes {_gb(needed(architecture))} without activations, there are {_gb(available)}"
    experts = architecture["num_experts"]
    while experts > architecture["num_experts_per_tok"] and needed(architecture | {"num_experts": experts}) > available:
        experts -= 1
    if needed(architecture | {"num_experts": experts}) <= available:
        advice += f"; the smallest change that fits: model.num_experts={experts}"
    else:
        advice += "; lower model.hidden_size or model.num_hidden_layers"
    return Plan(
        **_arithmetic(config, architecture),
        memory={"peak_bytes": needed(architecture), "available_bytes": available, "by_kind": {}, "fits": False},
        time={"seconds": None},
        disk_bytes=0,
        advice=[advice],
    )


def smaller_batch(config: TrainingRun, plan: Plan) -> str:
    """The largest micro-batch that fits, activations taken as proportional to its rows."""
    kinds, available = plan.memory["by_kind"], plan.memory["available_bytes"]
    rows = config.train.micro_rows(1)
    activations = max(kinds["program, activations, workspace"] - _PROGRAM_BYTES, 0)
    fixed = plan.memory["peak_bytes"] - activations
    for count in range(rows - 1, 0, -1):
        if config.train.batch_size % count == 0 and fixed + activations * count / rows <= available:
            return f"the smallest change that fits: train.micro_batch_size={count}"
    return "the smallest change that fits: train.gradient_checkpointing=true, or fewer experts (model.num_experts)"


def physical_memory(config: TrainingRun) -> int:
    """Bytes of the device that the run would use."""
    device = pick_device(config.train.device, where="train.device")
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _print(plan: Plan, config: TrainingRun) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    parts = {name: count for name, count in plan.parameters["by_part"].items() if count}
    kinds = ", ".join(f"{name} {_gb(size)}" for name, size in plan.memory["by_kind"].items())
    total = sum(plan.flops["by_part"].values())
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in plan.flops["by_part"].items() if count)
    rows = {
        "parameters": f"{plan.parameters['total']:,} total, {plan.parameters['active']:,} active per token",
        "": ", ".join(f"{name} {count:,}" for name, count in parts.items()),
        "length": _length(plan),
        "operations": f"{plan.flops['per_token']:.3g} FLOPs a token; {shares}",
        "memory": f"{_gb(plan.memory['peak_bytes'])} of {_gb(plan.memory['available_bytes'])}",
        " ": kinds,
        "time": "" if plan.cluster else _time(plan),
        "disk": f"at most {_gb(plan.disk_bytes)} in {config.output_dir}" if plan.disk_bytes else "",
    }
    if plan.cluster is not None:
        rows |= _of_cluster(plan)
    rows |= {f"advice{' ' * number}": text for number, text in enumerate(plan.advice)}
    for name, value in rows.items():
        if value:
            bad = name.startswith("advice") or (name == "memory" and not plan.memory["fits"])
            table.add_row(Text(name.strip(), style="dim"), Text(f"✗ {value}" if bad else value, "red" if bad else ""))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def _of_cluster(plan: Plan) -> dict[str, str]:
    """From formulas: what one GPU does in a step."""
    assert plan.cluster is not None
    found = plan.cluster
    sent = ", ".join(f"{name} {_gb(count)}" for name, count in found["traffic"].items())
    return {
        "memory": f"{_gb(plan.memory['peak_bytes'])} of {_gb(plan.memory['available_bytes'])} of each GPU",
        "layout": f"{found['gpus']:,} x {found['gpu']}: {found['described']}",
        "sent a step": f"{sent}, by each GPU",
        "time": f"{duration(plan.time['seconds'] or 0)}: {plan.time['step_seconds']:.3g} s a step; computing "
        f"{found['compute_seconds']:.3g} s, or weights on their way {found['weights_seconds']:.3g} s, then tokens "
        f"{found['tokens_seconds']:.3g} s",
        "how": "from formulas, none of it measured: docs/scale.md",
    }


def _length(plan: Plan) -> str:
    if plan.steps is None:
        return "known when the data is read"
    found = f"{plan.steps:,} steps, {plan.tokens:,} tokens, {plan.tokens_per_parameter:.1f} per parameter"
    return f"{found}, {plan.flops['total']:.3g} FLOPs"


def _time(plan: Plan) -> str:
    seconds = plan.time["seconds"]
    if seconds is None:
        return "not measured"
    names = {"validation": "evaluation", "samples": "sample", "start and end": "other"}
    parts = [f"{name} {duration(plan.time[f'{key}_seconds'] or 0.0)}" for name, key in names.items()]
    return f"{duration(seconds)}: {plan.time['step_seconds']:.3g} s a step, {', '.join(parts)}"
