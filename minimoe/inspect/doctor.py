"""`minimoe doctor`: are this machine and this run as they should be: each line good, a warning or bad, with the fix."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimoe import ops
from minimoe.device import has_bf16, pick_device
from minimoe.errors import EXIT_USER, UserError
from minimoe.inspect.record import read_run
from minimoe.inspect.report import how_it_ended
from minimoe.model.config import MiniMoeConfig, with_defaults
from minimoe.model.costs import training_flops
from minimoe.model.dispatch import DISPATCHES
from minimoe.model.experts import Experts
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.ops.door import VARIABLE
from minimoe.train.checkpoint import newest_first, verify
from minimoe.train.files import CHECKPOINTS

_SMALL = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 8}
_SMALL |= {"num_key_value_heads": 2, "moe_intermediate_size": 256, "max_position_embeddings": 256}
_PATHS_AGREE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of the largest entry, relative
_LEAST_DISK = 2e9
_REACH_SECONDS = 3.0
_SIGNS = {"good": "✓", "warning": "!", "bad": "✗"}


@dataclass
class Finding:
    """One line."""

    name: str
    state: str  # good, warning or bad
    text: str
    fix: str = ""


def run(folder: str | None = None, *, json_output: bool = False) -> int:
    """Look at the machine, or at a run too; the exit code is 2 when something is bad."""
    checks = [*MACHINE, *([_of_run(Path(folder))] if folder else [])]
    findings: list[Finding] = []
    console = Console()
    for check in checks:
        with console.status("looking") if console.is_terminal and not json_output else open(os.devnull):
            findings += guarded(check)
    if json_output:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print(findings, console)
    return EXIT_USER if any(finding.state == "bad" for finding in findings) else 0


def guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check that fails itself is a finding too."""
    try:
        return list(check())
    except UserError:
        raise
    except Exception as error:
        return [Finding(check.__name__.strip("_"), "bad", f"{type(error).__name__}: {error}")]


def versions() -> Iterator[Finding]:
    """Are the libraries those that minimoe asks for."""
    wrong, found = [], [f"Python {sys.version.split()[0]}"]
    for text in importlib.metadata.requires("minimoe") or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if needed.name in ("torch", "transformers"):
            found.append(f"{needed.name} {version}")
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} {version}, needed {needed.specifier}")
    state = "bad" if wrong else "good"
    yield Finding("versions", state, "; ".join(wrong) or ", ".join(found), "pip install -e ." if wrong else "")


def device() -> Iterator[Finding]:
    """Where a run would be, and in which precision."""
    place = pick_device("auto")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    precision = "bf16" if has_bf16(place) else "fp32, as bf16 would be emulated"
    yield Finding("device", "good", f"{name}; precision auto is {precision}")


def operators() -> Iterator[Finding]:
    """Is there a compiler for the faster forms."""
    text = ops.describe(pick_device("auto"))
    slow = "slower" in text or "plain torch" in text
    fix = f"unset {VARIABLE}" if "plain torch" in text else "install a C++ compiler (g++ or clang++)"
    yield Finding("operators", "warning" if slow else "good", text, fix if slow else "")


def load() -> Iterator[Finding]:
    """Do other processes want the cores."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    text = f"{cores} cores, {threads} threads, load of the last minute {busy:.1f}"
    if busy > 0.5 * cores:
        yield Finding("load", "warning", text, "other processes compute: a run will be slower, and timings are off")
    elif threads > cores:
        yield Finding("load", "warning", text, f"set OMP_NUM_THREADS={cores}")
    else:
        yield Finding("load", "good", text)


def dispatch_paths() -> Iterator[Finding]:
    """Both paths, in plain torch and by the forms that run here: one function, in values and gradients."""
    place = pick_device("auto")
    for dtype in (torch.float32, *([torch.bfloat16] if has_bf16(place) else [])):
        torch.manual_seed(0)
        experts = Experts(MiniMoeConfig(**_SMALL)).to(place, dtype)
        for weight in experts.parameters():
            torch.nn.init.normal_(weight, std=0.06)
        tokens = torch.randn(192, 256, device=place, dtype=dtype)
        ids = torch.rand(192, 8, device=place).topk(2).indices
        weights = torch.rand(192, 2, device=place, dtype=torch.float32).to(dtype)
        with ops.using():
            expected = _outcome(next(iter(DISPATCHES.values())), experts, tokens, ids, weights)
        worst, count = 0.0, 0
        for dispatch in DISPATCHES.values():
            for backends in (frozenset[str](), ops.enabled()):
                with ops.using(*backends):
                    for got, want in zip(_outcome(dispatch, experts, tokens, ids, weights), expected, strict=True):
                        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
                count += 1
        good = worst <= _PATHS_AGREE[dtype]
        text = f"{count} ways to compute, {str(dtype).removeprefix('torch.')}: largest relative difference {worst:.1e}"
        yield Finding("dispatch paths", "good" if good else "bad", text, "" if good else f"{VARIABLE}=plain is safe")


def _outcome(dispatch: Any, experts: Experts, tokens: Any, ids: Any, weights: Any) -> list[torch.Tensor]:
    """Values and all gradients, in float32."""
    experts.zero_grad()
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    y = dispatch(tokens, ids, weights, experts)
    y.float().square().sum().backward()
    grads = [tokens.grad, weights.grad, *(weight.grad for weight in experts.parameters())]
    return [y.detach().float(), *(grad.float() for grad in grads if grad is not None)]


def speed() -> Iterator[Finding]:
    """A training step's operations beside those of a large matmul on this machine."""
    place = pick_device("auto")
    a = torch.randn(1024, 1024, device=place)
    ceiling = 2 * 1024**3 / _seconds(lambda: a @ a, place)
    torch.manual_seed(0)
    model = MiniMoeForCausalLM(MiniMoeConfig(**_SMALL)).to(place).train()
    ids = torch.randint(0, 1024, (8, 256), device=place)

    def step() -> None:
        model(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
        model.zero_grad()

    reached = ids.numel() * training_flops(with_defaults(_SMALL), 256) / _seconds(step, place)
    text = f"{reached / 1e9:,.0f} GFLOP/s in training, {reached / ceiling:.0%} of a large matmul's {ceiling / 1e9:,.0f}"
    slow = place.type == "cpu" and reached < 0.25 * ceiling
    yield Finding("speed", "warning" if slow else "good", text, "see operators and load above" if slow else "")


def _seconds(act: Callable[[], Any], place: torch.device) -> float:
    times = []
    for _ in range(6):
        started = time.perf_counter()
        act()
        if place.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def disk() -> Iterator[Finding]:
    """Room for checkpoints here."""
    free = shutil.disk_usage(".").free
    low = free < _LEAST_DISK
    yield Finding("disk", "warning" if low else "good", f"{free / 1e9:,.1f} GB free here", "free some" if low else "")


def networks() -> Iterator[Finding]:
    """Can the hub and wandb be reached; neither is needed."""
    import wandb
    from huggingface_hub import constants

    offline = "nothing to do: local files and trackers work without"
    for name, address in (("hub", constants.ENDPOINT), ("wandb", wandb.Settings().base_url)):
        try:
            with urllib.request.urlopen(address, timeout=_REACH_SECONDS):
                yield Finding(name, "good", f"{address} answers")
        except urllib.error.HTTPError as error:  # somebody is there
            yield Finding(name, "good", f"{address} answers ({error.code})")
        except (OSError, ValueError) as error:
            yield Finding(name, "warning", f"{address} cannot be reached ({error})", offline)


MACHINE = (versions, device, operators, load, dispatch_paths, speed, disk, networks)


def _of_run(folder: Path) -> Callable[[], Iterator[Finding]]:
    def this_run() -> Iterator[Finding]:
        run = read_run(folder)
        ended = how_it_ended(run)[1]
        state = {"good": "good", "warn": "warning", "bad": "bad"}[ended.kind]
        yield Finding("run", state, ended.text, "start the same command with --resume" if state == "bad" else "")
        yield from checkpoints(folder)
        yield from metrics(run)

    return this_run


def checkpoints(folder: Path) -> Iterator[Finding]:
    """Is every checkpoint as it was written."""
    found = newest_first(folder / CHECKPOINTS)
    broken = {path.name: reason for path in found if (reason := verify(path)) is not None}
    if broken:
        text = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        rest = "--resume takes the newest good one" if len(broken) < len(found) else "start again with --overwrite"
        yield Finding("checkpoints", "bad", text, rest)
    elif found:
        yield Finding("checkpoints", "good", f"{len(found)}, every file as its checksum says")
    else:
        yield Finding("checkpoints", "warning", "none", "lower train.save_every")


def metrics(run: Any) -> Iterator[Finding]:
    """Do the rows make sense, and do the experts all work."""
    steps, loss = run.steps, run.training.get("loss")
    if not len(steps):
        yield Finding("metrics", "warning", "no step is logged yet")
        return
    problems = []
    if (steps[1:] <= steps[:-1]).any():
        problems.append("steps are not in order")
    missing = int((~torch.isfinite(torch.from_numpy(loss))).sum())
    if missing:
        problems.append(f"{missing} rows with a loss that is not finite")
    kinds = [str(row["event"]) for row in run.events]
    problems += [f"{kinds.count(kind)} x {kind.replace('_', ' ')}" for kind in dict.fromkeys(kinds)]
    first, last = float(loss[: max(1, len(loss) // 10)].mean()), float(loss[-max(1, len(loss) // 10) :].mean())
    if len(loss) >= 20 and not last < first:
        problems.append(f"the loss does not fall: {first:.3f} at first, {last:.3f} at last")
    text = "; ".join(problems) or f"{run.drawn_of:,} rows, loss from {first:.3f} to {last:.3f}"
    yield Finding("metrics", "warning" if problems else "good", text, "look at report.html" if problems else "")
    loads = run.layers.get("expert_load")
    if loads is not None and loads.shape[1]:
        least = float(loads[-max(1, len(loads) // 10) :].mean(0).min())
        idle = least < 0.1 and not math.isnan(least)
        fix = "raise model.router_aux_loss_coef, or use router_bias_update_rate" if idle else ""
        yield Finding("experts", "warning" if idle else "good", f"the least used has {least:.2f} of a fair share", fix)


def _print(findings: list[Finding], console: Console) -> None:
    table = Table(show_header=False, box=None, padding=(0, 1))
    colours = {"good": "green", "warning": "yellow", "bad": "red"}
    for finding in findings:
        fix = f"\n→ {finding.fix}" if finding.fix else ""
        table.add_row(Text(_SIGNS[finding.state], colours[finding.state]), finding.name, Text(finding.text + fix))
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    counts = [f"{sum(f.state == state for f in findings)} {state}" for state in _SIGNS]
    console.print(", ".join(counts), highlight=False)
