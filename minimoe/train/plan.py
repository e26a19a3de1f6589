"""What a run will do, printed before it does it: sizes, data, steps, tokens per parameter, estimated time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimoe import ops
from minimoe.adapters import has_adapter
from minimoe.config import ScheduleConfig, TrainConfig
from minimoe.data.formats import left_aside
from minimoe.device import has_bf16
from minimoe.model.config import num_parameters
from minimoe.train.metrics import duration
from minimoe.train.objectives import Step
from minimoe.train.optim import Muon, newton_schulz
from minimoe.train.parallel import fast_float32
from minimoe.train.sharding import Layout, local, resolve
from minimoe.train.shares import Work, held_by_gpu, memory, traffic
from minimoe.train.snapshot import get_rng, set_rng

if TYPE_CHECKING:
    from minimoe.train.loop import Run

_LEFT_OUT = ("bad_rows", "empty_rows", "dropped", "truncated")  # of the counts of the data


def print_plan(run: Run, step_seconds: float) -> None:
    """What the run will do, before it does it; a step takes so long."""
    config, train, data, accelerator = run.config, run.config.train, run.data, run.accelerator
    architecture, total_steps, done = run.model.config, run.total_steps, run.state.step
    total, active = (num_parameters(vars(architecture), active=choice) for choice in (False, True))
    tokens_per_step = train.batch_size * config.data.sequence_length
    tokens = total_steps * tokens_per_step
    timed = config.stage != "grpo"
    seconds = step_seconds * (total_steps - done) if timed else 0.0
    layout = resolve(config.parallel, accelerator.num_processes) if config.parallel else None
    share = architecture.num_experts_per_tok / architecture.num_experts
    unit = f"rows of {config.data.sequence_length} tokens" if timed else "answers"
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = {
        "parameters": f"{total:,} total, {active:,} active per token",
        "experts": f"{architecture.num_experts} x {architecture.moe_intermediate_size} wide, "
        f"{architecture.num_experts_per_tok} per token, {architecture.n_shared_experts} shared, "
        f"{architecture.num_moe_layers} of {architecture.num_hidden_layers} layers"
        + ("" if architecture.router_type == "top_k" else f", chosen by {architecture.router_type}"),
        "data": f"{data.train.rows_per_epoch:,} {unit} an epoch"
        + (f", {data.validation.num_documents:,} documents held out" if data.validation else ", nothing held out"),
        "rows left out": ", ".join(f"{data.counts[key]:,} {key}" for key in _LEFT_OUT if data.counts.get(key))
        or "none",
        "steps": f"{total_steps:,} of {train.batch_size} {unit}" + (f", {done:,} already done" if done else ""),
        "tokens": f"{tokens:,} ({tokens / total:.1f} per parameter, "
        f"{total_steps * train.batch_size / data.train.rows_per_epoch:.2f} epochs)",
        "tokens per expert": f"{tokens * share:,.0f} in each layer, if balanced",
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {_schedule(config.schedule, total_steps)}",
        "precision": _precision(train, accelerator),
        "device": f"{accelerator.device.type}, {accelerator.num_processes} process(es), "
        f"{torch.get_num_threads()} threads each" + (f", {layout}" if layout else ""),
        **(_shares(run, layout) if layout else {}),
        "operators": ops.describe(accelerator.device),
        "estimated time": duration(seconds) + ", from one timed micro-batch" if timed else "see the progress bar",
        "output": config.output_dir,
    }
    if has_adapter(run.model):
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        rows["parameters"] += f"; {trained:,} trained, in adapters"
    if not timed:
        del rows["tokens"], rows["tokens per expert"]
    rows |= left_aside(config.data.train, data.ignored)
    doubts = config.optimizer.doubts()
    if not run.tokenizer.chat_template:
        doubts.append("the tokenizer has no chat template, which SFT needs: see chat_template, before this is trained")
    if architecture.num_moe_layers and architecture.num_experts_per_tok == 1 and architecture.norm_topk_prob:
        doubts.append(
            "model.norm_topk_prob makes the weight of one expert per token always 1: "
            "the router learns from the balance loss alone; pretrain with it false"
        )
    if architecture.num_moe_layers and architecture.router_type == "expert_choice":
        doubts.append(
            "experts choose tokens in training alone; in validation and generation each token chooses its experts"
        )
    for name, value in [*rows.items(), *(("warning", doubt) for doubt in doubts)]:
        table.add_row(Text(name, style="dim"), Text(value))
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width of its own
    console.print(table)


def _shares(run: Run, layout: Layout) -> dict[str, str]:
    """What each rank holds and sends, from formulas."""
    train, values, ranks = run.config.train, vars(run.model.config), run.accelerator.num_processes
    optimizer, length = run.config.optimizer.name, run.config.data.sequence_length
    work = Work(train.batch_size, length, train.micro_batch_size, optimizer, train.gradient_checkpointing)
    tokens, micros = work.on(ranks)
    value_bytes = 2 if run.accelerator.mixed_precision == "bf16" else 4
    held = memory(values, work, tokens, layout, value_bytes)
    sent = traffic(values, layout, tokens, micros, value_bytes, work.recomputed)
    by_gpu = held_by_gpu(held, layout)
    by_host = {kind: size for kind, size in held.items() if kind not in by_gpu}

    def listed(sizes: Mapping[str, float]) -> str:
        kinds = ", ".join(f"{kind} {megabytes(size)}" for kind, size in sizes.items() if size)
        return f"about {megabytes(sum(sizes.values()))}: {kinds}"

    return {
        "each rank holds": listed(by_gpu),
        **({"its host for it": listed(by_host)} if by_host else {}),
        "and sends a step": ", ".join(f"{kind} {megabytes(size)}" for kind, size in sent._asdict().items() if size)
        or "nothing",
    }


def megabytes(count: float) -> str:
    """Bytes, as a person reads them."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def estimate_step_seconds(run: Run) -> float:
    """Time one micro-batch and one orthogonalisation; weights, moments and random state are left as they were. Of a
    sharded model all ranks do it together."""
    if run.config.stage == "grpo":  # whose steps take as long as the model's answers are
        return 0.0
    rng, model, accelerator = get_rng(), run.model, run.accelerator
    micro = run.data.train.batch(0, run.micro_rows).to(accelerator.device)
    model.train()
    times = []
    for _ in range(2):  # the first also pays for allocation and kernel selection
        start = time.perf_counter()
        with accelerator.autocast(), fast_float32(model, accelerator.device):
            run.objective(model, micro, Step.of(micro)).loss.backward()
        model.zero_grad()
        _synchronise(accelerator)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for optimizer in run.optimizers:
        if isinstance(optimizer, Muon):
            for parameter in optimizer.param_groups[0]["params"]:
                part = local(parameter.detach())
                newton_schulz(part if part.ndim == 3 else part[None])
    _synchronise(accelerator)
    orthogonalisation = time.perf_counter() - start
    set_rng(rng)
    micros = math.ceil(run.config.train.batch_size / run.micro_rows / accelerator.num_processes)
    return times[-1] * micros + orthogonalisation


def _synchronise(accelerator: Accelerator) -> None:
    """Wait until a GPU has done what it was given."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _precision(train: TrainConfig, accelerator: Accelerator) -> str:
    if accelerator.mixed_precision != "bf16":
        return f"fp32 ({train.precision})"
    emulated = not has_bf16(accelerator.device)
    return f"bf16 ({train.precision})" + (", emulated: this hardware has no bf16, fp32 is faster" if emulated else "")


def _schedule(schedule: ScheduleConfig, total_steps: int) -> str:
    warmup, asked = schedule.warmup(total_steps), schedule.warmup_steps
    shortened = f", as the {asked:,} asked for are more than the run has" if warmup < asked else ""
    return f"{schedule.name} after {warmup:,} warm-up steps{shortened}" if asked else schedule.name
