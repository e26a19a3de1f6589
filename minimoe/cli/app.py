"""The app that every command belongs to, and what commands share: arguments, options, imports of large libraries."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import minimoe
from minimoe import openmp
from minimoe.config.generation import GenerationSection

app = typer.Typer(
    name="minimoe",
    help="Train a small mixture-of-experts language model from scratch, fine-tune it, generate text.",
    epilog="Start with: bash scripts/quickstart.sh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the run's config; recipes are in configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="replace values of the config, e.g. train.max_steps=100"),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest good checkpoint of output_dir")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="delete what an earlier run left in output_dir and start again")
]
ModelDir = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="model folder, e.g. runs/quickstart/sft/final")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="decoding settings as the YAML has them, e.g. top_k=5")
]
# Options may be written with either.
UNDERSCORES = {"token_normalize_func": lambda option: option.replace("_", "-")}
# A value of the config that is written as an option reaches `load_config`, which says how it is written.
OVERRIDES = {"ignore_unknown_options": True}
SettingsFile = Annotated[Path | None, typer.Option("--config", help="YAML file with a generation: section")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minimoe {minimoe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of errors")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["MINIMOE_DEBUG"] = "1"


def decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Every decoding setting as an option of the command, from the schema; what is given is added to `settings`."""
    signature = inspect.signature(command, eval_str=True)
    options = {}
    for name, field in GenerationSection.model_fields.items():
        if name in signature.parameters:
            continue
        flag = f"--{name.replace('_', '-')}"
        kind: Any = {bool: bool, tuple[str, ...]: list[str]}.get(field.annotation, str)  # type: ignore[arg-type]
        text = f"{field.description} [{'none' if field.default == () else field.default}]"
        names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        option = typer.Option(*names, help=text, show_default=False, metavar=None if kind is bool else "VALUE")
        options[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )

    @wraps(command)
    def call(**values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        words = [f"{name}={json.dumps(v) if name == 'stop' else v}" for name, v in given.items() if v not in (None, [])]
        command(**values | {"settings": [*(values["settings"] or ()), *words]})

    parameters = [*signature.parameters.values(), *options.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Import torch and transformers without the garbage collector, and leave their objects out of its rounds.

    They make 600,000 objects that live as long as the process. To search these for garbage, over and over while they
    are made and again at the exit, took 2 of the 6 seconds of a short command.
    """
    if "transformers" in sys.modules:  # the command is called as a function, in a process that is not ours
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
    openmp.watch()
