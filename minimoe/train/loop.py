"""fit(): the only training loop. A stage gives it a model, batches and an objective; everything else is here.

One optimizer step: load the step's rows, set the learning rate, add up the gradients, clip, step, update the routers'
selection bias. Around it: guard, logging, validation, samples, checkpoints, and stopping when asked to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer

from minimoe.adapters import has_adapter
from minimoe.config import GenerationSection, TrainingRun
from minimoe.data.loader import Data, Validation
from minimoe.errors import Preempted
from minimoe.evaluate.perplexity import evaluate_model
from minimoe.failpoints import failpoint
from minimoe.generation.engine import Engine
from minimoe.loading import FINAL
from minimoe.train.checkpoint import save_weights, written_whole
from minimoe.train.facts import write_facts
from minimoe.train.files import CHECKPOINTS
from minimoe.train.frozen import FrozenExperts
from minimoe.train.guard import expert_load, log_collapse, log_problem, poison
from minimoe.train.memory import keep_freed_memory, peak_memory
from minimoe.train.metrics import MetricsLogger
from minimoe.train.new_weights import give_weights, has_none
from minimoe.train.objectives import Evaluate, HeldOut, Objective
from minimoe.train.optim import (
    build_optimizers,
    lr_at_step,
    selection_biases,
    set_lr,
    update_selection_bias,
)
from minimoe.train.parallel import fast_float32, forward_backward, ranks_may_die, wrap
from minimoe.train.plan import estimate_step_seconds, print_plan
from minimoe.train.preemption import StopRequest, StopRequested
from minimoe.train.preflight import check_run
from minimoe.train.reporter import Reporter
from minimoe.train.resume import resume as resume_run
from minimoe.train.run_folder import claim_folder, run_folder
from minimoe.train.saver import BackgroundSaver
from minimoe.train.sharded_checkpoint import Ranks, save_model
from minimoe.train.sharding import check_sharding, clip_grad_norm, is_sharded, resolve, shard
from minimoe.train.snapshot import TrainerState, get_rng, take_snapshot
from minimoe.train.turns import Turns


@dataclass
class Run:
    """What the stage gave (see `fit`), and what the loop keeps."""

    config: TrainingRun
    model: Any
    tokenizer: Any
    data: Data
    objective: Objective
    evaluate: Evaluate
    accelerator: Accelerator

    wrapped: Any  # the model as training calls it: compiled, data-parallel
    optimizers: list[Optimizer]
    frozen: FrozenExperts
    state: TrainerState
    total_steps: int
    stop: StopRequest
    logger: MetricsLogger
    saver: BackgroundSaver
    reporter: Reporter
    logged_tokens: int  # at the last training row, for its tokens per second
    logged_seconds: float

    @property
    def micro_rows(self) -> int:
        """Rows of one forward pass on one rank."""
        return self.config.train.micro_rows(self.accelerator.num_processes)

    @property
    def has_all_weights(self) -> bool:
        """Whether this rank takes part in what needs all weights: the first one, and of a sharded model all."""
        return self.accelerator.is_main_process or is_sharded(self.model)

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.state.step >= self.total_steps

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps, and after the last one, happens now."""
        return self.state.step % every == 0 or self.done


def held_out_loss(
    model: Any, validation: Validation, batch_size: int, accelerator: Accelerator, poll: Callable[[], None]
) -> HeldOut:
    """How well held-out documents are predicted."""
    result = evaluate_model(model, validation, batch_size, accelerator, poll)
    return HeldOut(result.row, result.loss)


def fit(
    config: TrainingRun,
    model: Any,
    tokenizer: Any,
    open_data: Callable[[], Data],
    objective: Objective,
    accelerator: Accelerator,
    *,
    evaluate: Evaluate = held_out_loss,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train `model` in place and return the folder of the final model.

    Args:
        model: a `MiniMoeForCausalLM` with float32 weights, on the CPU; to be sharded also one without weights, which
            are those of the config's `init_from` or else drawn.
        open_data: prepares the batches and the held-out documents; called once the run owns its folder.
        objective: what to learn from a batch.
        evaluate: what to find out on the held-out data.
        resume: continue from the newest verified checkpoint of the run, if there is one.
        overwrite: delete the run that `output_dir` holds.

    Raises:
        NonFiniteError: loss or gradient norm is NaN or infinite for too many steps in a row.
        Preempted: SIGTERM or Ctrl-C; the run is saved.
        StorageError: the disk is full or another process of the run has died; the checkpoints are intact.
        UserError: the config contradicts machine, model or data; `output_dir` is in use or holds a run; or the run to
            resume is another one: other data, architecture, batches or optimizer.
    """
    check_run(config, model, tokenizer, accelerator.device.type, accelerator.num_processes)
    if config.parallel is not None:
        check_sharding(resolve(config.parallel, accelerator.num_processes), model.config, config.train)
    with (
        Reporter(Path(config.output_dir)) as reporter,  # it ends after the status is written, which it shows
        run_folder(config, resume=resume, overwrite=overwrite, enabled=accelerator.is_main_process) as status,
        StopRequest(status.aborted) as stop,
    ):
        with accelerator.main_process_first():  # the others find the shards in the cache
            data = open_data()
        run = _prepare(config, model, tokenizer, data, objective, evaluate, accelerator, stop, reporter, resume)
        with ranks_may_die(accelerator), run.saver, run.logger:
            _loop(run)
        return _finish(run)


def _prepare(
    config: TrainingRun,
    model: Any,
    tokenizer: Any,
    data: Data,
    objective: Objective,
    evaluate: Evaluate,
    accelerator: Accelerator,
    stop: StopRequest,
    reporter: Reporter,
    resume: bool,
) -> Run:
    """Everything up to the first step: the state to start from, the folder, the plan."""
    folder, train, values = Path(config.output_dir), config.train, config.model_dump(mode="json")
    total_steps = train.total_steps(data.train.rows_per_epoch)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = None if config.parallel is None else resolve(config.parallel, accelerator.num_processes)
    ranks = None
    if not has_none(model) and not (layout and layout.cpu_offload):  # which takes its parts to the GPU by itself
        model.to(accelerator.device)
    if layout is not None:
        model = shard(model, layout)
        if has_none(model):
            give_weights(model, layout, config, accelerator.device)
        if is_sharded(model) and not has_adapter(model):
            assert config.parallel is not None
            ranks = Ranks(config.parallel.timeout_seconds)
    frozen = FrozenExperts(model)
    optimizers = build_optimizers(model, config.optimizer)
    model.model.moves_selection_bias = True
    state = TrainerState(data_fingerprint=data.fingerprint, config=values)
    if resume:
        load_data = data.train.load_state_tensors
        state = resume_run(folder / CHECKPOINTS, model, optimizers, accelerator, state, load_data, layout)
    if accelerator.is_main_process:
        claim_folder(config, keep=resume)
    logger = MetricsLogger(
        folder,
        config.logging,
        total_steps=total_steps,
        start_step=state.step,
        wandb_run_id=state.wandb_run_id,
        config=values,
        enabled=accelerator.is_main_process,
    )
    state.wandb_run_id, reporter.finish_trackers = logger.wandb_run_id, logger.finish_trackers
    run = Run(
        config=config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        objective=objective,
        evaluate=evaluate,
        accelerator=accelerator,
        wrapped=wrap(torch.compile(model) if train.compile else model, accelerator),
        optimizers=optimizers,
        frozen=frozen,
        state=state,
        total_steps=total_steps,
        stop=stop,
        logger=logger,
        saver=BackgroundSaver(folder / CHECKPOINTS, model, tokenizer, train.keep_last, ranks),
        reporter=reporter,
        logged_tokens=state.tokens,
        logged_seconds=logger.seconds,
    )
    seconds = estimate_step_seconds(run) if run.has_all_weights else 0.0
    if accelerator.is_main_process:
        write_facts(run, folder)
        print_plan(run, seconds)
        if config.logging.report:
            reporter.begin()
    return run


def _loop(run: Run) -> None:
    """Step after step, with everything that is due between them."""
    train, state = run.config.train, run.state
    run.wrapped.train()
    run.stop.defer()
    if state.validation_due:
        _validate(run)
        if state.validation_due:  # cut short again; the checkpoint of this step says so already
            raise _preempted(run)
    turns = Turns.from_environment()
    while not run.done:
        if turns is not None and not turns.wait():
            run.stop.signal_name = "the end of the command that gave it turns"
        failpoint("train.step")
        _step(run)
        if run.due(train.eval_every):
            _validate(run)
        if train.sample_every and run.due(train.sample_every) and run.has_all_weights:
            _log_samples(run)
        run.saver.check()
        stopping = run.stop.agreed(run.accelerator) and not run.done
        if run.due(train.save_every) or stopping:
            _save(run)
        if stopping:
            run.saver.wait()
            run.accelerator.wait_for_everyone()
            raise _preempted(run)


def _save(run: Run) -> None:
    """Start to save this step; the saver alone keeps the copy, and no longer than it takes to write it."""
    rng = gather_object([get_rng()])
    if run.has_all_weights:
        run.saver.wait()  # for the previous one, so that there are never two copies in memory
        data = run.data.train.state_tensors(run.state.step)
        snapshot = take_snapshot(run.model, run.optimizers, run.state, rng, data)
        if run.accelerator.is_main_process or run.saver.of_all_ranks:
            run.saver.submit(snapshot)


def _step(run: Run) -> None:
    """One optimizer step, unless the guard skips it, and its row."""
    config, train, state, accelerator, logger = run.config, run.config.train, run.state, run.accelerator, run.logger
    started = time.perf_counter()
    rank = accelerator.process_index
    batch = run.data.train.batch(state.step, train.batch_size, rank, accelerator.num_processes)
    factor = lr_at_step(state.step, run.total_steps, config.schedule)
    set_lr(run.optimizers, factor)
    with fast_float32(run.model, accelerator.device):
        terms, expert_counts = forward_backward(run.wrapped, batch, run.objective, run.micro_rows, accelerator)
    poison(terms, run.model)
    grad_norm = clip_grad_norm(run.model.parameters(), train.max_grad_norm)
    loss = float(terms["loss"])
    verdict = state.guard.judge(loss, grad_norm, train)
    if not verdict.skipped:
        for optimizer in run.optimizers:
            optimizer.step()
        run.frozen.restore()
        update_selection_bias(run.model, expert_counts, run.model.config.router_bias_update_rate)
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    state.step += 1
    facts = run.data.train.facts()
    state.tokens += int(facts.pop("tokens", train.batch_size * config.data.sequence_length))

    if verdict.problem:
        row: dict[str, Any] = {"step": state.step, "loss": loss, "grad_norm": grad_norm}
        log_problem(verdict, batch, row, Path(config.output_dir), rank, logger)
        state.guard.raise_if_lost(train, state.step)
    log_collapse(state.guard.collapsed(expert_counts), state.step, logger)
    logger.seconds += time.perf_counter() - started  # of training alone
    if run.due(train.log_every):
        row = {"step": state.step, "tokens": state.tokens, "lr": config.optimizer.lr * factor}
        row |= {name: value.tolist() for name, value in terms.items()} | facts
        row |= {"grad_norm": grad_norm, "batch_hash": batch.digest(), "memory_bytes": peak_memory(accelerator.device)}
        row["tokens_per_second"] = (state.tokens - run.logged_tokens) / (logger.seconds - run.logged_seconds)
        row["expert_load"] = [[round(share, 4) for share in layer] for layer in expert_load(expert_counts).tolist()]
        if biases := selection_biases(run.model):
            row["selection_bias"] = biases
        logger.log_training(row)
        run.reporter.refresh()
        run.logged_tokens, run.logged_seconds = state.tokens, logger.seconds
    else:
        logger.advance(state.step)


def _validate(run: Run) -> None:
    """Score the held-out documents and log the result; it stays due when the run is asked to stop meanwhile."""
    state, accelerator = run.state, run.accelerator
    if run.data.validation is None:
        return
    state.validation_due = True
    started = time.perf_counter()
    try:
        with accelerator.autocast():  # of a compiled model the accelerator wraps the outside, and this is the inside
            row, score = run.evaluate(
                run.model, run.data.validation, run.micro_rows, accelerator, lambda: run.stop.check(accelerator)
            )
    except StopRequested:
        return
    state.validation_due = False
    run.logger.log_evaluation({"step": state.step, **row, "evaluation_seconds": time.perf_counter() - started})
    saved = run.due(run.config.train.save_every)
    if saved and (state.best_val_loss is None or score < state.best_val_loss):
        state.best_val_loss, state.best_step = score, state.step


def _log_samples(run: Run) -> None:
    """Generate from the prompts; training's random state is left alone."""
    train, chat = run.config.train, run.config.chat
    settings = GenerationSection(max_new_tokens=train.sample_tokens, temperature=0.7, seed=run.config.seed, chat=chat)
    started = time.perf_counter()
    completions = Engine(run.model, run.tokenizer).generate(train.sample_prompts, settings)
    seconds = (time.perf_counter() - started) / max(len(completions), 1)
    for prompt, completion in zip(train.sample_prompts, completions, strict=True):
        run.logger.log_sample(run.state.step, prompt + ("\n" if chat else ""), completion.text, seconds)
    run.model.train()


def _preempted(run: Run) -> Preempted:
    return Preempted(
        f"stopped by {run.stop.signal_name or 'another process'} after step {run.state.step} of {run.total_steps}; "
        "everything is saved",
        fix="start the same command with --resume",
    )


def _finish(run: Run) -> Path:
    """The trained model as a plain model folder."""
    final = Path(run.config.output_dir) / FINAL
    if is_sharded(run.model):
        save_model(run.model, run.tokenizer, final if run.accelerator.is_main_process else None)
    elif run.accelerator.is_main_process:
        with written_whole(final) as temporary:
            save_weights(run.model, run.tokenizer, temporary)
    run.accelerator.wait_for_everyone()
    return final
