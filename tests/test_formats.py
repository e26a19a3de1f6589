from __future__ import annotations

import pytest

from minimoe.config import SourceConfig
from minimoe.data.formats import FORMATS, BadRow, Counts, detect_format, read_documents, to_document
from minimoe.data.rows import Row
from minimoe.errors import UserError

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def read(values, **source):
    return to_document(Row(values, "f:1"), SourceConfig(path="f", **source))


@pytest.mark.parametrize(
    ("values", "name", "document"),
    [
        ({"text": "t", "id": 1}, "text", "t"),
        ({"messages": [USER, ASSISTANT]}, "messages", [USER, ASSISTANT]),
        ({"conversations": [USER, ASSISTANT]}, "conversations", [USER, ASSISTANT]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
            [USER, ASSISTANT],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "q", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "alpaca",
            [{"role": "user", "content": "q\n\ni"}, ASSISTANT],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [USER, ASSISTANT]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", [USER, ASSISTANT]),
    ],
)
def test_each_format_is_detected_and_read(values, name, document):
    assert detect_format(values) == name
    assert read(values) == document == read(values, format=name)
    assert name in FORMATS


def test_text_can_be_in_another_column():
    assert read({"story": "t"}, text_column="story") == "t"


def test_a_named_text_column_that_is_missing_is_not_replaced_by_another():
    with pytest.raises(BadRow, match="text_column story is missing"):
        read({"text": "t"}, text_column="story")


def test_parts_of_a_message_are_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [USER | {"content": parts}]})[0]["content"] == "ab"


def test_a_think_part_is_split_off_the_answer():
    expected = {"role": "assistant", "reasoning_content": "hm\nhm", "content": "a"}
    written = {"role": "assistant", "content": "<think>\nhm\nhm\n</think>\n\na"}
    assert read({"messages": [USER, written]})[1] == expected
    assert read({"messages": [USER, expected]})[1] == expected


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_tool_calls_are_kept_and_null_content_beside_them_is_empty(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = read({"messages": [*messages, {"role": "tool", "content": "r"}]})[1]
    assert answer["content"] == ""
    assert answer["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({}, r"columns \[\] fit no format"),
        ({"txet": "t"}, r"columns \['txet'\] fit no format"),
        ({"text": None}, "text is missing or null"),
        ({"text": 5}, "text is 5; a text is needed, not int"),
        ({"text": "\ud83d"}, "no valid UTF-8"),
        ({"messages": None}, "a list of messages is needed"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": ["hi"]}, "message 1: 'hi' is no object"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "message 1: role is 'boss'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 1: role is \['user'\]"),
        ({"messages": [{"role": "user"}]}, "message 1: content is missing"),
        ({"messages": [USER, ASSISTANT | {"content": 3}]}, "message 2: content is 3"),
        ({"messages": [ASSISTANT]}, "message 1: role assistant first; allowed is system or user"),
        ({"messages": [USER, USER]}, "message 2: role user after user; allowed is assistant"),
        ({"messages": [USER, {"role": "system", "content": "s"}]}, "message 2: role system after user"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": "x"}]}, "message 2: tool_calls is 'x'"),
        (
            {"messages": [USER | {"content": [{"type": "image_url"}]}]},
            "message 1: a part of the content is .*image_url.* only parts of type text",
        ),
        ({"instruction": "q", "output": None}, "output is missing"),
        ({"prompt": "q", "completion": 1}, "completion is 1"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, "content is nan; a text is needed"),
        ({"prompt": "a", "completion": "b", "loss_weight": 0.5}, "has no loss_weight, which is 0.5; remove the column"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_and_where(values, what):
    with pytest.raises(BadRow, match=what) as caught:
        read(values)
    assert caught.value.place == "f:1"


def test_an_unknown_format_name_gets_a_suggestion(data_config, write_jsonl):
    source = SourceConfig(path=str(write_jsonl([{"text": "a"}])), format="mesages")
    with pytest.raises(UserError, match="did you mean 'messages'"):
        list(read_documents(source, data_config("x"), Counts()))


def test_bad_rows_stop_the_run_or_are_counted(data_config, write_jsonl):
    path = write_jsonl([{"text": "a"}, {"text": None}, {"text": " \n"}, {"text": "b"}])
    source = SourceConfig(path=str(path))
    with pytest.raises(UserError) as caught:
        list(read_documents(source, data_config("x"), Counts()))
    assert caught.value.where == f"{path}:2"
    assert "on_bad_rows: skip" in caught.value.fix

    counts = Counts()
    documents = list(read_documents(source, data_config("x", on_bad_rows="skip"), counts))
    assert [document for document, _ in documents] == ["a", "b"]
    assert counts == Counts(bad_rows=1, empty_rows=1)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n', '{"text": 1}\n'])
def test_data_without_a_usable_row_is_a_user_error(tmp_path, data_config, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="0 usable rows"):
        list(read_documents(SourceConfig(path=str(path)), data_config("x", on_bad_rows="skip"), Counts()))


def test_max_documents_limits_a_source(data_config, write_jsonl):
    source = SourceConfig(path=str(write_jsonl([{"text": str(number)} for number in range(9)])))
    assert len(list(read_documents(source, data_config("x", max_documents=4), Counts()))) == 4


def test_a_long_text_becomes_several_documents(data_config, write_jsonl):
    text = "some words\n" * 20_000
    source = SourceConfig(path=str(write_jsonl([{"text": text}])))
    documents = [document for document, _ in read_documents(source, data_config("x"), Counts())]
    assert len(documents) == 4
    assert "".join(documents) == text
