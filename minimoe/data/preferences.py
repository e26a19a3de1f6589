"""Preferences: which of two answers is the better one, or whether an answer is wanted; rows, and their token ids.

A preference is two conversations that begin alike. What they share is the prompt; only the answers after it are scored.
A judgement is one conversation, whose last answers are scored, and a label.

On disk either is one document of two parts, end to end. A preference's parts are the chosen and the rejected
conversation; a judgement's are its own, and its prompt with the answer of another row, by which KTO (arXiv 2402.01306)
estimates how far the model has moved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minimoe.conversation import Message
from minimoe.data.rows import BadRow
from minimoe.errors import shorten

_HH_TURN = re.compile(
    r"\s*(Human|Assistant): ?(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL
)  # of Anthropic's HH rows


class Preference(NamedTuple):
    chosen: list[Message]
    rejected: list[Message]


class Judgement(NamedTuple):
    messages: list[Message]
    wanted: bool


def preference(
    values: Mapping[str, Any], read: Callable[[list[Any]], list[Message]], prompt: list[Any] | None
) -> Preference:
    """Both conversations of a row with chosen and rejected.

    Args:
        read: messages as people have them -> messages in the one form.
        prompt: what stands before both answers; None where it is a part of both.

    Raises:
        BadRow: an answer is no text or list of messages, or the two are the same.
    """
    sides = []
    for column in ("chosen", "rejected"):
        turns = _answer(values.get(column), column)
        if prompt is None and len(turns) < 2:
            raise BadRow(f"{column} is {shorten(values[column])}, and nothing says what it answers; a prompt is needed")
        sides.append(read([*(prompt or []), *turns]))
    chosen, rejected = sides
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == max(len(chosen), len(rejected)):
        raise BadRow(f"chosen and rejected are the same, {shorten(chosen[-1]['content'])}")
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in messages[shared:]):
            raise BadRow(f"{column} has no answer of the assistant after what both have in common")
    return Preference(_scored_after(shared, chosen), _scored_after(shared, rejected))


def judgement(messages: list[Message], label: Any) -> Judgement:
    """A conversation whose last answer is wanted or not.

    Raises:
        BadRow: the label is no boolean, or nothing is answered.
    """
    if label not in (True, False, 0, 1) or isinstance(label, float):
        raise BadRow(f"label is {shorten(label)}; true (wanted) or false is needed")
    last = max((number for number, m in enumerate(messages) if m["role"] == "user"), default=-1)
    if not any(message["role"] == "assistant" for message in messages[last + 1 :]):
        raise BadRow("the conversation does not end with an answer of the assistant")
    return Judgement(_scored_after(last + 1, messages), bool(label))


def judgements(document: Preference | Judgement) -> list[Judgement]:
    """A preference as two judgements: the chosen answer is wanted, the rejected one is not."""
    if isinstance(document, Judgement):
        return [document]
    return [Judgement(document.chosen, True), Judgement(document.rejected, False)]


def fitted(
    parts: Sequence[tuple[list[int], list[bool]]], sequence_length: int
) -> tuple[list[int], list[bool], int, bool] | None:
    """Two encoded conversations end to end, each truncated to half of the row if they do not fit together.

    Returns:
        Token ids, which of them are scored, the length of the first conversation, and whether they were truncated;
        None where nothing of an answer would be left.
    """
    truncated = sum(len(ids) for ids, _ in parts) > sequence_length
    if truncated:
        half = sequence_length // 2
        parts = [(ids[:half], mask[:half]) for ids, mask in parts]
    if not all(any(mask[1:]) for _, mask in parts):
        return None
    (first, first_mask), (second, second_mask) = parts
    return first + second, first_mask + second_mask, len(first), truncated


def mismatched(messages: list[Message], other: list[Message]) -> list[Message]:
    """The prompt of one conversation with the scored answers of another."""
    prompt = [message for message in messages if message["role"] != "assistant" or not message.get("learned", True)]
    last_user = max(number for number, message in enumerate(prompt) if message["role"] == "user")
    answers = [message for message in other if message["role"] == "assistant" and message.get("learned", True)]
    return [*prompt[: last_user + 1], answers[-1]]


def _scored_after(shared: int, messages: list[Message]) -> list[Message]:
    """The assistant's turns of the prompt are not scored."""
    return [
        message | {"learned": False} if number < shared and message["role"] == "assistant" else message
        for number, message in enumerate(messages)
    ]


def _answer(value: Any, column: str) -> list[Any]:
    """Turns of an answer: a text, a message, a list of messages, or a whole conversation as HH has it in one text."""
    if isinstance(value, str) and re.match(r"\s*Human:", value):
        return [
            {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
            for role, text in _HH_TURN.findall(value)
        ]
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{column} is empty; an answer is needed")
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list) and value:
        return value
    raise BadRow(f"{column} is {shorten(value)}; a text or messages are needed")
