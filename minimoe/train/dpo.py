"""`minimoe dpo`: learn which of two answers is preferred, or which answers are wanted.

The reference is the model that training starts from. Its log-probabilities of all answers are computed once, before the
first step, and kept beside the tokenised data: no second model stays in memory, and a second run need not wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from minimoe.adapters import fingerprint
from minimoe.config import DpoConfig, DpoRun
from minimoe.data.loader import Validation, open_data
from minimoe.data.packing import Documents
from minimoe.data.pairs import PairPacking
from minimoe.data.shards import Corpus, cache_folder
from minimoe.errors import disk_errors
from minimoe.failpoints import failpoint
from minimoe.loading import model_folder
from minimoe.train.loop import fit
from minimoe.train.objectives import HeldOut, Step
from minimoe.train.parallel import fast_float32, make_accelerator
from minimoe.train.preference import preference_objective
from minimoe.train.sft import start_from


def run(config: DpoRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train, config.parallel)
    model, tokenizer = start_from(config.init_from, config, config.lora)
    annotate: Callable[[Corpus], Corpus] = lambda corpus: corpus  # noqa: E731
    if config.dpo.needs_reference:
        pad_id = tokenizer.pad_token_id or 0
        annotate = partial(with_reference, config=config, model=model, pad_id=pad_id, accelerator=accelerator)
    data = partial(open_data, config.data, tokenizer, config.encoding, config.seed, annotate)
    return fit(
        config,
        model,
        tokenizer,
        data,
        preference_objective(config.dpo),
        accelerator,
        evaluate=partial(held_out_preferences, config.dpo),
        resume=resume,
        overwrite=overwrite,
    )


@torch.no_grad()
def held_out_preferences(
    dpo: DpoConfig,
    model: Any,
    validation: Validation,
    batch_size: int,
    accelerator: Accelerator,
    poll: Callable[[], None],
) -> HeldOut:
    """Loss and accuracy on held-out pairs: means over all of them."""
    objective = preference_objective(dpo)
    rank, world = accelerator.process_index, accelerator.num_processes
    names = ("preference_loss", "reward_accuracy", "reward_margin")
    totals = torch.zeros(len(names) + 1, dtype=torch.float64)  # over pairs, and how many they are
    was_training, batch, index = model.training, None, -1
    model.eval()
    try:
        for index, batch in enumerate(validation.batches(batch_size)):
            failpoint("evaluate.batch")
            if index % world == 0:
                poll()
            if index % world == rank:
                count = int(batch.num_items())
                batch = batch.to(accelerator.device)
                terms = objective(model, batch, Step.of(batch)).terms
                totals += torch.tensor([*(terms[name].item() * count for name in names), count])
        if batch is not None and rank > index % world:
            # There was none left for this rank. A sharded model's forward passes are collectives, so it takes part.
            batch = batch.to(accelerator.device)
            objective(model, batch, Step.of(batch))
    finally:
        model.train(was_training)
    if world > 1:
        totals = accelerator.reduce(totals.to(accelerator.device)).cpu()
    loss, accuracy, margin = (totals[:-1] / totals[-1].clamp(min=1)).tolist()
    return HeldOut({"val_loss": loss, "val_reward_accuracy": accuracy, "val_reward_margin": margin}, loss)


def with_reference(corpus: Corpus, *, config: DpoRun, model: Any, pad_id: int, accelerator: Accelerator) -> Corpus:
    """The corpus with the model's log-probabilities of its answers, from the cache where they are there already.

    Raises:
        StorageError: they cannot be written.
    """
    start = fingerprint(model_folder(config.init_from))
    settings = (corpus.fingerprint, start, accelerator.mixed_precision, accelerator.device.type)
    name = hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
    file = cache_folder(config.data) / f"{name}.reference.npy"
    with disk_errors("the reference's log-probabilities", file), FileLock(file.with_suffix(".lock")):
        if not _is_whole(file, corpus.num_documents):
            values = reference_logprobs(corpus, config, model, pad_id, accelerator)
            temporary = file.with_suffix(".tmp.npy")
            np.save(temporary, values)
            temporary.replace(file)
        return replace(corpus, reference=np.load(file))


def _is_whole(file: Path, documents: int) -> bool:
    try:
        return np.load(file, mmap_mode="r").shape == (documents, 2)
    except (OSError, ValueError, EOFError):
        return False


@torch.no_grad()
def reference_logprobs(corpus: Corpus, config: DpoRun, model: Any, pad_id: int, accelerator: Accelerator) -> np.ndarray:
    """(N, 2) float32: the sums of both answers' log-probabilities under the model as it is."""
    documents = Documents.select([corpus], [np.arange(corpus.num_documents)])
    packing = PairPacking(documents, config.data.sequence_length, 0, pad_id, shuffle=False)
    result = np.zeros((corpus.num_documents, 2), np.float32)
    rows = config.train.micro_rows(accelerator.num_processes)
    model.to(accelerator.device).eval()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("the reference reads the answers", total=packing.num_rows)
        for start in range(0, packing.num_rows, rows):
            numbers = range(start, min(start + rows, packing.num_rows))
            batch = packing.stack([packing.row(0, number) for number in numbers]).to(accelerator.device)
            with accelerator.autocast(), fast_float32(model, accelerator.device):
                outputs = model(**batch.model_inputs(), skip_logits=True, logprob_temperature=1.0, use_cache=False)
            sums = batch.sums(outputs.token_logprobs).float().cpu().numpy()  # type: ignore[attr-defined]
            for number, row in zip(numbers, sums, strict=True):
                members = documents.indices[packing.members(0, number)]
                result[members] = row[: len(members)]
            progress.advance(bar, len(numbers))
    return result
