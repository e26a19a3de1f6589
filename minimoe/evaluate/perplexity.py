"""Loss, perplexity and bits per byte of a model on held-out documents.

Bits per byte = total negative log-likelihood in bits / UTF-8 bytes of the text: unlike the loss per token it does
not depend on the tokenizer, and it can be held beside a compressor. Every token of every document counts once,
the token that ends the document included.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimoe.config import DataConfig, Encoding, EvaluateRun
from minimoe.config.file import load_config
from minimoe.data.formats import left_aside
from minimoe.data.loader import Validation, open_validation
from minimoe.errors import UserError
from minimoe.failpoints import failpoint
from minimoe.loading import load_minimoe


@dataclass(frozen=True)
class Evaluation:
    """Result over all held-out documents."""

    loss: float  # nats per token
    num_tokens: int
    num_bytes: int

    @property
    def row(self) -> dict[str, float]:
        """As a row of metrics.jsonl has it."""
        return {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_bits_per_byte": self.bits_per_byte,
        }

    @property
    def perplexity(self) -> float:
        """exp(loss), infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total bits over total bytes."""
        return self.loss * self.num_tokens / math.log(2) / max(self.num_bytes, 1)


@torch.no_grad()
def evaluate_model(
    model: Any,
    validation: Validation,
    batch_size: int,
    accelerator: Any = None,
    poll: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score a model; with an accelerator the batches are shared out among its processes.

    Args:
        poll: called on every process before each has one more batch; it may raise to abandon the evaluation.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = model.device
    was_training = model.training
    model.eval()
    nats, tokens, batch, index = 0.0, 0, None, -1
    try:
        for index, batch in enumerate(validation.batches(batch_size)):
            failpoint("evaluate.batch")
            if index % world == 0:
                poll()
            if index % world == rank:
                num_tokens = int(batch.num_items())
                outputs = model(**batch.to(device).model_inputs(), skip_logits=True, use_cache=False)
                nats += outputs.lm_loss.item() * num_tokens
                tokens += num_tokens
        if batch is not None and world > 1 and rank > index % world:
            # There was none left for this rank. A sharded model's forward passes are collectives, so it takes part.
            model(**batch.to(device).model_inputs(), skip_logits=True, use_cache=False)
    finally:
        model.train(was_training)
    if world > 1:
        nats, tokens = accelerator.reduce(torch.tensor((nats, tokens), dtype=torch.float64, device=device)).tolist()
    return Evaluation(nats / max(tokens, 1), int(tokens), validation.num_bytes)


def evaluate_source(
    model_dir: str,
    path: str,
    *,
    answers_only: bool = False,
    sequence_length: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    overrides: Sequence[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Score a model folder on every document of a file, folder or glob.

    Args:
        answers_only: conversations count their assistant turns only, as in SFT, instead of the whole text.
        sequence_length: tokens of context; None is the model's, 1024 at most.
        overrides: how documents are read, such as data.on_bad_rows=skip.
        note: told what is there and not read.
    """
    if sequence_length is not None:
        overrides = [*overrides, f"data.sequence_length={sequence_length}"]
    data = documents_of(path, overrides)
    model, tokenizer = load_minimoe(model_dir, device)
    validation = open_documents(data, model, tokenizer, "sft" if answers_only else "pretrain", where=model_dir)
    for name, value in left_aside(data.train, validation.ignored).items():
        note(f"{name}: {value}")
    return evaluate_model(model, validation, batch_size)


def documents_of(path: str, overrides: Sequence[str] = ()) -> DataConfig:
    """How the documents of a file, folder or glob are read."""
    words = [f"data.train={json.dumps(path, ensure_ascii=False)}", *overrides]
    return load_config(EvaluateRun, None, words).data


def open_documents(
    data: DataConfig, model: Any, tokenizer: Any, encoding: Encoding = "pretrain", where: str = ""
) -> Validation:
    """Documents to put through a model, in rows of its context, or 1024 tokens of it, where no length is given.

    Raises:
        UserError: rows longer than its positions.
    """
    limit = model.config.max_position_embeddings
    if "sequence_length" not in data.model_fields_set:
        data = data.model_copy(update={"sequence_length": min(limit, 1024)})
    if data.sequence_length > limit:
        raise UserError(
            f"--sequence-length {data.sequence_length} is more than the model's {limit} positions", where=where
        )
    return open_validation(data.train, data, tokenizer, encoding)


def run(model_dir: str, path: str, *, json_output: bool = False, **options: Any) -> None:
    """`minimoe evaluate`: score and print."""
    evaluation = evaluate_source(model_dir, path, note=partial(print, file=sys.stderr), **options)
    if json_output:
        fields = ("loss", "perplexity", "bits_per_byte", "num_tokens", "num_bytes")
        print(json.dumps({name: getattr(evaluation, name) for name in fields}))
        return
    table = Table(
        "loss (nats/token)", "perplexity", "bits per byte", "tokens", "bytes", title=Text(f"{model_dir} on {path}")
    )
    table.add_row(
        f"{evaluation.loss:.4f}",
        f"{evaluation.perplexity:.2f}",
        f"{evaluation.bits_per_byte:.4f}",
        f"{evaluation.num_tokens:,}",
        f"{evaluation.num_bytes:,}",
    )
    Console().print(table)
