"""Row formats: what a row of a dataset means.

`FORMATS` maps a name to a function from a row's values to a document: a `str` for text, a list of messages
for a conversation. To add a format, write one function, enter it in `FORMATS` and, if its columns tell it
apart, in `detect_format`. A function raises `BadRow` for values that cannot be used, naming the column, the
value and the rule.

Every format of conversations ends in the same messages: role system, user, assistant or tool; a system
message only first, then a user message, and so on as `NEXT_ROLES` has it. An assistant's answer that starts
with `<think>…</think>` is split into `reasoning_content` and `content`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minimoe.config import DataConfig, SourceConfig
from minimoe.data.sources import BadRow, Row, cut_text, describe, read_rows
from minimoe.errors import UserError, shorten, suggestion
from minimoe.tokenizer import Message

Document = str | list[Message]
Format = Callable[[Mapping[str, Any]], Document]

# What may follow what; "" is the start.
NEXT_ROLES = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
}  # ShareGPT's words
_THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n*(.*)", re.DOTALL)


def text(values: Mapping[str, Any]) -> str:
    """{"text": "…"}: a document."""
    return _string(values, "text")


def messages(values: Mapping[str, Any]) -> list[Message]:
    """{"messages": [{"role": "user", "content": "…"}, …]}, as OpenAI has it."""
    return _conversation(values, "messages")


def conversations(values: Mapping[str, Any]) -> list[Message]:
    """{"conversations": [{"from": "human", "value": "…"}, …]} (ShareGPT), or role and content (minimind)."""
    return _conversation(values, "conversations")


def alpaca(values: Mapping[str, Any]) -> list[Message]:
    """{"instruction": "…", "input": "…", "output": "…"}; a non-empty input follows after a blank line."""
    question = _string(values, "instruction")
    if values.get("input"):
        question += "\n\n" + _string(values, "input")
    turns: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(values, "output")},
    ]
    if values.get("system"):
        turns.insert(0, {"role": "system", "content": _string(values, "system")})
    return _checked(turns)


def prompt_completion(values: Mapping[str, Any]) -> list[Message]:
    """{"prompt": …, "completion": …}: texts (one user and one assistant turn) or lists of messages."""
    turns: list[Any] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = values.get(column)
        turns += value if isinstance(value, list) else [{"role": role, "content": _string(values, column)}]
    return _checked(turns)


FORMATS: dict[str, Format] = {
    "text": text,
    "messages": messages,
    "conversations": conversations,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
}


def detect_format(columns: Collection[str]) -> str | None:
    """The name of the format that has these columns; conversations win over a text column beside them."""
    for name in ("messages", "conversations"):
        if name in columns:
            return name
    if {"instruction", "output"} <= set(columns):
        return "alpaca"
    if {"prompt", "completion"} <= set(columns):
        return "prompt_completion"
    return "text" if "text" in columns else None


@dataclass
class Counts:
    """What happened to the rows that gave no document."""

    bad_rows: int = 0
    empty_rows: int = 0


def read_documents(source: SourceConfig, data: DataConfig, counts: Counts) -> Iterator[tuple[Document, str]]:
    """(document, place) of every usable row, at most `data.max_documents`; long texts come as several
    documents.

    Raises:
        UserError: a bad row when `data.on_bad_rows` is "error", an unknown format name, or no usable row at
        all.
    """
    if source.format != "auto" and source.format not in FORMATS:
        raise UserError(
            f"unknown format {source.format!r}{suggestion(source.format, FORMATS)}",
            where=describe(source),
            fix=f"formats are auto, {', '.join(FORMATS)}",
        )
    count = 0
    for row in read_rows(source):
        try:
            if isinstance(row, BadRow):
                raise row
            document = to_document(row, source)
        except BadRow as bad:
            if data.on_bad_rows == "error":
                raise UserError(bad.what, where=bad.place, fix="fix the row, or set data.on_bad_rows: skip") from None
            counts.bad_rows += 1
            continue
        pieces = cut_text(document) if isinstance(document, str) else [document]
        for piece in pieces:
            if isinstance(piece, str) and not piece.strip():
                counts.empty_rows += 1
                continue
            yield piece, row.place
            count += 1
            if count == data.max_documents:
                return
    if not count:
        raise UserError(
            f"0 usable rows ({counts.bad_rows} bad, {counts.empty_rows} empty)",
            where=describe(source),
            fix="give a file with text in it",
        )


def to_document(row: Row, source: SourceConfig) -> Document:
    """The row's document, or `BadRow` with its place."""
    values = row.values
    if source.text_column != "text" and source.text_column in values:
        values = {**values, "text": values[source.text_column]}
    name = source.format if source.format != "auto" else detect_format(values)
    try:
        if name is None:
            raise BadRow(f"columns {sorted(values)} fit no format ({', '.join(FORMATS)}); is text_column missing?")
        if name == "text" and source.text_column not in ("text", *values):
            raise BadRow(f"text_column {source.text_column} is missing or null; columns are {sorted(values)}")
        return FORMATS[name](values)
    except BadRow as bad:
        raise BadRow(bad.what, row.place) from None


def document_texts(document: Document) -> list[str]:
    """The texts a document holds, without markup."""
    if isinstance(document, str):
        return [document]
    return [message[key] for message in document for key in ("reasoning_content", "content") if message.get(key)]


def _string(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        raise BadRow(f"{name} is missing or null; a text is needed")
    if not isinstance(value, str):
        raise BadRow(f"{name} is {shorten(value)}; a text is needed, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{name} is no valid UTF-8: {shorten(value[error.start])} at character {error.start + 1}"
        ) from None
    return value


def _conversation(values: Mapping[str, Any], column: str) -> list[Message]:
    turns = values.get(column)
    if not isinstance(turns, list):
        raise BadRow(f"{column} is {shorten(turns)}; a list of messages is needed")
    return _checked(turns)


def _checked(turns: list[Any]) -> list[Message]:
    """The messages in one spelling, roles in an allowed order."""
    result: list[Message] = []
    previous = ""
    for number, turn in enumerate(turns, 1):
        try:
            message = _message(turn)
        except BadRow as bad:
            raise BadRow(f"message {number}: {bad.what}") from None
        role = message["role"]
        if role not in NEXT_ROLES[previous]:
            after = f"after {previous}" if previous else "first"
            raise BadRow(f"message {number}: role {role} {after}; allowed is {' or '.join(NEXT_ROLES[previous])}")
        result.append(message)
        previous = role
    if not result:
        raise BadRow("the conversation is empty; at least one message is needed")
    return result


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{shorten(turn)} is no object with role and content")
    given = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = ROLE_NAMES.get(given, given) if isinstance(given, str) else given
    if not isinstance(role, str) or role not in NEXT_ROLES or not role:
        raise BadRow(f"role is {shorten(given)}; known are system, user, assistant, tool (and human, gpt)")

    tool_calls = _tool_calls(turn.get("tool_calls")) if role == "assistant" else []
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):  # OpenAI's parts; only text ones can be learned here
        content = "".join(_string(part if isinstance(part, Mapping) else {}, "text") for part in content)
    message: Message = {"role": role, "content": content}
    if content is None and tool_calls:
        message["content"] = ""
    _string(message, "content")
    if role == "assistant":
        if turn.get("reasoning_content"):
            message["reasoning_content"] = _string(turn, "reasoning_content")
        elif match := _THINK.fullmatch(message["content"]):
            message["reasoning_content"], message["content"] = match[1], match[2]
        if tool_calls:
            message["tool_calls"] = tool_calls
    return message


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """[{"function": {"name": …, "arguments": {…}}}]; accepts the list, or either part, as a JSON text."""
    if not value:
        return []
    calls = []
    try:
        for call in json.loads(value) if isinstance(value, str) else value:
            function = call.get("function") or call
            arguments = function.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append({"type": "function", "function": {"name": _string(function, "name"), "arguments": arguments}})
        json.dumps(calls, ensure_ascii=False).encode()  # half an emoji in there is a ValueError as well
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise BadRow(f"tool_calls is {shorten(value)}; a list of calls with name and arguments is needed") from None
    return calls
