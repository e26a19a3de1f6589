"""The chat template, and rendering the templates of other people's tokenizers.

A chat template is a program that comes with a model. Its language, Jinja, is sandboxed by `transformers`: it reads no
files. But it can loop for years or multiply a string until the memory is full, in places where no Python code could
interrupt it. So every template but our own is rendered in a process of its own, which may take `MAX_SECONDS` and
`MAX_MEMORY`, and which ends with ours.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from minimoe.errors import UserError

MAX_SECONDS = 5.0
MAX_MEMORY = 1 << 30  # bytes beyond what the process has when it starts; enforced on Linux
# A template puts a frame around the messages; some repeat parts of them.
MAX_CHARACTERS, MAX_GROWTH = 1 << 20, 8

# ChatML with tools, thinking and their results as Qwen3 has them, to the letter, so that its models and programs that
# read its format fit. After /no_think in a message, an answer is learned with an empty think part;
# enable_thinking=false puts one before what the model says. The generation marks tell which characters an assistant
# produces: they are what SFT learns.
CHAT_TEMPLATE = r"""
{%- set system = messages[0].content if messages and messages[0].role == "system" else "" %}
{%- if tools %}
    {{- "<|im_start|>system\n" + (system + "\n\n" if system else "") }}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" + (tool | tojson) }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments " }}
    {{- "within <tool_call></tool_call> XML tags:\n<tool_call>\n" }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(quiet=false) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set asked.quiet = "/no_think" in message.content %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\n" }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- "<think>\n" + message.reasoning_content + "\n</think>\n\n" }}
        {%- elif asked.quiet %}
            {{- "<think>\n\n</think>\n\n" }}
        {%- endif %}
        {{- message.content or "" }}
        {%- for call in message.tool_calls or [] %}
            {{- "\n" if message.content or not loop.first }}
            {{- "<tool_call>\n" + (call.function | tojson) + "\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>" }}
        {%- endgeneration %}
        {{- "\n" }}
    {%- elif message.role == "tool" %}
        {{- "<|im_start|>user" if loop.first or loop.previtem.role != "tool" }}
        {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
        {{- "<|im_end|>\n" if loop.last or loop.nextitem.role != "tool" }}
    {%- elif not (tools and loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}
""".strip()

Rendered = tuple[str, list[tuple[int, int]]]


def render(template: str, messages: Sequence[dict[str, Any]], **variables: Any) -> Rendered:
    """A conversation's text, and the (start, stop) characters of its assistant turns.

    Args:
        variables: what the template sees beside the messages: add_generation_prompt, bos_token, …

    Raises:
        UserError: the template cannot render the conversation, or not within the limits.
    """
    if template == CHAT_TEMPLATE:
        return _render(template, messages, variables)
    # The process id is part of the key: after a fork, two processes would talk into one pipe.
    return _worker(template, os.getpid()).render(messages, variables)


def _render(template: str, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> Rendered:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **variables
        )
    except Exception as error:  # Jinja's own, and whatever the template's expressions raise
        raise UserError(f"the chat template cannot render the conversation: {type(error).__name__}: {error}") from None
    return texts[0], [(start, stop) for start, stop in spans[0]]


@lru_cache(maxsize=1)
def _worker(template: str, pid: int) -> _Worker:
    return _Worker(template)


class _Worker:
    """A process that renders one template; requests and answers are lines of JSON."""

    # -I keeps the working folder off the path.
    _BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from minimoe.chat_template import serve; serve()"

    def __init__(self, template: str) -> None:
        command = [sys.executable, "-I", "-c", self._BOOT, json.dumps(sys.path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)  # type: ignore[call-overload]
        self._template: str | None = template  # travels with the first request
        self._lock = threading.Lock()

    def render(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> Rendered:
        request = json.dumps(
            {"template": self._template, "messages": messages, "variables": variables, "seconds": MAX_SECONDS}
        )
        with self._lock:
            try:
                with contextlib.suppress(BrokenPipeError):  # it is dead: the answer is empty
                    print(request, file=self._process.stdin, flush=True)
                answer = self._process.stdout.readline()
            except BaseException:  # Ctrl-C: a later request must not read this one's answer
                self._end()
                raise
            if not answer:
                self._end()
                raise UserError(
                    f"the chat template takes more than {MAX_SECONDS:g} s or {MAX_MEMORY >> 20} MiB to render",
                    fix="fix chat_template.jinja, or use another tokenizer",
                )
            self._template = None
        result = json.loads(answer)
        if "error" in result:
            raise UserError(result["error"], fix="fix chat_template.jinja, or use another tokenizer")
        return result["text"], [(start, stop) for start, stop in result["spans"]]

    def _end(self) -> None:
        _worker.cache_clear()
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Body of the process: answer requests until their pipe closes.

    A request that takes too long ends the process, from a thread of C that no template can hold up.
    """
    for name in ("SIGINT", "SIGTERM"):  # sent to every process of a run; the main one decides
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    import transformers.utils.chat_template_utils  # noqa: F401  (not on the template's time)

    _limit_memory()
    template = ""
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            request = json.loads(line)
            template = request["template"] or template
            faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nowhere)
            answer = _answer(template, request["messages"], request["variables"], len(line))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(answer), flush=True)


def _answer(template: str, messages: list[dict[str, Any]], variables: dict[str, Any], size: int) -> dict[str, Any]:
    try:
        text, spans = _render(template, messages, variables)
    except UserError as error:
        return {"error": error.what[:500].replace("\n", " ")}
    most = MAX_CHARACTERS + MAX_GROWTH * size
    if len(text) > most:
        return {"error": f"the chat template makes {len(text):,} characters of {size:,}; {most:,} are allowed"}
    return {"text": text, "spans": spans}


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):  # not Linux: the time limit has to do
        return
