"""The forms in which people have conversations, and the one that they become."""

from __future__ import annotations

import json

import pytest

from minimoe.conversation import BadConversation, conversation, split_answer
from minimoe.tokenizer import encode_chat, encode_prompt

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ARGUMENTS = {"city": "Köln", "days": [1, 2]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
AS_TEXT = "<tool_call>\n" + json.dumps(CALL["function"]) + "\n</tool_call>"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL | {"id": "call_1"}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
        },
        {"role": "assistant", "content": AS_TEXT},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps([CALL["function"]])},
        {"from": "gpt", "value": AS_TEXT},
    ],
)
def test_a_call_is_read_in_every_form(turn):
    result = {"role": "tool", "content": "sunny"}
    assert conversation([USER, turn, result, ASSISTANT]) == [USER, CALLING, result, ASSISTANT]


def test_parallel_calls_and_text_before_them_stay_in_order():
    other = {"type": "function", "function": {"name": "time", "arguments": {}}}
    text = "Let me see.\n" + AS_TEXT + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    expected = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, other]}
    assert conversation([USER, {"role": "assistant", "content": text}])[1] == expected
    value = json.dumps([CALL["function"], other["function"]])
    assert conversation([USER, {"from": "function_call", "value": value}])[1]["tool_calls"] == [CALL, other]


@pytest.mark.parametrize("role", ["tool", "observation", "function"])
@pytest.mark.parametrize("content", ['{"t": 21}', {"t": 21}, [{"type": "text", "text": '{"t": 21}'}]], ids=str)
def test_a_tools_result_is_read_in_every_form(role, content):
    turn = {"role": role, "content": content, "tool_call_id": "call_1", "name": "weather"}
    ignored: set[str] = set()
    assert conversation([USER, CALLING, turn], ignored=ignored)[2] == {"role": "tool", "content": '{"t": 21}'}
    assert not ignored


def test_qwens_results_in_a_users_turn_are_the_tools():
    text = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "noon"}]
    assert conversation([USER, CALLING, {"role": "user", "content": text}, ASSISTANT])[2:4] == results


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL])], ids=["OpenAI", "bare", "text"])
def test_tools_stand_in_the_system_message_or_beside_the_messages(tools):
    expected = [{"role": "system", "content": "", "tools": [TOOL]}, USER, ASSISTANT]
    assert conversation([USER, ASSISTANT], tools=tools) == expected
    assert conversation([{"role": "system", "content": "", "tools": tools}, USER, ASSISTANT]) == expected
    assert conversation([{"role": "system", "tools": tools}, USER, ASSISTANT]) == expected
    assert conversation([{"role": "system", "content": "s"}, USER], tools=tools)[0]["content"] == "s"


def test_a_system_text_beside_the_messages_opens_them():
    assert conversation([USER], system="s") == [{"role": "system", "content": "s"}, USER]
    assert conversation([{"role": "system", "content": "s"}, USER], system="s")[0]["content"] == "s"
    with pytest.raises(BadConversation, match="a system message, and beside it"):
        conversation([{"role": "system", "content": "t"}, USER], system="s")


@pytest.mark.parametrize("key", ["weight", "train", "loss_weight"])
def test_a_turn_that_is_not_to_be_learned_is_not(key, tiny_tokenizer):
    messages = conversation([USER, ASSISTANT | {key: 0}, USER, ASSISTANT | {key: 1}])
    assert [message.get("learned", True) for message in messages if message["role"] == "assistant"] == [False, True]
    ids, learned = encode_chat(tiny_tokenizer, messages)
    text = tiny_tokenizer.decode([token for token, flag in zip(ids, learned, strict=True) if flag])
    assert text == "a<|im_end|>"
    with pytest.raises(BadConversation, match=rf"message 2: {key} is 0.5; 0 \(not learned\) or 1"):
        conversation([USER, ASSISTANT | {key: 0.5}])


def test_parts_are_joined_and_others_refused_by_name():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    assert conversation([USER | {"content": parts}])[0]["content"] == "ab"
    with pytest.raises(BadConversation, match=r"image_url.*only parts of type text"):
        conversation([USER | {"content": [{"type": "image_url", "image_url": "x"}]}])


def test_keys_that_say_nothing_are_reported():
    ignored: set[str] = set()
    conversation([USER | {"timestamp": 5, "id": 1}, ASSISTANT | {"score": 0.5, "name": None}], ignored=ignored)
    assert ignored == {"timestamp", "score"}


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([USER, {"from": "function_call", "value": "weather(Köln)"}], "message 2: tool_calls is"),
        ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "a call has a name"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "object of arguments"),
        ([USER, CALLING | {"content": AS_TEXT}], "tool_calls and <tool_call> in the content"),
        ([USER | {"tools": [TOOL]}], "message 1: tools of role user"),
        ([USER | {"train": True}], "message 1: train of role user is True"),
        ([{"role": "system", "content": "s", "tools": "weather"}], "tools is 'weather', which is no JSON"),
        (
            [USER, ASSISTANT | {"reasoning_content": "r", "content": "<think>s</think>a"}],
            "reasoning_content and <think>",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_message(turns, what):
    with pytest.raises(BadConversation, match=what):
        conversation(turns)


def test_what_a_model_has_written_is_split_and_malformed_calls_stay_text():
    written = f"<think>\nhm\n</think>\n\nSee:\n{AS_TEXT}"
    expected = {"role": "assistant", "reasoning_content": "hm", "content": "See:", "tool_calls": [CALL]}
    assert split_answer(written) == expected
    malformed = "See:\n<tool_call>\n{'name': weather}\n</tool_call>"
    assert split_answer(malformed) == {"role": "assistant", "content": malformed}


CHAT = [
    {"role": "system", "content": "Be brief.", "tools": [TOOL]},
    USER,
    CALLING | {"reasoning_content": "hm", "content": "See."},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "noon"},
    ASSISTANT,
]
RENDERED = """\
<|im_start|>system
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
q<|im_end|>
<|im_start|>assistant
<think>
hm
</think>

See.
<tool_call>
{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
sunny
</tool_response>
<tool_response>
noon
</tool_response><|im_end|>
<|im_start|>assistant
a<|im_end|>
"""


def test_tools_and_calls_are_rendered_as_qwen3s_template_does(tiny_tokenizer):
    ids, learned = encode_chat(tiny_tokenizer, CHAT)
    assert tiny_tokenizer.decode(ids) == RENDERED
    text = tiny_tokenizer.decode([token for token, flag in zip(ids, learned, strict=True) if flag])
    assert text.startswith("<think>\nhm")
    assert text.endswith("</tool_call><|im_end|>a<|im_end|>")


@pytest.mark.parametrize("end", [2, 5])
def test_a_prompt_with_tools_is_a_prefix_of_its_conversation(end, tiny_tokenizer):
    prompt, (ids, _) = encode_prompt(tiny_tokenizer, CHAT[:end]), encode_chat(tiny_tokenizer, CHAT)
    assert ids[: len(prompt)] == prompt
