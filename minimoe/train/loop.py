"""fit(): the only training loop, for pretraining and SFT alike.

One optimizer step: load the step's rows, run them in micro-batches, add up gradients of a loss that is divided by
the step's global token count (so accumulation and data-parallel training are exact), clip, set the learning rate,
step, move the routers' selection bias. Around it: logging, validation, samples, checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from minimoe.config import GenerationSection, TrainConfig, TrainingRun
from minimoe.data.loader import Batch, Data, Validation
from minimoe.errors import NonFiniteError, Preempted, UserError
from minimoe.evaluate import evaluate_model
from minimoe.generation.engine import Engine
from minimoe.loading import quiet_transformers
from minimoe.model.losses import IGNORE_INDEX
from minimoe.model.precision import has_bf16
from minimoe.model.router import TopKRouter
from minimoe.train import checkpoint
from minimoe.train.checkpoint import TrainerState
from minimoe.train.metrics import MetricsLogger
from minimoe.train.optim import Muon, build_optimizers, lr_at_step, newton_schulz, set_lr
from minimoe.train.preemption import StopRequest

_LEFT_OUT = ("bad_rows", "empty_rows", "dropped", "truncated")  # of the counts of the data


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Device, precision and process group of a run.

    Raises:
        UserError: the config asks for a device or precision that this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if train.device != "auto" and not available[train.device]:
        present = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"train.device: {train.device} is not available here", mend=f"use auto or one of: {present}")
    name = train.device if train.device != "auto" else next(n for n in ("cuda", "mps", "cpu") if available[n])
    bf16 = train.precision == "bf16" or (train.precision == "auto" and has_bf16(torch.device(name)))
    return Accelerator(
        cpu=name == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        # Every rank computes the same selection bias itself; rank 0's copy must not overwrite it each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def fit(
    model: Any,
    tokenizer: Any,
    data: Data,
    config: TrainingRun,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> Path:
    """Train `model` in place and return the folder of the final model.

    Args:
        model: a `MiniMoeForCausalLM` with float32 weights.
        resume: continue from the newest verified checkpoint of the run, if there is one.

    Raises:
        NonFiniteError: loss or gradient norm is NaN or infinite.
        Preempted: SIGTERM or Ctrl-C; the run is saved.
    """
    folder, train = Path(config.output_dir), config.train
    if train.batch_size < accelerator.num_processes:
        raise UserError(
            f"train.batch_size {train.batch_size} is less than one row for each of the "
            f"{accelerator.num_processes} processes",
            mend="raise train.batch_size or start fewer processes",
        )
    for prompt in train.sample_prompts:  # now rather than in the middle of the run
        Engine(model, tokenizer).encode(prompt, chat=hasattr(config, "init_from"))
    checkpoints = folder / "checkpoints"
    total_steps = train.max_steps or math.ceil((train.epochs or 0) * data.train.rows_per_epoch / train.batch_size)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(accelerator.device)
    optimizers = build_optimizers(model, config.optimizer)
    state = TrainerState(data_fingerprint=data.fingerprint)
    if resume:
        state = _resume(checkpoints, model, optimizers, accelerator, data.fingerprint)
    wrapped = accelerator.prepare(torch.compile(model) if train.compile else model)

    if accelerator.is_main_process:
        _print_plan(model, data, config, accelerator, optimizers, total_steps, state.step)
    logger = MetricsLogger(
        folder,
        config.logging,
        total_steps=total_steps,
        start_step=state.step,
        wandb_run_id=state.wandb_run_id,
        config=config.model_dump(mode="json"),
        enabled=accelerator.is_main_process,
    )
    with logger, StopRequest() as stop:
        state.wandb_run_id = logger.wandb_run_id
        wrapped.train()
        clock, tokens_at_clock = time.perf_counter(), state.tokens
        while state.step < total_steps:
            batch = data.train.batch(state.step, train.batch_size, accelerator.process_index, accelerator.num_processes)
            factor = lr_at_step(state.step, total_steps, config.schedule)
            set_lr(optimizers, factor)
            terms, expert_counts = _forward_backward(wrapped, batch, train, accelerator)
            grad_norm = accelerator.clip_grad_norm_(wrapped.parameters(), train.max_grad_norm)
            _check_finite(terms["loss"], grad_norm, state.step + 1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            _update_selection_bias(model, expert_counts)
            state.step += 1
            state.tokens += train.batch_size * config.data.sequence_length

            last = state.step == total_steps
            if state.step % train.log_every == 0 or last:
                row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "lr": config.optimizer.lr * factor}
                row |= {name: value.item() for name, value in terms.items()}
                row |= {"grad_norm": float(grad_norm), "batch_hash": batch.digest()}
                row["tokens_per_second"] = (state.tokens - tokens_at_clock) / (time.perf_counter() - clock)
                row["expert_load"] = _expert_load(expert_counts)
                logger.log_training(row)
                clock, tokens_at_clock = time.perf_counter(), state.tokens
            else:
                logger.advance(state.step)

            paused = time.perf_counter()
            val_loss = None
            if data.validation is not None and (state.step % train.eval_every == 0 or last):
                val_loss = _validate(model, data.validation, train, accelerator, logger, state.step)
            if train.sample_every and (state.step % train.sample_every == 0 or last) and accelerator.is_main_process:
                _log_samples(model, tokenizer, config, logger, state.step)
            stopping = stop.agreed(accelerator) and not last
            if state.step % train.save_every == 0 or last or stopping:
                if val_loss is not None and (state.best_val_loss is None or val_loss < state.best_val_loss):
                    state.best_val_loss, state.best_step = val_loss, state.step
                _save(checkpoints, model, tokenizer, optimizers, state, train, accelerator)
            if stopping:
                raise Preempted(
                    f"stopped by {stop.signal_name or 'another process'} after step {state.step} of {total_steps}; "
                    "everything is saved",
                    mend="start the same command with --resume",
                )
            clock += time.perf_counter() - paused  # tokens per second are of training alone

    return _export_final(folder, model, tokenizer, accelerator)


def _forward_backward(
    model: Any, batch: Batch, train: TrainConfig, accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of one step's rows on this rank.

    Returns:
        The loss and its terms, averaged over the step's learned tokens on all ranks; and the step's global
        expert counts (L, E).
    """
    device, world = accelerator.device, accelerator.num_processes
    batch = batch.to(device)
    num_items = accelerator.reduce((batch.labels[:, 1:] != IGNORE_INDEX).sum())
    micros = list(batch.split(_micro_rows(train, accelerator)))
    totals: Tensor | None = None
    counts: Tensor | None = None
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            outputs = model(**micro.model_inputs(), num_items_in_batch=num_items, skip_logits=True, use_cache=False)
            # Data-parallel training averages gradients over ranks; the loss is already divided by the global count.
            accelerator.backward(outputs.loss * world)
        share = (micro.labels[:, 1:] != IGNORE_INDEX).sum() / num_items.clamp(min=1)
        terms = torch.stack(
            (
                outputs.loss,
                outputs.lm_loss,
                share * outputs.load_balancing_loss,
                share * outputs.router_z_loss,
            )
        ).detach()
        totals = terms if totals is None else totals + terms
        counts = outputs.expert_counts if counts is None else counts + outputs.expert_counts
    assert totals is not None
    assert counts is not None
    if world > 1:
        totals, counts = accelerator.reduce(totals), accelerator.reduce(counts)
    return dict(zip(("loss", "lm_loss", "load_balancing_loss", "router_z_loss"), totals, strict=True)), counts


def _validate(
    model: Any, validation: Validation, train: TrainConfig, accelerator: Accelerator, logger: MetricsLogger, step: int
) -> float:
    """Score the held-out documents, log the result and return the loss (nats per token)."""
    result = evaluate_model(model, validation, _micro_rows(train, accelerator), accelerator)
    row = {"step": step, "val_loss": result.loss, "val_perplexity": result.perplexity}
    logger.log_evaluation(row | {"val_bits_per_byte": result.bits_per_byte})
    return result.loss


def _micro_rows(train: TrainConfig, accelerator: Accelerator) -> int:
    """Rows of one forward pass on one rank."""
    return train.micro_batch_size or max(train.batch_size // accelerator.num_processes, 1)


def _check_finite(loss: Tensor, grad_norm: Tensor | float, step: int) -> None:
    if not (math.isfinite(float(loss)) and math.isfinite(float(grad_norm))):
        raise NonFiniteError(
            f"step {step}: loss {float(loss)}, gradient norm {float(grad_norm)}",
            mend="lower optimizer.lr or lengthen schedule.warmup_steps; nothing non-finite was saved, --resume works",
        )


def _update_selection_bias(model: Any, counts: Tensor) -> None:
    """Aux-loss-free balancing, once an optimizer step, from global counts (L, E)."""
    rate = model.config.router_bias_update_rate
    if rate:
        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        for router, layer_counts in zip(routers, counts, strict=True):
            router.update_selection_bias(layer_counts, rate)


def _expert_load(counts: Tensor) -> list[list[float]]:
    """Per layer, each expert's tokens over its fair share."""
    fair = counts.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
    return [[round(share, 4) for share in layer] for layer in (counts / fair).tolist()]


def _log_samples(model: Any, tokenizer: Any, config: TrainingRun, logger: MetricsLogger, step: int) -> None:
    """Generate from the prompts; training's random state is left alone."""
    settings = GenerationSection(
        max_new_tokens=config.train.sample_tokens,
        temperature=0.7,
        seed=config.seed,
        chat=hasattr(config, "init_from"),
    )
    prompts = list(config.train.sample_prompts)
    engine = Engine(model, tokenizer)
    for prompt, completion in zip(prompts, engine.generate(prompts, settings), strict=True):
        logger.log_sample(step, prompt + ("\n" if settings.chat else ""), completion.text)
    model.train()


def _resume(
    checkpoints: Path, model: Any, optimizers: list[Optimizer], accelerator: Accelerator, fingerprint: str
) -> TrainerState:
    """State of the newest verified checkpoint, loaded into the model; a fresh state when there is none."""
    if accelerator.is_main_process:
        checkpoint.sweep(checkpoints)
    found, refused = checkpoint.latest_or_fail(checkpoints)
    for name, reason in refused.items():
        accelerator.print(f"checkpoint {name} is set aside: {reason}")
    if found is None:
        return TrainerState(data_fingerprint=fingerprint)
    recorded = checkpoint.load_state(found).data_fingerprint
    if recorded != fingerprint:
        raise UserError(
            f"the data is not what this run was trained on (fingerprint {fingerprint}, was {recorded})",
            where=str(found),
            mend="restore the data and the data section of the config, or start a new run with another output_dir",
        )
    accelerator.print(f"resuming from {found}")
    return checkpoint.restore(found, model, optimizers, accelerator.process_index)


def _save(
    checkpoints: Path,
    model: Any,
    tokenizer: Any,
    optimizers: list[Optimizer],
    state: TrainerState,
    train: TrainConfig,
    accelerator: Accelerator,
) -> None:
    """Write a checkpoint from the first rank, with every rank's random state, then prune."""
    rng = gather_object([checkpoint.get_rng()])
    if accelerator.is_main_process:
        snapshot = checkpoint.take_snapshot(model, optimizers, state, rng)
        checkpoint.save(checkpoints, snapshot, model, tokenizer)
        checkpoint.prune(checkpoints, train.keep_last, state.best_step)
    accelerator.wait_for_everyone()


def _export_final(folder: Path, model: Any, tokenizer: Any, accelerator: Accelerator) -> Path:
    """The trained model as a plain model folder."""
    final = folder / "final"
    if accelerator.is_main_process:
        temporary = folder / ".writing-final"
        with quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        checkpoint.publish(temporary, final)
    accelerator.wait_for_everyone()
    return final


def _print_plan(
    model: Any,
    data: Data,
    config: TrainingRun,
    accelerator: Accelerator,
    optimizers: list[Optimizer],
    total_steps: int,
    done: int,
) -> None:
    """What the run will do, before it does it."""
    train, architecture = config.train, model.config
    total, active = count_parameters(model)
    tokens_per_step = train.batch_size * config.data.sequence_length
    tokens = total_steps * tokens_per_step
    seconds = _estimate_step_seconds(model, data, config, accelerator, optimizers) * (total_steps - done)
    share = architecture.num_experts_per_tok / architecture.num_experts
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = {
        "parameters": f"{total:,} total, {active:,} active per token",
        "experts": f"{architecture.num_experts} x {architecture.moe_intermediate_size} wide, "
        f"{architecture.num_experts_per_tok} per token, {architecture.n_shared_experts} shared, "
        f"{architecture.num_moe_layers} of {architecture.num_hidden_layers} layers",
        "data": f"{data.train.rows_per_epoch:,} rows of {config.data.sequence_length} tokens an epoch"
        + (f", {data.validation.num_documents:,} documents held out" if data.validation else ", nothing held out"),
        "rows left out": ", ".join(f"{data.counts[key]:,} {key}" for key in _LEFT_OUT if data.counts[key]) or "none",
        "steps": f"{total_steps:,} of {train.batch_size} rows = {tokens_per_step:,} tokens"
        + (f", {done:,} already done" if done else ""),
        "tokens": f"{tokens:,} ({tokens / total:.1f} per parameter, "
        f"{total_steps * train.batch_size / data.train.rows_per_epoch:.2f} epochs)",
        "tokens per expert": f"{tokens * share:,.0f} in each layer, if balanced",
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr}, {config.schedule.name}",
        "precision": f"{'bf16' if accelerator.mixed_precision == 'bf16' else 'fp32'} ({train.precision})",
        "device": f"{accelerator.device.type}, {accelerator.num_processes} process(es), "
        f"{torch.get_num_threads()} threads each",
        "estimated time": _duration(seconds) + ", from one timed micro-batch",
        "output": config.output_dir,
    }
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width of its own
    console.print(table)


def count_parameters(model: Any) -> tuple[int, int]:
    """(all parameters, those one token passes through): idle experts are not active."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    idle_share = 1 - model.config.num_experts_per_tok / model.config.num_experts
    return total, total - round(experts * idle_share)


def _estimate_step_seconds(
    model: Any, data: Data, config: TrainingRun, accelerator: Accelerator, optimizers: list[Optimizer]
) -> float:
    """Time one micro-batch and one orthogonalisation; weights, moments and random state are left as they were."""
    rng, train = checkpoint.get_rng(), config.train
    rows = _micro_rows(train, accelerator)
    micro = data.train.batch(0, rows).to(accelerator.device)
    model.train()
    times = []
    for _ in range(2):  # the first also pays for allocation and kernel selection
        start = time.perf_counter()
        with accelerator.autocast():
            model(**micro.model_inputs(), skip_logits=True, use_cache=False).loss.backward()
        model.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            for parameter in optimizer.param_groups[0]["params"]:
                newton_schulz(parameter.detach() if parameter.ndim == 3 else parameter.detach()[None])
    orthogonalisation = time.perf_counter() - start
    checkpoint.set_rng(rng)
    micros = math.ceil(train.batch_size / rows / accelerator.num_processes)
    return times[-1] * micros + orthogonalisation


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
