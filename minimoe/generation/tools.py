"""Tools that a model may call while it answers: Python functions, or commands with a JSON schema.

`--tools FILE` takes
- a Python file: every public function with a docstring in Google's style and type hints is a tool,
- a YAML or JSON file: under the key `tools`, a list of tools as OpenAI has them, each with `command`, a list of words
  to run. It gets the arguments as a JSON object on standard input, and what it prints is the result,
- `calculator`, the example in this folder.

Functions run in a process of their own. A call has a time limit, a result a length limit, an answer a number of calls.
What goes wrong is the result that the model gets.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minimoe.config import GenerationSection
from minimoe.config.strict_yaml import read_yaml
from minimoe.conversation import BadConversation, Message, read_tools, split_answer
from minimoe.errors import UserError
from minimoe.generation.engine import Completion, Engine
from minimoe.outside import START_SECONDS, Outside

MAX_ROUNDS = 8  # of calls in one answer
MAX_SECONDS = 10.0  # of one call
MAX_CHARACTERS = 4096  # of one result
BUILT_IN = {"calculator": Path(__file__).with_name("calculator.py")}


class Toolbox:
    """What may be called.

    Args:
        spec: a file, or a name of `BUILT_IN`.

    Raises:
        UserError: no such file, nothing in it that could be called, or a function without docstring or hints.
    """

    def __init__(self, spec: str, seconds: float = MAX_SECONDS) -> None:
        path = BUILT_IN.get(spec, Path(os.path.expanduser(spec)))
        if not path.is_file():
            raise UserError(
                f"--tools {spec}: no such file", fix=f"give a .py, .yaml or .json file, or {next(iter(BUILT_IN))}"
            )
        self._seconds = seconds
        self._commands: dict[str, list[str]] = {}
        self._outside: Outside | None = None
        self.schemas: list[dict[str, Any]] = []
        if path.suffix == ".py":
            self._read_functions(path)
        else:
            self._read_commands(path)
        self.names = [tool["function"]["name"] for tool in self.schemas]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result as a text, or what went wrong."""
        if name not in self.names:
            return f"Error: there is no tool {name}; there is {', '.join(self.names)}"
        if name in self._commands:
            result = self._run(name, arguments)
        else:
            assert self._outside is not None
            value, problem = self._outside.call(self.names.index(name), **arguments)
            result = f"Error: {problem}" if problem else value
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + f" … ({len(text):,} characters)"

    def end(self) -> None:
        """End the functions' process."""
        if self._outside is not None:
            self._outside.end()

    def _read_functions(self, path: Path) -> None:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError) as error:
            raise UserError(f"--tools {path}: {error}", fix="give a Python file") from None
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        if not names:
            raise UserError(f"--tools {path}: no public function", fix="define one, with type hints and a docstring")
        # No code of the file runs in this process: the other one says what its functions take.
        self._outside = Outside([*(f"{path}:{name}" for name in names), "minimoe.outside:schema_of"], START_SECONDS)
        for name in names:
            schema, problem = self._outside.call(len(names), f"{path}:{name}")
            if problem:
                self._outside.end()
                raise UserError(
                    f"--tools {path}: {name}: {problem.splitlines()[0]}",
                    fix="give every function type hints and a docstring that describes it and its Args",
                )
            self.schemas.append(schema)
        self._outside.seconds = self._seconds

    def _read_commands(self, path: Path) -> None:
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
        except (ValueError, OSError) as error:
            raise UserError(f"--tools {path}: {error}", fix="give a JSON list of tools") from None
        values = read_yaml(path)[0] if path.suffix != ".json" else values
        tools = values.get("tools") if isinstance(values, dict) else values
        try:
            self.schemas = read_tools(tools)
        except BadConversation as bad:
            raise UserError(f"--tools {path}: {bad}", fix="see docs/formats.md for the form of a tool") from None
        for tool, schema in zip(tools or [], self.schemas, strict=True):
            command = tool.get("command") or schema["function"].get("command")
            if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
                raise UserError(
                    f"--tools {path}: {schema['function']['name']} has no command",
                    fix="give a list of words, such as command: [python, my_tool.py]",
                )
            schema.pop("command", None)
            schema["function"].pop("command", None)
            self._commands[schema["function"]["name"]] = command
        if not self.schemas:
            raise UserError(f"--tools {path}: no tools", fix="give a list under the key tools")

    def _run(self, name: str, arguments: dict[str, Any]) -> str:
        try:
            done = subprocess.run(
                self._commands[name],
                input=json.dumps(arguments),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"Error: took more than {self._seconds:g} s"
        except OSError as error:
            return f"Error: {error.strerror}"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return f"Error: exit status {done.returncode}: {last}"
        return done.stdout.strip()


def with_tools(messages: Sequence[Message], toolbox: Toolbox) -> list[Message]:
    """The conversation, with the tools in its system message.

    Raises:
        UserError: it has others already.
    """
    messages = list(messages)
    if messages and messages[0]["role"] == "system":
        if messages[0].get("tools"):
            raise UserError("the conversation has tools of its own, and --tools gives others", fix="give one of them")
        return [messages[0] | {"tools": toolbox.schemas}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": toolbox.schemas}, *messages]


def answered(completion: Completion) -> Message:
    """What was generated, as a message that goes on as it was: token for token, where all of it is text."""
    message = split_answer(completion.text)
    if not completion.cut:
        message["token_ids"] = list(completion.token_ids)
    return message


def results(answer: Message, toolbox: Toolbox) -> Iterator[Message]:
    """Call what an answer asks for; the results as messages."""
    for call in answer.get("tool_calls", ()):
        function = call["function"]
        yield {"role": "tool", "content": toolbox.call(function["name"], function["arguments"])}


def answer_with_tools(
    engine: Engine, conversations: Sequence[list[Message]], settings: GenerationSection, toolbox: Toolbox
) -> list[tuple[list[Message], Completion]]:
    """Answer all conversations, calling tools until none is asked for; those that go on are decoded together.

    Returns:
        Of each the conversation with all that followed, and the last completion. One that has had `MAX_ROUNDS` rounds
        of calls ends with the last.
    """
    found: list[tuple[list[Message], Completion] | None] = [None] * len(conversations)
    going = {index: with_tools(messages, toolbox) for index, messages in enumerate(conversations)}
    for number in range(MAX_ROUNDS + 1):
        completions = engine.generate(list(going.values()), settings)
        for (index, messages), completion in zip(list(going.items()), completions, strict=True):
            answer = answered(completion)
            going[index] = [*messages, answer]
            found[index] = (going[index], completion)
            if not answer.get("tool_calls") or number == MAX_ROUNDS:
                del going[index]
            else:
                going[index] += results(answer, toolbox)
                found[index] = (going[index], completion)
        if not going:
            break
    return [item for item in found if item is not None]
