"""fit(): the only training loop, for pretraining and SFT alike.

One optimizer step: load the step's rows, run them in micro-batches, add up gradients of a loss that is divided by
the step's global token count (so accumulation and data-parallel training are exact), clip, set the learning rate,
step, move the routers' selection bias. Around it: logging, validation, samples, checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

from minimoe.config import GenerationSection, TrainConfig, TrainingRun
from minimoe.data.loader import Batch, Data, Validation
from minimoe.errors import Preempted, StorageError, UserError
from minimoe.evaluate import evaluate_model
from minimoe.failpoints import failpoint
from minimoe.generation.engine import Engine
from minimoe.loading import quiet_transformers
from minimoe.model.losses import IGNORE_INDEX
from minimoe.model.precision import float32_by_onednn, has_bf16
from minimoe.model.router import TopKRouter
from minimoe.train import checkpoint
from minimoe.train.checkpoint import BackgroundSaver, TrainerState
from minimoe.train.guard import log_collapse, log_problem, poison
from minimoe.train.memory import keep_freed_memory
from minimoe.train.metrics import MetricsLogger
from minimoe.train.optim import build_optimizers, lr_at_step, set_lr
from minimoe.train.plan import micro_rows, print_plan
from minimoe.train.preemption import StopRequest, StopRequested
from minimoe.train.resume import resume as resume_run
from minimoe.train.run_folder import claim_folder


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
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
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
    stop: StopRequest,
    *,
    resume: bool,
) -> Path:
    """Train `model` in place and return the folder of the final model.

    Args:
        model: a `MiniMoeForCausalLM` with float32 weights.
        stop: listens for signals; from the first step on they wait for the end of a step.
        resume: continue from the newest verified checkpoint of the run, if there is one.

    Raises:
        NonFiniteError: loss or gradient norm is NaN or infinite for too many steps in a row.
        Preempted: SIGTERM or Ctrl-C; the run is saved.
        StorageError: the disk is full or another process of the run has died; the checkpoints are intact.
        UserError: the run to resume is another one: other data, architecture, batches or optimizer.
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
    warmup_steps = config.schedule.warmup_steps
    if warmup_steps > total_steps:
        raise UserError(
            f"schedule.warmup_steps {warmup_steps} is more than the run's {total_steps} steps",
            mend="lower it or train longer",
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(accelerator.device)
    optimizers = build_optimizers(model, config.optimizer)
    state = TrainerState(data_fingerprint=data.fingerprint, config=config.model_dump(mode="json"))
    if resume:
        state = resume_run(checkpoints, model, optimizers, accelerator, state)
    if accelerator.is_main_process:
        claim_folder(config, keep=resume)
    wrapped = accelerator.prepare(torch.compile(model) if train.compile else model)

    if accelerator.is_main_process:
        print_plan(model, data, config, accelerator, optimizers, total_steps, state.step)
    logger = MetricsLogger(
        folder,
        config.logging,
        total_steps=total_steps,
        start_step=state.step,
        wandb_run_id=state.wandb_run_id,
        config=config.model_dump(mode="json"),
        enabled=accelerator.is_main_process,
    )
    saver = BackgroundSaver(checkpoints, model, tokenizer, train.keep_last)
    with _peers_may_die(accelerator), saver, logger:
        state.wandb_run_id = logger.wandb_run_id
        wrapped.train()
        stop.defer()
        if state.validation_due:
            _validate(model, data.validation, train, accelerator, logger, state, total_steps, stop)
            if state.validation_due:  # cut short again; the checkpoint of this step says so already
                raise _preempted(stop, state.step, total_steps)
        logged_tokens, logged_seconds = state.tokens, logger.seconds
        while state.step < total_steps:
            failpoint("train.step")
            started = time.perf_counter()
            batch = data.train.batch(state.step, train.batch_size, accelerator.process_index, accelerator.num_processes)
            factor = lr_at_step(state.step, total_steps, config.schedule)
            set_lr(optimizers, factor)
            with float32_by_onednn(accelerator.device, model.config.hidden_size):
                terms, expert_counts = _forward_backward(wrapped, batch, train, accelerator)
            poison(terms, model)
            grad_norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), train.max_grad_norm))
            loss = float(terms["loss"])
            verdict = state.guard.judge(loss, grad_norm, train)
            if not verdict.skipped:
                for optimizer in optimizers:
                    optimizer.step()
                _update_selection_bias(model, expert_counts)
            for optimizer in optimizers:
                optimizer.zero_grad()
            state.step += 1
            state.tokens += train.batch_size * config.data.sequence_length

            if verdict.problem:
                row: dict[str, Any] = {"step": state.step, "loss": loss, "grad_norm": grad_norm}
                log_problem(verdict, batch, row, folder, accelerator.process_index, logger)
                state.guard.raise_if_lost(train, state.step)
            log_collapse(state.guard.collapsed(expert_counts), state.step, logger)
            logger.seconds += time.perf_counter() - started  # of training alone
            last = state.step == total_steps
            if state.step % train.log_every == 0 or last:
                row = {"step": state.step, "tokens": state.tokens, "lr": config.optimizer.lr * factor}
                row |= {name: value.item() for name, value in terms.items()}
                row |= {"grad_norm": grad_norm, "batch_hash": batch.digest()}
                row["tokens_per_second"] = (state.tokens - logged_tokens) / (logger.seconds - logged_seconds)
                row["expert_load"] = _expert_load(expert_counts)
                logger.log_training(row)
                logged_tokens, logged_seconds = state.tokens, logger.seconds
            else:
                logger.advance(state.step)

            if state.step % train.eval_every == 0 or last:
                _validate(model, data.validation, train, accelerator, logger, state, total_steps, stop)
            if train.sample_every and (state.step % train.sample_every == 0 or last) and accelerator.is_main_process:
                _log_samples(model, tokenizer, config, logger, state.step)
            saver.check()
            stopping = stop.agreed(accelerator) and not last
            if state.step % train.save_every == 0 or last or stopping:
                rng = gather_object([checkpoint.get_rng()])
                if accelerator.is_main_process:
                    saver.submit(checkpoint.take_snapshot(model, optimizers, state, rng))
            if stopping:
                saver.wait()
                accelerator.wait_for_everyone()
                raise _preempted(stop, state.step, total_steps)

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
    micros = list(batch.split(micro_rows(train, accelerator)))
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
    model: Any,
    validation: Validation | None,
    train: TrainConfig,
    accelerator: Accelerator,
    logger: MetricsLogger,
    state: TrainerState,
    total_steps: int,
    stop: StopRequest,
) -> None:
    """Score the held-out documents and log the result; it stays due when the run is asked to stop meanwhile."""
    if validation is None:
        return
    state.validation_due = True
    rows = micro_rows(train, accelerator)
    try:
        with accelerator.autocast():  # of a compiled model the accelerator wraps the outside, and this is the inside
            result = evaluate_model(model, validation, rows, accelerator, lambda: stop.check(accelerator))
    except StopRequested:
        return
    state.validation_due = False
    row = {"step": state.step, "val_loss": result.loss, "val_perplexity": result.perplexity}
    logger.log_evaluation(row | {"val_bits_per_byte": result.bits_per_byte})
    saved = state.step % train.save_every == 0 or state.step == total_steps
    if saved and (state.best_val_loss is None or result.loss < state.best_val_loss):
        state.best_val_loss, state.best_step = result.loss, state.step


def _preempted(stop: StopRequest, step: int, total_steps: int) -> Preempted:
    return Preempted(
        f"stopped by {stop.signal_name or 'another process'} after step {step} of {total_steps}; everything is saved",
        mend="start the same command with --resume",
    )


@contextlib.contextmanager
def _peers_may_die(accelerator: Accelerator) -> Iterator[None]:
    """Name the cause when a collective fails because another process has gone."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not re.search(r"gloo|nccl|connection", str(error), re.IGNORECASE):
            raise
        first_line = str(error).strip().splitlines()[0]
        raise StorageError(
            f"another process of the run has died or no longer answers ({first_line})",
            mend="look at its output, then start the same command with --resume",
        ) from error


def _update_selection_bias(model: Any, counts: Tensor) -> None:
    """Aux-loss-free balancing, once an optimizer step, from global counts (L, E)."""
    rate = model.config.router_bias_update_rate
    if rate:
        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        for router, layer_counts in zip(routers, counts, strict=True):
            router.update_selection_bias(layer_counts, rate)


def _expert_load(counts: Tensor) -> list[list[float]]:
    """Per layer, each expert's tokens over its fair share."""
    counts = counts.cpu()  # where every machine has float64
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


def _export_final(folder: Path, model: Any, tokenizer: Any, accelerator: Accelerator) -> Path:
    """The trained model as a plain model folder."""
    final = folder / "final"
    if accelerator.is_main_process:
        with checkpoint.written_whole(final) as temporary, quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    accelerator.wait_for_everyone()
    return final
