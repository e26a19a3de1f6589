"""docs/formats.md shows every accepted form of a row with the text that the model sees, as the code makes it.

python -m tests.test_formats_page        writes the page anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.chat_template import CHAT_TEMPLATE, render
from minimoe.config import SourceConfig
from minimoe.data.formats import FORMATS, BadRow, Counts, document_texts, to_document
from minimoe.data.preferences import Judgement, Preference
from minimoe.data.rows import Row

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "How are you?"}
ANSWERED = {"role": "assistant", "content": "Well."}
RUDE = {"role": "assistant", "content": "Go away."}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"text": "Once upon a time."}),
    ("messages (OpenAI)", {"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]}),
    ("messages, system beside them", {"messages": [ASKED, ANSWERED], "system": "Be brief."}),
    ("messages as JSON text (csv, parquet)", {"messages": json.dumps([ASKED, ANSWERED])}),
    (
        "content in parts",
        {
            "messages": [
                ASKED | {"content": [{"type": "text", "text": "How "}, {"type": "text", "value": "are you?"}]},
                ANSWERED,
            ]
        },
    ),
    ("a think part", {"messages": [ASKED, ANSWERED | {"content": "<think>\nHm.\n</think>\n\nWell."}]}),
    ("a think part apart", {"messages": [ASKED, ANSWERED | {"reasoning_content": "Hm."}]}),
    (
        "a turn that is not learned (`weight: 0`, `train: false` or `loss_weight: 0`)",
        {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED]},
    ),
    (
        "tools and calls (OpenAI)",
        {
            "tools": [TOOL],
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
                ANSWERED,
            ],
        },
    ),
    (
        "calls as text (Qwen)",
        {
            "messages": [
                ASKED,
                ANSWERED | {"content": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
                ASKED | {"content": "<tool_response>\nsunny\n</tool_response>"},
                ANSWERED,
            ]
        },
    ),
    (
        "conversations (ShareGPT)",
        {"conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Well."}]},
    ),
    (
        "calls (ShareGPT)",
        {
            "conversations": [
                {"from": "human", "value": "How are you?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "Well."},
            ],
            "tools": json.dumps([TOOL]),
        },
    ),
    (
        "conversations (minimind)",
        {"conversations": [{"role": "system", "content": "", "tools": json.dumps([TOOL])}, ASKED, ANSWERED]},
    ),
    ("alpaca", {"instruction": "How are you?", "input": "Be brief.", "output": "Well."}),
    (
        "alpaca with history",
        {"instruction": "And now?", "input": "", "output": "Still.", "history": [["How are you?", "Well."]]},
    ),
    ("prompt_completion", {"prompt": "How are you?", "completion": "Well.", "system": "Be brief."}),
    ("prompt_completion with messages", {"prompt": [ASKED], "completion": [ANSWERED]}),
    ("preference (dpo)", {"prompt": "How are you?", "chosen": "Well.", "rejected": "Go away."}),
    (
        "preference with its prompt in both",
        {"chosen": [ASKED, ANSWERED, ASKED, ANSWERED], "rejected": [ASKED, ANSWERED, ASKED, RUDE]},
    ),
    (
        "preference (LLaMA-Factory)",
        {
            "conversations": [{"from": "human", "value": "How are you?"}],
            "chosen": {"from": "gpt", "value": "Well."},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
    ),
    (
        "preference (Anthropic HH)",
        {
            "chosen": "\n\nHuman: How are you?\n\nAssistant: Well.",
            "rejected": "\n\nHuman: How are you?\n\nAssistant: Go away.",
        },
    ),
    ("label (dpo.loss: kto)", {"prompt": "How are you?", "completion": "Go away.", "label": False}),
]


def read(values: dict[str, Any], counts: Counts | None = None):
    return to_document(Row(values, "f:1"), SourceConfig(path="f"), counts.ignored if counts else None)


def attempt(values: dict[str, Any]):
    """The document and what is reported; no document where the row is refused."""
    counts = Counts()
    try:
        return read(values, counts), counts.ignored
    except BadRow:
        return None, counts.ignored


def seen(document) -> str:
    """The text that the model sees; [what it learns], in SFT, stands in brackets."""
    if isinstance(document, str):
        return f"<|endoftext|>{document}<|endoftext|>"
    if isinstance(document, Preference):
        return f"chosen:\n{seen(document.chosen).rstrip()}\n\nrejected:\n{seen(document.rejected)}"
    if isinstance(document, Judgement):
        return f"{'wanted' if document.wanted else 'unwanted'}:\n{seen(document.messages)}"
    messages = [dict(message) for message in document]
    tools = messages[0].pop("tools", [])
    if tools and not messages[0]["content"]:
        messages = messages[1:]
    text, spans = render(CHAT_TEMPLATE, messages, **({"tools": tools} if tools else {}))
    turns = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    for (start, stop), learned in reversed(list(zip(spans, turns, strict=True))):
        if learned:
            text = f"{text[:start]}[{text[start:stop]}]{text[stop:]}"
    return text


INTRODUCTION = """\
# Forms of a row
What a row of a data file may look like, and the text that the model sees. In SFT, what stands in [brackets] is learned;
in pretraining all of it is, but the document's first token; of preferences it is what is compared. A test makes this
page from the code: `python -m tests.test_formats_page` writes it anew.

A column or key that is not read is listed once, with the number of its rows, when training starts and by `minimoe
preview`. One whose name says that it matters (`images`, `history`, `chosen`, …) and that the format cannot take is
refused. In parquet and arrow, nulls inside of objects are what other rows have, and are left out.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for name, values in ROWS:
        row = json.dumps(values, ensure_ascii=False)
        parts.append(f"## {name}\n```json\n{row}\n```\n```\n{seen(read(values)).rstrip()}\n```\n")
    return "\n".join(parts)


def test_the_page_shows_what_the_code_does():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.test_formats_page writes it anew"


def test_every_format_is_on_the_page():
    assert {name.split()[0].strip(",") for name, _ in ROWS} >= set(FORMATS)


values = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text("ab[<", max_size=6)
    | st.lists(st.text("ab", max_size=3), max_size=2)
)
names = st.sampled_from(
    "system system_prompt tools functions history images chosen id source weight text input messages extra".split()
)


@settings(max_examples=300, deadline=None)
@given(row=st.sampled_from([row for _, row in ROWS]), extra=st.dictionaries(names, values, max_size=3))
def test_a_column_is_rendered_refused_or_reported_and_never_lost_in_silence(row, extra):
    extra = {name: value for name, value in extra.items() if name not in row}
    document, ignored = attempt(row | extra)
    if document is None:
        return
    shown = "\n".join(document_texts(document))
    for name, value in extra.items():
        rendered = isinstance(value, str) and value in shown
        assert not value or rendered or ignored[name] == 1, (name, value)
    assert all(text in shown for text in document_texts(read(row)))


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from("tools functions weight train loss_weight tool_calls function_call name id extra".split()),
    value=values,
    role=st.sampled_from(["user", "assistant"]),
)
def test_a_key_of_a_message_is_honoured_refused_or_reported(key, value, role):
    turns = [turn | ({key: value} if turn["role"] == role else {}) for turn in (ASKED, ANSWERED)]
    document, ignored = attempt({"messages": turns})
    if document is None or not value or key in ("name", "id"):  # these say nothing beside the order of messages
        return
    if key in ("weight", "train", "loss_weight"):
        assert document[1].get("learned", True)
    else:
        assert ignored[f"message {key}"] == 1


@pytest.mark.parametrize("column", ["images", "history", "chosen", "audio"])
def test_a_column_that_matters_and_cannot_be_honoured_is_refused_by_name(column):
    with pytest.raises(BadRow, match=f"format messages has no {column}, which is .*; remove the column"):
        read({"messages": [ASKED, ANSWERED], column: ["x"]})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
