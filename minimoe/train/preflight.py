"""Contradictions that no single value shows: config against machine, tokenizer, model and data.

Each is refused as soon as it can be seen, before memory, data or a step is spent on a run that cannot work.
"""

from __future__ import annotations

from typing import Any

from minimoe.config import TrainingRun
from minimoe.errors import UserError
from minimoe.generation.engine import Engine
from minimoe.train.trackers import check_trackers


def check_vocab_size(vocab_size: int, tokenizer: Any, tokenizer_source: str) -> None:
    """A new model needs a row of its embedding for every token.

    Raises:
        UserError: it has too few.
    """
    if vocab_size < len(tokenizer):
        raise UserError(
            f"model.vocab_size {vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens",
            where=tokenizer_source,
            fix=f"leave model.vocab_size out, or set it to {len(tokenizer)} or more",
        )


def check_run(config: TrainingRun, model: Any, tokenizer: Any, device: str, num_processes: int) -> None:
    """What can be seen before the data is prepared.

    Raises:
        UserError: compiling on a CPU, fewer rows than processes, rows longer than the model's positions, a sample
            prompt that cannot be answered, or a tracker that is not installed.
    """
    train, limit = config.train, model.config.max_position_embeddings
    if train.compile and device == "cpu":
        raise UserError(
            "train.compile is for GPUs: on a CPU every batch has other sizes, for which torch compiles half a minute",
            fix="leave it out; the forms in minimoe/ops are the fast ones there",
        )
    if train.batch_size < num_processes:
        raise UserError(
            f"train.batch_size {train.batch_size} is less than one row for each of the {num_processes} processes",
            fix="raise train.batch_size or start fewer processes",
        )
    if config.data.sequence_length > limit:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than model.max_position_embeddings {limit}",
            fix=f"set data.sequence_length to {limit} or less, or give the model more positions",
        )
    check_trackers(config.logging.trackers)
    engine = Engine(model, tokenizer)
    for prompt in train.sample_prompts:
        engine.encode(prompt, chat=config.chat)
