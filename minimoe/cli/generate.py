"""`minimoe generate | chat | evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from minimoe.cli.app import (
    OVERRIDES,
    UNDERSCORES,
    Device,
    ModelDir,
    Settings,
    SettingsFile,
    app,
    decoding_options,
    large_imports,
)
from minimoe.errors import UserError

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="DIR", help="an adapter of the model; give several to compare them"),
]

Tools = Annotated[
    str | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        help="what the model may call: a .py file of functions, a .yaml or .json list of commands, or calculator",
    ),
]


@app.command(
    context_settings=UNDERSCORES,
    epilog='Example: minimoe generate runs/quickstart/pretrain/final --prompt "Once upon a time" --temperature 0.7',
)
@decoding_options
def generate(
    model_dir: ModelDir,
    settings: Settings = None,
    prompt: Annotated[str | None, typer.Option(help="the prompt; without it, --file or standard input is read")] = None,
    file: Annotated[
        Path | None, typer.Option(help=".txt (a prompt a line), .jsonl or .json (prompt or messages)")
    ] = None,
    config: SettingsFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="wrap the prompt in the chat template")] = False,
    adapter: Adapters = None,
    tools: Tools = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object per prompt")] = False,
    device: Device = "auto",
) -> None:
    """Generate text; streams to a terminal."""
    loaded = _generation_settings(config, [*(settings or []), *(["chat=true"] if chat or tools else [])])
    with large_imports():
        from minimoe.generation.generate import read_prompts, run

    prompts = read_prompts(prompt, file, sys.stdin)
    adapters = tuple(adapter or ())
    run(model_dir, prompts, loaded, adapter_dirs=adapters, tools=tools, json_output=json_output, device=device)


@app.command(
    name="chat",
    context_settings=UNDERSCORES,
    epilog='Example: minimoe chat runs/quickstart/sft/final --system "Answer briefly."',
)
@decoding_options
def chat_command(
    model_dir: ModelDir,
    settings: Settings = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    config: SettingsFile = None,
    adapter: Adapters = None,
    tools: Tools = None,
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal."""
    loaded = _generation_settings(config, [*(settings or []), "chat=true"])
    with large_imports():
        from minimoe.generation.chat import run

    run(model_dir, loaded, adapter_dirs=adapter or (), tools=tools, device=device, system=system)


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe evaluate runs/quickstart/pretrain/final --data data/quickstart/valid_stories.jsonl",
)
def evaluate(
    model_dir: ModelDir,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="file, folder or glob: txt, jsonl, json, csv, tsv, parquet, arrow; with --tasks: folder of their rows",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="how documents are read, as in a config, e.g. data.on_bad_rows=skip"),
    ] = None,
    answers_only: Annotated[bool, typer.Option("--answers-only", help="score assistant turns only")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="benchmark tasks: YAML files, folders of them, names of lm-eval's; with commas between"),
    ] = None,
    needle: Annotated[
        bool, typer.Option("--needle", help="hide a word in --data, or in plain sentences, and ask for it")
    ] = False,
    lengths: Annotated[str, typer.Option(help="with --needle: tokens, e.g. 512,2048; default: up to the model's")] = "",
    trials: Annotated[
        int | None, typer.Option(min=1, help="with --needle: at each length and depth, 8 by default")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows of each task")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="solved examples before each row of a task")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put a task's questions into the chat template")] = False,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, max=1 << 20, help="tokens of context; default: the model's, 1024 at most")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per forward pass")] = 16,
    json_output: Annotated[bool, typer.Option("--json", help="print a JSON object")] = False,
    device: Device = "auto",
) -> None:
    """Loss, perplexity and bits per byte of a model on any data, its score in benchmark tasks, or needles it finds."""
    if needle:
        unused = {"--tasks": tasks, "--answers-only": answers_only, "KEY=VALUE": overrides, "--limit": limit}
        unused |= {"--fewshot": fewshot, "--chat": chat, "--sequence-length": sequence_length}
        _refuse(unused, "is not for --needle")
        with large_imports():
            from minimoe.evaluate import needle as needles

        options = {"trials": trials or 8, "json_output": json_output, "device": device}
        needles.run(model_dir, data, lengths=_whole_numbers(lengths), **options)  # type: ignore[arg-type]
        return
    _refuse({"--lengths": lengths, "--trials": trials}, "is for --needle")
    if tasks is not None:
        _evaluate_tasks(
            model_dir,
            tasks,
            data,
            unused={"--answers-only": answers_only, "--sequence-length": sequence_length, "KEY=VALUE": overrides},
            limit=limit,
            num_fewshot=fewshot,
            chat=chat,
            batch_size=batch_size,
            json_output=json_output,
            device=device,
        )
        return
    given = {"--limit": limit, "--fewshot": fewshot, "--chat": chat}
    _refuse(given, "belongs to --tasks, which is not given")
    if data is None:
        raise UserError("neither --data nor --tasks is given", fix="say what to score the model on")
    with large_imports():
        from minimoe.evaluate.perplexity import run

    run(
        model_dir,
        data,
        answers_only=answers_only,
        sequence_length=sequence_length,
        batch_size=batch_size,
        json_output=json_output,
        device=device,
        overrides=overrides or (),
    )


def _evaluate_tasks(model_dir: str, tasks: str, data: str | None, unused: dict[str, Any], **options: Any) -> None:
    _refuse(unused, "is for --data, not for --tasks")
    with large_imports():
        from minimoe.evaluate.tasks import run

    run(model_dir, tasks, data, **options)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--lengths {text}: no list of numbers", fix="give such as 512,1024,2048") from None


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value:
            raise UserError(f"{name} {why}")


def _generation_settings(config: Path | None, overrides: list[str]) -> Any:
    from minimoe.config import GenerateRun
    from minimoe.config.file import load_config

    # Bare, or with their section as the YAML file has them.
    dotted = [f"generation.{word.removeprefix('generation.')}" for word in overrides]
    return load_config(GenerateRun, config, dotted).generation
