"""`minimoe generate`: complete prompts from the command line, a file or standard input.

Completions go to standard output, statistics to standard error, so that pipes see text alone. One prompt
streams; several are decoded in batches; `--json` prints one object a prompt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from minimoe import adapters
from minimoe.config import GenerationSection
from minimoe.conversation import BadConversation, conversation, either, split_answer
from minimoe.errors import UserError
from minimoe.generation.engine import Completion, Engine, Prompt
from minimoe.generation.packed import why_not_packed
from minimoe.generation.tools import Toolbox, answer_with_tools
from minimoe.loading import load_model, model_folder
from minimoe.tokenizer import load_tokenizer

MAX_BYTES = 1 << 30  # of a prompt file or standard input
SCORED_TOKENS = 512  # of a text that the cost of int8 weights is measured on; as many are fed in a second or less


def run(
    model_dir: str | Path,
    prompts: Sequence[Prompt],
    settings: GenerationSection,
    *,
    adapter_dirs: Sequence[str] = (),
    tools: str | None = None,
    json_output: bool = False,
    device: str = "auto",
) -> None:
    """Open the model and print a completion of every prompt, with several adapters one after the other."""
    toolbox = None if tools is None else Toolbox(tools)
    engine = open_engine(model_dir, settings, device, adapter_dirs)
    for number, adapter in enumerate(adapter_dirs if len(adapter_dirs) > 1 else [None]):
        if adapter is not None:
            adapters.choose(engine.model, adapter_name(number))
        if adapter is not None and not json_output:
            print(f"=== {adapter} ===")
        more = {} if adapter is None else {"adapter": adapter}
        if toolbox is not None:
            _print_with_tools(engine, prompts, settings, toolbox, json_output, more)
        else:
            _print(engine, prompts, settings, json_output, more)
    if toolbox is not None:
        toolbox.end()


def _print(
    engine: Engine, prompts: Sequence[Prompt], settings: GenerationSection, json_output: bool, more: dict[str, str]
) -> None:
    completion: Completion | None
    if json_output:
        completion = _print_json(engine, prompts, settings, more)
    elif len(prompts) == 1:
        completion = _print_stream(engine, prompts[0], settings)
    else:
        completion = _print_all(engine, prompts, settings)
    if settings.weights == "int8" and completion is not None:
        dim(int8_remark(engine, engine.encode(prompts[0], settings.chat), completion))


def adapter_name(number: int) -> str:
    """What the model calls its adapter of that number."""
    return f"adapter_{number}"


def open_engine(
    model_dir: str | Path, settings: GenerationSection, device: str, adapter_dirs: Sequence[str] = ()
) -> Engine:
    """Open the model for these settings. One adapter is merged into it, several stand beside each other.

    Raises:
        UserError: they ask for what cannot be had with this model here, or an adapter is of another model.
    """
    folders = [model_folder(adapter) for adapter in adapter_dirs]
    for folder in folders:
        if not adapters.is_adapter(folder):
            raise UserError(
                f"no adapter: {folder} has no {adapters.ADAPTER_CONFIG}", fix="give the final/ of a lora run"
            )
        adapters.base_of(folder, model_folder(model_dir))
    model, tokenizer = load_model(model_dir, device, torch.bfloat16 if settings.compile else None)
    if len(folders) == 1:
        model = adapters.merged(model, folders[0])
    for number, folder in enumerate(folders if len(folders) > 1 else []):
        adapters.put_on(model, folder, adapter_name(number))
    if folders:
        tokenizer = load_tokenizer(folders[0])
    engine = Engine(model, tokenizer)
    if engine.fast(settings) is None:
        dim(f"no fast decoding: {why_not_packed(engine.model)}")
    return engine


def read_prompts(prompt: str | None, file: str | Path | None, stdin: TextIO | None) -> list[Prompt]:
    """Prompts of exactly one origin.

    Args:
        prompt: the text itself; it may be empty, the engine knows whether the model can start from nothing.
        file: .txt holds one prompt a line, .jsonl and .json rows with "prompt" or "messages".
        stdin: read whole as one prompt, where neither of the others is given and it is no terminal.

    Raises:
        UserError: no origin or two, or an origin that is missing, unreadable or empty.
    """
    if prompt is not None and file is not None:
        raise UserError("both --prompt and --file are given", fix="give one of them")
    if prompt is not None:
        return [prompt]
    if file is not None:
        return _read_file(Path(os.path.expanduser(file)))
    if stdin is None or stdin.isatty():
        raise UserError("no prompt", fix="give --prompt TEXT or --file FILE, or pipe text in")
    text = (
        _decode_text(stdin.buffer.read(MAX_BYTES + 1), "standard input") if hasattr(stdin, "buffer") else stdin.read()
    )
    text = text.removesuffix("\n").removesuffix("\r")  # the one newline that `echo` adds
    if not text.strip():
        raise UserError("standard input is empty", fix="pipe a prompt in, or give --prompt TEXT")
    return [text]


def dim(text: str) -> None:
    """Print a remark to standard error, dim on a terminal."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def int8_remark(engine: Engine, prompt: Sequence[int], completion: Completion) -> str:
    """What the rounding cost, measured on a prompt and its completion."""
    token_ids = [*prompt, *completion.token_ids][-SCORED_TOKENS:]
    cost = engine.int8_cost(token_ids)
    return f"int8 weights: {cost:.5f} nats/token of loss more than exact ones on these {len(token_ids)} tokens"


def speed(completion: Completion) -> str:
    """'57 tokens, 123.4 tokens/s', and why it ended where that is not an end token."""
    cut = ", length limit" if completion.finish_reason == "length" else ""
    return f"{completion.new_tokens} tokens, {completion.tokens_per_second:.1f} tokens/s{cut}"


def _print_json(
    engine: Engine, prompts: Sequence[Prompt], settings: GenerationSection, more: dict[str, str]
) -> Completion:
    """These print all completions and return the first."""
    completions = engine.generate(prompts, settings)
    for prompt, completion in zip(prompts, completions, strict=True):
        row = {
            **more,
            "prompt": prompt,
            **_parts(completion.text),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "new_tokens": completion.new_tokens,
            "tokens_per_second": round(completion.tokens_per_second, 1),
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return completions[0]


def _print_with_tools(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: GenerationSection,
    toolbox: Toolbox,
    json_output: bool,
    more: dict[str, str],
) -> None:
    """The last answer to each prompt; on the way, calls and results go to standard error, or into the JSON."""
    asked = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    for prompt, (messages, completion) in zip(asked, answer_with_tools(engine, asked, settings, toolbox), strict=True):
        # What follows the question: with tools, a system message may have come before it.
        last = max(number for number, message in enumerate(messages) if message["role"] == "user")
        new = [{k: v for k, v in message.items() if k != "token_ids"} for message in messages[last + 1 :]]
        if json_output:
            row = {**more, "prompt": prompt, **_parts(completion.text), "messages": new}
            print(json.dumps(row | {"finish_reason": completion.finish_reason}, ensure_ascii=False), flush=True)
            continue
        for message in new:
            for call in message.get("tool_calls", ()):
                dim(f"{call['function']['name']}({json.dumps(call['function']['arguments'], ensure_ascii=False)})")
            if message["role"] == "tool":
                dim(f"= {message['content']}")
        if len(prompts) > 1:
            print(f"> {prompt[-1]['content']}")
        print(completion.text, flush=True)


def _parts(text: str) -> dict[str, Any]:
    """The text; and where a model thinks or calls tools, that apart from what it says."""
    answer = split_answer(text)
    apart = {key: answer[key] for key in ("reasoning_content", "tool_calls") if key in answer}
    return {"text": text} | ({"content": answer["content"]} | apart if apart else {})


def show(piece: str) -> None:
    """Print a piece of a completion; on a terminal, think parts and calls are dim."""
    if sys.stdout.isatty():
        for tag in ("think", "tool_call"):
            piece = piece.replace(f"<{tag}>", f"\x1b[2m<{tag}>").replace(f"</{tag}>", f"</{tag}>\x1b[22m")
    sys.stdout.write(piece)
    sys.stdout.flush()


def _print_stream(engine: Engine, prompt: Prompt, settings: GenerationSection) -> Completion | None:
    session = engine.session()
    pieces = session.stream(prompt, settings)
    if isinstance(prompt, str) and not settings.chat:
        sys.stdout.write(prompt)  # a completion reads on from its prompt
    for piece in pieces:
        show(piece)
    print(flush=True)
    if session.completion is not None:
        dim(speed(session.completion))
    return session.completion


def _print_all(engine: Engine, prompts: Sequence[Prompt], settings: GenerationSection) -> Completion:
    completions = engine.generate(prompts, settings)
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        print(f"--- {number}/{len(prompts)} ---")
        question = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
        print(f"{question}{completion.text}" if _reads_on(prompt, settings) else f"> {question}\n{completion.text}")
    total = sum(completion.new_tokens for completion in completions)
    dim(f"{len(completions)} completions, {total} tokens")
    return completions[0]


def _reads_on(prompt: Prompt, settings: GenerationSection) -> bool:
    return isinstance(prompt, str) and not settings.chat


def _read_file(path: Path) -> list[Prompt]:
    if path.suffix.lower() not in ("", ".txt", ".jsonl", ".json"):
        raise UserError(
            f"unknown kind of prompt file: {path}",
            fix="give .txt (a prompt a line), or .jsonl or .json (prompt or messages)",
        )
    try:
        with path.open("rb") as file:
            text = _decode_text(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"not readable ({error.strerror})"
        raise UserError(f"prompt file {reason}: {path}", fix="give a .txt, .jsonl or .json file") from None
    if path.suffix.lower() == ".json":
        rows = _parse(text, str(path))
        rows = rows if isinstance(rows, list) else [rows]
        return [_row_prompt(row, f"{path}, item {number}") for number, row in enumerate(rows, 1)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompt file is empty: {path}", fix="write one prompt a line")
    if path.suffix.lower() == ".jsonl":
        return [_row_prompt(_parse(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("malformed JSON", where=where, fix='write {"prompt": "…"}') from None


def _row_prompt(row: Any, where: str) -> Prompt:
    """A row's "prompt" (text), or its messages in any form that SFT reads."""
    try:
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            return row["prompt"]
        messages = either(row, "messages", "conversations") if isinstance(row, dict) else None
        if isinstance(messages, list) and messages:
            system = either(row, "system", "system_prompt")
            return conversation(messages, system=system or "", tools=either(row, "tools", "functions"))
    except BadConversation as bad:
        raise UserError(str(bad), where=where, fix="see docs/formats.md for the forms of a message") from None
    raise UserError(
        'the row has neither a text "prompt" nor "messages" with "role" and "content"',
        where=where,
        fix='write {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
    )


def _decode_text(data: bytes, where: str) -> str:
    if len(data) > MAX_BYTES:  # such as /dev/zero
        raise UserError(f"more than {MAX_BYTES >> 20} MiB of prompts", where=where, fix="split them")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "ITS_ENCODING"
        raise UserError(
            f"not UTF-8 text: byte {error.start}", where=where, fix=f"convert it: iconv -f {encoding} -t UTF-8"
        ) from None
