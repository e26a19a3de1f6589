"""Row formats: what a row of a dataset means.

`FORMATS` maps a name to a `Format`: the columns it reads, and a function from a row's values to a document. That is a
`str` for text, a list of messages (see `conversation.py`), or a preference or judgement (see `preferences.py`). To add
a format, write one function, enter it in `FORMATS` and, if its columns tell it apart, in `detect_format`. A function
raises `BadRow` for values that cannot be used, naming the column, the value and the rule.

A column that no format reads is counted, so that it can be reported. One whose name says that it matters is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minimoe.config import DataConfig, SourceConfig
from minimoe.conversation import NOTHING, BadConversation, Message, conversation, either
from minimoe.data.preferences import Judgement, Preference, judgement, preference
from minimoe.data.rows import BadRow, Row
from minimoe.data.sources import describe, read_rows, unread_files
from minimoe.data.text_files import cut_text
from minimoe.errors import UserError, shorten, suggestion

Document = str | list[Message] | Preference | Judgement

_SYSTEM, _TOOLS = ("system", "system_prompt"), ("tools", "functions")  # columns beside any conversation
_PROMPTS = ("messages", "conversations", "question", "instruction", "input")  # beside chosen and rejected
# Left out, these would make a conversation another one.
_MATTERS = {
    *("history", "images", "image", "videos", "video", "audios", "audio", "chosen", "rejected", "label", "documents"),
    "loss_weight",
    *_SYSTEM,
    *_TOOLS,
}


class Format(NamedTuple):
    """How rows become documents."""

    columns: tuple[str, ...]  # that are read
    read: Callable[[Mapping[str, Any], set[str]], Document]  # also fills the set with keys of messages that say nothing


def text(values: Mapping[str, Any], ignored: set[str]) -> str:
    """{"text": "…"}: a document."""
    return _string(values, "text")


def messages(values: Mapping[str, Any], ignored: set[str]) -> list[Message]:
    """{"messages": [{"role": "user", "content": "…"}, …]}, as OpenAI has it."""
    return _conversation(values, _turns(values, "messages"), ignored)


def conversations(values: Mapping[str, Any], ignored: set[str]) -> list[Message]:
    """{"conversations": [{"from": "human", "value": "…"}, …]} (ShareGPT), or role and content (minimind)."""
    return _conversation(values, _turns(values, "conversations"), ignored)


def alpaca(values: Mapping[str, Any], ignored: set[str]) -> list[Message]:
    """{"instruction": "…", "input": "…", "output": "…"}; a non-empty input follows after a blank line.

    `history` holds earlier turns, [question, answer] each.
    """
    question = _string(values, "instruction")
    if values.get("input"):
        question += "\n\n" + _string(values, "input")
    turns = []
    history = _parsed(values.get("history")) or []
    if not isinstance(history, list):
        raise BadRow(f"history is {shorten(history)}; a list of [question, answer] is needed")
    for pair in [*history, [question, _string(values, "output")]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history has {shorten(pair)}; [question, answer] is needed")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _conversation(values, turns, ignored)


def prompt_completion(values: Mapping[str, Any], ignored: set[str]) -> list[Message]:
    """{"prompt": …, "completion": …}: texts (one user and one assistant turn) or lists of messages."""
    turns: list[Any] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = _parsed(values.get(column))
        turns += value if isinstance(value, list) else [{"role": role, "content": _string(values, column)}]
    return _conversation(values, turns, ignored)


def chosen_rejected(values: Mapping[str, Any], ignored: set[str]) -> Preference:
    """{"prompt": …, "chosen": …, "rejected": …}: which answer is preferred, as texts or messages.

    The prompt may also stand in `messages`, `conversations`, `question` or `instruction` (with `input`), or in both
    sides themselves: lists of messages, or texts as Anthropic's HH rows have them.
    """
    names = ("messages", "conversations", "question", "instruction")
    prompt = _turns_or_text(either(values, "prompt", *(name for name in names if values.get(name) not in NOTHING)))
    if values.get("input") not in NOTHING:
        if not isinstance(values.get("instruction"), str):
            raise BadRow(f"input is {shorten(values['input'])}; it belongs to an instruction, which is missing")
        prompt = [{"role": "user", "content": values["instruction"] + "\n\n" + _string(values, "input")}]
    sides = {column: _parsed(values.get(column)) for column in ("chosen", "rejected")}
    for column, side in sides.items():  # both may begin with the prompt that also stands apart
        if prompt is not None and isinstance(side, list) and side[: len(prompt)] == prompt:
            sides[column] = side[len(prompt) :]
    return preference(sides, lambda turns: _conversation(values, turns, ignored), prompt)


def labelled(values: Mapping[str, Any], ignored: set[str]) -> Judgement:
    """{"prompt": …, "completion": …, "label": true}, or messages with a label: whether an answer is wanted."""
    given = [name for name in ("completion", "messages", "conversations") if values.get(name) not in NOTHING]
    if len(given) != 1 or (given != ["completion"] and values.get("prompt") not in NOTHING):
        raise BadRow(f"label with {' and '.join(given)}; prompt and completion, or messages alone, are needed")
    column = given[0]
    if column == "completion":
        return judgement(prompt_completion(values, ignored), values.get("label"))
    return judgement(_conversation(values, _turns(values, column), ignored), values.get("label"))


FORMATS: dict[str, Format] = {
    "text": Format(("text",), text),
    "messages": Format(("messages", *_SYSTEM, *_TOOLS), messages),
    "conversations": Format(("conversations", *_SYSTEM, *_TOOLS), conversations),
    "alpaca": Format(("instruction", "input", "output", "history", *_SYSTEM, *_TOOLS), alpaca),
    "prompt_completion": Format(("prompt", "completion", *_SYSTEM, *_TOOLS), prompt_completion),
    "preference": Format(("chosen", "rejected", "prompt", *_PROMPTS, *_SYSTEM, *_TOOLS), chosen_rejected),
    "label": Format(("prompt", "completion", "messages", "conversations", "label", *_SYSTEM, *_TOOLS), labelled),
}


def detect_format(columns: Collection[str]) -> str | None:
    """The name of the format that has these columns; conversations win over a text column beside them."""
    if {"chosen", "rejected"} <= set(columns):
        return "preference"
    if "label" in columns and {"completion", "messages", "conversations"} & set(columns):
        return "label"
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
    """What was not used of the rows."""

    bad_rows: int = 0
    empty_rows: int = 0
    ignored: Counter[str] = field(default_factory=Counter)  # rows with a column, or key of messages, that is not read


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
            document = to_document(row, source, counts.ignored)
        except BadRow as bad:
            if data.on_bad_rows == "error":
                fix = "fix the row, or set data.on_bad_rows: skip" + (f"; {bad.fix}" if bad.fix else "")
                raise UserError(bad.what, where=bad.place, fix=fix) from None
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


def to_document(row: Row, source: SourceConfig, ignored: Counter[str] | None = None) -> Document:
    """The row's document, or `BadRow` with its place; counts in `ignored` what is not read."""
    values = row.values
    if source.text_column != "text" and source.text_column in values:
        values = {**values, "text": values[source.text_column]}
        del values[source.text_column]
    filled = [column for column in values if values[column] not in NOTHING]
    name = source.format if source.format != "auto" else detect_format(filled) or detect_format(values)
    keys: set[str] = set()
    try:
        if name is None:
            raise BadRow(f"columns {sorted(values)} fit no format ({', '.join(FORMATS)}); is text_column missing?")
        if name == "text" and source.text_column != "text" and source.text_column not in row.values:
            raise BadRow(f"text_column {source.text_column} is missing or null; columns are {sorted(values)}")
        others = [column for column in filled if column not in FORMATS[name].columns]
        for column in others:
            if column in _MATTERS:
                raise BadRow(f"format {name} has no {column}, which is {shorten(values[column])}; remove the column")
        document = FORMATS[name].read(values, keys)
    except (BadRow, BadConversation) as bad:
        raise BadRow(str(bad), row.place) from None
    if ignored is not None:
        ignored.update(others)
        ignored.update(f"message {key}" for key in keys)
    return document


def left_aside(sources: Sequence[SourceConfig], ignored: Mapping[str, int]) -> dict[str, str]:
    """What is there and not read, for a person, the most frequent first: nothing, or columns and files."""
    files = sum((unread_files(source) for source in sources), Counter[str]())
    lists = {
        "ignored columns": [f"{name} ({count:,} rows)" for name, count in Counter(ignored).most_common()],
        "files not read": [f"{count:,} {suffix}" for suffix, count in files.most_common()],
    }
    return {name: ", ".join(values) for name, values in lists.items() if values}


def document_texts(document: Document) -> list[str]:
    """The texts a document holds, without markup."""
    if isinstance(document, str):
        return [document]
    if isinstance(document, Preference):
        return document_texts(document.chosen) + document_texts(document.rejected)
    if isinstance(document, Judgement):
        return document_texts(document.messages)
    texts = []
    for message in document:
        texts += [json.dumps(tool, ensure_ascii=False) for tool in message.get("tools", ())]
        texts += [message[key] for key in ("reasoning_content", "content") if message.get(key)]
        texts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return texts


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


def _turns_or_text(value: Any) -> list[Any] | None:
    """A prompt: a text is what the user says."""
    value = _parsed(value)
    if value is None or isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise BadRow(f"the prompt is {shorten(value)}; a text or messages are needed")
    return [{"role": "user", "content": value}]


def _turns(values: Mapping[str, Any], column: str) -> list[Any]:
    turns = _parsed(values.get(column))
    if not isinstance(turns, list):
        raise BadRow(f"{column} is {shorten(turns)}; a list of messages is needed")
    return turns


def _parsed(value: Any) -> Any:
    """A list that stands as JSON text in a column of csv or parquet."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # a text that begins with a bracket
    return value


def _conversation(values: Mapping[str, Any], turns: list[Any], ignored: set[str]) -> list[Message]:
    """The messages, with the columns beside them."""
    system, tools = either(values, *_SYSTEM), either(values, *_TOOLS)
    if system is not None and not isinstance(system, str):
        raise BadRow(f"system is {shorten(system)}; a text is needed, not {type(system).__name__}")
    return conversation(turns, system=system or "", tools=tools, ignored=ignored)
