"""`minimoe chat`: a conversation in the terminal.

The cache lives from turn to turn, so an answer waits only for the newest message. Works with piped input too,
one message a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minimoe import adapters
from minimoe.config import GenerationSection
from minimoe.conversation import Message
from minimoe.errors import UserError
from minimoe.generation.engine import Engine
from minimoe.generation.generate import adapter_name, dim, int8_remark, open_engine, show, speed
from minimoe.generation.tools import MAX_ROUNDS, Toolbox, answered, results, with_tools

HELP = "/reset forgets the conversation, /think and /no_think ask for thinking or none, /exit or Ctrl-D leaves, "
HELP += "Ctrl-C stops an answer"


def run(
    model_dir: str | Path,
    settings: GenerationSection,
    *,
    adapter_dirs: Sequence[str] = (),
    tools: str | None = None,
    device: str = "auto",
    system: str | None = None,
) -> None:
    """Open the model and chat until `/exit` or the end of input."""
    toolbox = None if tools is None else Toolbox(tools)
    try:
        Chat(open_engine(model_dir, settings, device, adapter_dirs), settings, system, adapter_dirs, toolbox).loop()
    finally:
        if toolbox is not None:
            toolbox.end()


class Chat:
    """The messages so far and the session that answers them."""

    def __init__(
        self,
        engine: Engine,
        settings: GenerationSection,
        system: str | None = None,
        adapter_dirs: Sequence[str] = (),
        toolbox: Toolbox | None = None,
    ) -> None:
        self._engine, self._settings, self._toolbox = engine, settings, toolbox
        self._adapters = list(adapter_dirs) if len(adapter_dirs) > 1 else []
        if self._adapters:
            self.use_adapter("1")
        self._session = engine.session()
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        if toolbox is not None:
            self._opening = with_tools(self._opening, toolbox)
        self.messages = list(self._opening)
        self._cost_told = settings.weights == "exact"
        # Settings that cannot be had, and a model without a chat template, are refused here, not after the first
        # message.
        engine.fast(settings)
        engine.encode([*self._opening, {"role": "user", "content": "?"}])

    def loop(self) -> None:
        """Read and answer until the end."""
        terminal = sys.stdin.isatty()
        if terminal:
            import readline  # noqa: F401  (line editing and history for input())

            dim(HELP)
        while True:
            try:
                line = input("> " if terminal else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                dim(f"\n{HELP}")
                continue
            word, _, rest = line.partition(" ")
            if not _is_text(line):
                dim("this line is not valid UTF-8, and was not sent; set the terminal or the file to UTF-8")
            elif line == "/exit":
                return
            elif line == "/reset":
                self.reset()
                dim("conversation forgotten")
            elif line in ("/think", "/no_think"):
                self.think(line == "/think")
            elif word == "/adapter" and self._adapters:
                self.use_adapter(rest.strip())
            elif line.startswith("/"):
                more = "; /adapter NUMBER changes the adapter" if self._adapters else ""
                dim(HELP + more if line == "/help" else f"unknown command {line}; {HELP}{more}")
            elif line:
                try:
                    self.answer(line)
                except UserError as error:  # one message too many or too long ends no conversation
                    dim(str(error))

    def use_adapter(self, number: str) -> None:
        """Answer with another of the adapters from now on; the conversation goes on."""
        numbers = [str(place) for place in range(1, len(self._adapters) + 1)]
        if number in numbers:
            adapters.choose(self._engine.model, adapter_name(int(number) - 1))
            self._session = self._engine.session()
        for place, folder in zip(numbers, self._adapters, strict=True):
            dim(f"{'*' if place == number else ' '} {place} {folder}")

    def think(self, wanted: bool) -> None:
        """Ask for thinking, or for none, from now on."""
        try:
            self._engine.encode([*self._opening, {"role": "user", "content": "?"}], enable_thinking=wanted)
        except UserError as error:
            dim(str(error))
            return
        self._settings = self._settings.model_copy(update={"enable_thinking": wanted})
        dim("thinking" if wanted else "no thinking")

    def reset(self) -> None:
        """Start over."""
        self.messages = list(self._opening)
        self._session.reset()

    def answer(self, text: str) -> None:
        """Stream the answer to one message, calling the tools it asks for; it is kept, also if Ctrl-C cut it."""
        conversation = [*self.messages, {"role": "user", "content": text}]
        for rounds in range(MAX_ROUNDS + 1):
            conversation = self._fit(conversation)
            answer = self._say(conversation)
            if answer is None:
                return
            conversation = self.messages = [*conversation, answer]
            if self._toolbox is None or not answer.get("tool_calls"):
                return
            if rounds == MAX_ROUNDS:
                dim(f"{MAX_ROUNDS} rounds of calls: no more are made for this message")
                return
            for result in results(answer, self._toolbox):
                dim(f"= {result['content']}")
                conversation = [*conversation, result]

    def _say(self, conversation: list[Message]) -> Message | None:
        """Stream one turn of the assistant; None where it was stopped before anything was generated."""
        interrupted = ""
        pieces = self._session.stream(conversation, self._settings)
        try:
            for piece in pieces:
                show(piece)
        except KeyboardInterrupt:
            interrupted = ", stopped"
        finally:
            pieces.close()
        print(flush=True)
        completion = self._session.completion
        if completion is None or not completion.token_ids:
            return None
        dim(speed(completion) + interrupted)
        answer = answered(completion)
        if interrupted:  # a call that is not finished is none
            answer.pop("tool_calls", None)
        if not self._cost_told and not interrupted:  # once: it feeds the whole text again
            with suppress(KeyboardInterrupt):
                dim(int8_remark(self._engine, self._engine.encode(conversation), completion))
            self._cost_told = True
        return answer

    def _fit(self, conversation: list[Message]) -> list[Message]:
        """Drop the oldest turns until the prompt leaves room for an answer."""
        context = self._engine.context_length
        room = min(self._settings.max_new_tokens, context // 4)
        start = len(self._opening)
        dropped = 0
        while len(conversation) - start > 1:
            try:
                if len(self._engine.encode(conversation)) + room <= context:
                    break
            except UserError:  # longer than the whole context
                pass
            users = [n for n in range(start + 1, len(conversation)) if conversation[n]["role"] == "user"]
            del conversation[start : users[0] if users else start + 2]  # a message and all that answers it
            dropped += 1
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            dim(f"the context of {context} tokens is full: the oldest {turns} dropped")
        return conversation


def _is_text(line: str) -> bool:
    """Whether the line's bytes were text; others are lone surrogates now."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True
