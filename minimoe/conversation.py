"""One internal form of conversations, for training data and for prompts alike.

A message is {"role": system | user | assistant | tool, "content": text}. Beside these
- an assistant's has `reasoning_content` (its think part), `tool_calls`, `learned: False` where it is not to be learned,
  and in a chat `token_ids`, what the model generated,
- the first, of role system, has `tools`: what the assistant may call, as JSON schemas.
A call is {"type": "function", "function": {"name": text, "arguments": object}}.

`conversation` makes it of the forms that people have: OpenAI's, ShareGPT's, Qwen's text with `<tool_call>` in it,
minimind's. What it does not know is refused or reported, never left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minimoe.errors import shorten

Message = dict[str, Any]

# What may follow what; "" is the start.
NEXT_ROLES = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# Words of ShareGPT, and of OpenAI before tools.
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "function": "tool", "observation": "tool"}
_READ = {  # keys of a message
    "system": {"tools", "functions"},
    "user": {"tools", "functions"},
    "assistant": {"reasoning_content", "tool_calls", "function_call"},
    "tool": set(),
}
# Calls and results keep their order, so that these say nothing more; a result's name is that of its call.
_IMPLIED = {"id", "tool_call_id", "name", "refusal", "audio", "annotations"}
NOTHING: tuple[Any, ...] = (None, "", [], {})  # values that say nothing
_LEARNED = ("weight", "train", "loss_weight")  # of OpenAI, axolotl and others
_THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n*(.*)", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_CALLS = re.compile(rf"(.*?)\s*((?:{_CALL.pattern.replace('(.*?)', '.*?')}\s*)+)", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_RESPONSES = re.compile(rf"\s*(?:{_RESPONSE.pattern.replace('(.*?)', '.*?')}\s*)+", re.DOTALL)


class BadConversation(ValueError):
    """What is wrong with a conversation, naming the message, the value and the rule."""


def conversation(
    turns: Sequence[Any],
    *,
    system: str = "",
    tools: Any = None,
    ignored: set[str] | None = None,
    generated: bool = False,
) -> list[Message]:
    """The messages in the one form, roles in an allowed order.

    Args:
        turns: messages as people have them.
        system: what a column beside the messages says.
        tools: likewise; a list, or JSON text of one.
        ignored: filled with the keys of messages that say nothing here.
        generated: an assistant's message may have `token_ids`, what this model generated, which are then kept.

    Raises:
        BadConversation: naming the message.
    """
    if not turns:
        raise BadConversation("the conversation is empty; at least one message is needed")
    result: list[Message] = []
    for number, turn in enumerate(turns, 1):
        try:
            messages = list(_messages(turn, ignored if ignored is not None else set()))
            if generated and isinstance(turn, Mapping) and turn.get("token_ids") and messages[0]["role"] == "assistant":
                messages[0]["token_ids"] = list(turn["token_ids"])
            result += messages
        except BadConversation as bad:
            raise BadConversation(f"message {number}: {bad}") from None
    result = _with_opening(result, system, read_tools(tools))
    previous = ""
    for number, message in enumerate(result, 1):
        role = message["role"]
        if role not in NEXT_ROLES[previous]:
            after = f"after {previous}" if previous else "first"
            raise BadConversation(
                f"message {number}: role {role} {after}; allowed is {' or '.join(NEXT_ROLES[previous])}"
            )
        previous = role
    return result


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Tools as OpenAI lists them: {"type": "function", "function": {"name": …, …}}; a bare function is put into one.

    Raises:
        BadConversation: it is no list of them.
    """
    value = _parsed(value, "tools") if isinstance(value, str) and value.strip() else value
    if not value:
        return []
    if not isinstance(value, list):
        raise BadConversation(f"tools is {shorten(value)}; a list is needed")
    tools = []
    for tool in value:
        tool = _parsed(tool, "tools") if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadConversation(f"a tool is {shorten(tool)}; an object with a name is needed")
        _check_text(json.dumps(tool, ensure_ascii=False), "tools")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(function)})
    return tools


def split_answer(text: str) -> Message:
    """What a model has written, as a message: its think part, its text and its calls.

    A call that is no JSON stays in the text.
    """
    message: Message = {"role": "assistant", "content": text}
    if match := _THINK.fullmatch(text):
        message["reasoning_content"], message["content"] = match[1], match[2]
    if match := _CALLS.fullmatch(message["content"]):
        try:
            message["tool_calls"] = [_call(json.loads(part)) for part in _CALL.findall(match[2])]
            message["content"] = match[1]
        except (ValueError, RecursionError):
            message.pop("tool_calls", None)
    return message


def _messages(turn: Any, ignored: set[str]) -> Iterator[Message]:
    """The message, or a tool's results that stand in one as text."""
    if not isinstance(turn, Mapping):
        raise BadConversation(f"{shorten(turn)} is no object with role and content")
    given = either(turn, "role", "from")
    role = _ROLES.get(given, given) if isinstance(given, str) else given
    if not isinstance(role, str) or role not in NEXT_ROLES or not role:
        raise BadConversation(f"role is {shorten(given)}; known are system, user, assistant, tool (and human, gpt)")
    value = either(turn, "content", "value")
    learned = _learned(turn, role)
    if role == "assistant":
        message = _assistant(turn, _calls_text(value) if given == "function_call" else value)
        yield message if learned else message | {"learned": False}
    elif role == "tool" and isinstance(value, (dict, list)) and not _is_parts(value):
        yield {"role": role, "content": json.dumps(value, ensure_ascii=False)}
    else:
        tools = read_tools(either(turn, "tools", "functions"))
        content = "" if value is None and tools else _text(value, "content")
        if tools and role != "system":
            raise BadConversation(f"tools of role {role}; they belong to the system message")
        if role == "user" and _RESPONSES.fullmatch(content):
            yield from ({"role": "tool", "content": part} for part in _RESPONSE.findall(content))
        else:
            yield {"role": role, "content": content} | ({"tools": tools} if tools else {})
    known = {"role", "from", "content", "value", *_READ[role], *_IMPLIED, *_LEARNED}
    ignored.update(key for key in turn if turn[key] not in NOTHING and key not in known)


def either(values: Mapping[str, Any], *names: str) -> Any:
    """The value that stands under one of these names; None if there is none.

    Raises:
        BadConversation: there are two.
    """
    given = {name: values[name] for name in names if values.get(name) is not None}
    first = next(iter(given.values()), None)
    for name, value in list(given.items())[1:]:
        if value not in NOTHING and value != first and first not in NOTHING:
            raise BadConversation(
                f"{next(iter(given))} is {shorten(first)}, and {name} {shorten(value)}; give one of them"
            )
    return next((value for value in given.values() if value not in NOTHING), first)


def _assistant(turn: Mapping[str, Any], value: Any) -> Message:
    calls = _calls(turn.get("tool_calls")) + _calls([turn["function_call"]] if turn.get("function_call") else None)
    content = "" if value is None and calls else _text(value, "content")
    message = split_answer(content)
    if calls and "tool_calls" in message:
        raise BadConversation("tool_calls and <tool_call> in the content; one of them is needed")
    if turn.get("reasoning_content"):
        if "reasoning_content" in message:
            raise BadConversation("reasoning_content and <think> in the content; one of them is needed")
        message = {**message, "reasoning_content": _text(turn["reasoning_content"], "reasoning_content")}
    return message | {"tool_calls": calls} if calls else message


def _learned(turn: Mapping[str, Any], role: str) -> bool:
    """Whether the turn is learned; a share of a turn's loss there is not."""
    for key in _LEARNED:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise BadConversation(f"{key} is {shorten(value)}; 0 (not learned) or 1 is possible")
        if role != "assistant" and value and key == "train":
            raise BadConversation(f"{key} of role {role} is {value}; only what the assistant says is learned")
        if not value:
            return False
    return True


def _calls(value: Any) -> list[dict[str, Any]]:
    """A list of calls, or either part of it as JSON text."""
    if not value:
        return []
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        return [_call(call) for call in ([calls] if isinstance(calls, Mapping) else calls)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = f": {error}" if isinstance(error, BadConversation) else ""
        raise BadConversation(
            f"tool_calls is {shorten(value)}; a list of calls with name and arguments is needed{reason}"
        ) from None


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") or call
    name = function.get("name")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise BadConversation("a call has a name and an object of arguments")
    _check_text(json.dumps([name, arguments], ensure_ascii=False), "tool_calls")
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _calls_text(value: Any) -> str:
    """ShareGPT's `function_call`: its value is a call, or a list of calls, mostly as JSON text."""
    return "\n".join(
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in _calls(value)
    )


def _with_opening(messages: list[Message], system: str, tools: list[dict[str, Any]]) -> list[Message]:
    """The messages with what stands beside them: a system text and tools."""
    opening = messages[0] if messages and messages[0]["role"] == "system" else None
    if opening is None:
        if not system and not tools:
            return messages
        opening = {"role": "system", "content": system}
        messages = [opening, *messages]
    elif system and opening["content"] not in ("", system):
        raise BadConversation(f"a system message, and beside it system {shorten(system)}; one of them is needed")
    if tools and opening.get("tools", tools) != tools:
        raise BadConversation("tools in the system message, and others beside it; one of them is needed")
    first = opening | {"content": opening["content"] or system}
    return [first | {"tools": tools} if tools else first, *messages[1:]]


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) and "type" in part for part in value)
    )


def _text(value: Any, name: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    if value is None:
        raise BadConversation(f"{name} is missing or null; a text is needed")
    if not isinstance(value, str):
        raise BadConversation(f"{name} is {shorten(value)}; a text is needed, not {type(value).__name__}")
    _check_text(value, name)
    return value


def _part(part: Any) -> str:
    if isinstance(part, str):
        return _text(part, "content")
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text"):
        raise BadConversation(f"a part of the content is {shorten(part)}; only parts of type text can be learned")
    return _text(part.get("text") if part.get("text") is not None else part.get("value"), "text")


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadConversation(f"{name} is {shorten(text)}, which is no JSON") from None


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadConversation(
            f"{name} is no valid UTF-8: {shorten(text[error.start])} at character {error.start + 1}"
        ) from None
