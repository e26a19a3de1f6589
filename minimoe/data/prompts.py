"""Prompts for reinforcement learning: rows with a conversation to answer, and whatever else a reward wants to know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.config import DataConfig, SourceConfig
from minimoe.conversation import NOTHING, BadConversation, Message, conversation, either
from minimoe.data.loader import split_documents
from minimoe.data.rows import BadRow, Row
from minimoe.data.sources import describe, read_rows
from minimoe.errors import UserError, shorten
from minimoe.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the point where the assistant answers."""

    messages: list[Message]
    token_ids: list[int]
    row: Mapping[str, Any]  # as it stands in the file, for the reward


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    counts: Mapping[str, int]  # bad_rows, and dropped: those that leave no room for an answer
    fingerprint: str


def open_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, max_new_tokens: int, held_out: int
) -> Prompts:
    """Read, encode and split the rows.

    Args:
        max_new_tokens: of an answer; a prompt must leave room for them within `data.sequence_length`.
        held_out: prompts that a validation answers at most.

    Raises:
        UserError: a bad row when `data.on_bad_rows` is "error", weighted sources, or nothing to train on.
    """
    weighted = [describe(source) for source in data.train if source.weight is not None]
    if weighted:
        raise UserError("prompts have no weights: each is seen once an epoch", where=weighted[0], fix="remove weight")
    counts = {"bad_rows": 0, "dropped": 0}
    room = data.sequence_length - max_new_tokens
    prompts = _read(data.train, data, tokenizer, room, counts)
    kept: Sequence[int] = range(len(prompts))
    validation: list[Prompt] = []
    if data.validation is not None:
        validation = _read(data.validation, data, tokenizer, room, dict(counts))
    elif data.validation_fraction > 0 and prompts:
        limit = data.model_copy(update={"max_validation_documents": None})
        (train,), (others,) = split_documents([len(prompts)], limit, seed)
        kept, validation = train.tolist(), [prompts[index] for index in others]
    train_prompts = [prompts[index] for index in kept]
    if not train_prompts:
        raise UserError(
            f"0 prompts to train on: {counts['dropped']} leave no room for grpo.max_new_tokens {max_new_tokens}, "
            f"{counts['bad_rows']} are bad",
            where=", ".join(describe(source) for source in data.train),
            fix="raise data.sequence_length, or lower grpo.max_new_tokens",
        )
    digest = hashlib.blake2b(digest_size=16)
    for prompt in (*prompts, *validation):
        digest.update(json.dumps([prompt.token_ids, prompt.row], sort_keys=True, default=str).encode())
    return Prompts(train_prompts, validation[:held_out], counts, digest.hexdigest())


def prompt_at(prompts: Sequence[Prompt], number: int, seed: int) -> Prompt:
    """Prompt `number` of the endless order: each epoch another permutation of all."""
    epoch, place = divmod(number, len(prompts))
    return prompts[int(_order(len(prompts), seed, epoch)[place])]


@lru_cache(maxsize=2)  # a rollout may end one epoch and begin another
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _read(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    counts: dict[str, int],
) -> list[Prompt]:
    prompts: list[Prompt] = []
    for source in sources:
        for row in read_rows(source):
            try:
                prompt = _prompt(row, tokenizer)
            except BadRow as bad:
                if data.on_bad_rows == "error":
                    fix = "fix the row, or set data.on_bad_rows: skip"
                    raise UserError(bad.what, where=bad.place, fix=fix) from None
                counts["bad_rows"] += 1
                continue
            if len(prompt.token_ids) > room:
                counts["dropped"] += 1
                continue
            prompts.append(prompt)
            if len(prompts) == data.max_documents:
                return prompts
    return prompts


def _prompt(row: Row | BadRow, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A row with `prompt` (text or messages), or with `messages` or `conversations`, whose last answer is left out."""
    if isinstance(row, BadRow):
        raise row
    values = row.values
    try:
        turns = either(values, "prompt", "messages", "conversations")
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            turns = json.loads(turns)
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if not isinstance(turns, list) or turns in NOTHING:
            raise BadRow(f"prompt is {shorten(turns)}; a text, or messages, are needed")
        system, tools = either(values, "system", "system_prompt"), either(values, "tools", "functions")
        messages = conversation(turns, system=system or "", tools=tools)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise BadRow("nothing is asked; a message of the user is needed")
        return Prompt(messages, encode_prompt(tokenizer, messages), values)
    except (BadRow, BadConversation, ValueError) as bad:
        raise BadRow(str(bad), row.place) from None
    except UserError as error:
        raise UserError(error.what, where=error.where or row.place, fix=error.fix) from None
