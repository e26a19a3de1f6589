"""Config keys from the schema, architecture keys from the comments beside them, commands from the command line."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import minimoe.cli  # noqa: F401  (makes every command known)
from minimoe import config
from minimoe.cli.app import app
from minimoe.config.data import PhaseConfig
from minimoe.config.stages import RewardConfig
from minimoe.config.training import LoggingConfig, OptimizerConfig, TrainConfig
from minimoe.model.config import MiniMoeConfig

_MADE = "<!-- Made from the code by `python -m scripts.docs`; do not edit. -->\n"
_RUNS: list[type[BaseModel]] = [
    config.TokenizerRun,
    config.PretrainRun,
    config.SftRun,
    config.DistilRun,
    config.DpoRun,
    config.GrpoRun,
    config.GenerateRun,
]
_SECTIONS: dict[str, type[BaseModel]] = {
    "data": config.DataConfig,
    "data.train, data.validation": config.SourceConfig,
    "data.phases": PhaseConfig,
    "optimizer": OptimizerConfig,
    "schedule": config.ScheduleConfig,
    "train": TrainConfig,
    "logging": LoggingConfig,
    "context": config.ContextConfig,
    "lora": config.LoraConfig,
    "distil": config.DistilConfig,
    "dpo": config.DpoConfig,
    "grpo": config.GrpoConfig,
    "grpo.rewards": RewardConfig,
    "generation": config.GenerationSection,
    "tokenizer": config.TokenizerSection,
}


def config_page() -> str:
    """Every key, with type, default and meaning."""
    parts = [
        _MADE,
        "# Configuration\n",
        "A run is one YAML file; `key.sub=value` on the command line replaces a value. Start from one of `configs/`.\n",
        "## What each command takes\n",
    ]
    for run in _RUNS:
        parts += [f"### `{_command(run)}`\n", _table(_fields(run))]
    parts += [
        "## `model`\n",
        "The architecture, named as in `transformers`. Routers: [the MoE block](../moe.md).\n",
        _table(architecture()),
    ]
    for name, section in _SECTIONS.items():
        parts += [f"## `{name}`\n", f"{_first_sentence(section)}\n", _table(_fields(section))]
    return "\n".join(parts)


def architecture() -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each field of `MiniMoeConfig`, from the comment on its line."""
    line = re.compile(r"    (\w+): (.+?) = (.+?)(?:  # (.+))?$")
    for text in inspect.getsource(MiniMoeConfig).splitlines():
        found = line.fullmatch(text)
        if found and "ClassVar" not in text:
            name, kind, default, meaning = found.groups()
            yield name, _plain(kind), default.replace('"', "").replace("None", "null").lower(), meaning or ""


def commands_page() -> str:
    """Every command with its arguments and options."""
    parts = [_MADE, "# Commands\n", "`minimoe COMMAND --help` says the same.\n"]
    for name, command in _commands().items():
        parts.append(f"## `minimoe {name}`\n\n{command.help}\n")
        if command.epilog:
            examples = command.epilog.removeprefix("Example: ").split("; minimoe ")
            lines = [examples[0], *(f"minimoe {rest}" for rest in examples[1:])]
            parts.append("```bash\n" + "\n".join(lines) + "\n```\n")
        rows = []
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.name == "help":
                continue
            is_option = parameter.param_type_name == "option"
            shown = (
                ", ".join([*parameter.opts, *parameter.secondary_opts])
                if is_option
                else (parameter.metavar or parameter.name.upper())
            )
            choices = getattr(getattr(parameter, "type", None), "choices", None)
            meaning = (getattr(parameter, "help", "") or "") + (f" ({', '.join(choices)})" if choices else "")
            rows.append((shown, meaning))
        parts.append(_rows(("option", "meaning"), rows))
    return "\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {"config.md": config_page, "commands.md": commands_page}


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def _command(run: type[BaseModel]) -> str:
    return "minimoe " + run.__name__.removesuffix("Run").lower()


def _fields(section: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        meaning = field.description or ""
        if not meaning and (inner := _section(kind)) is not None:
            meaning = f"{_first_sentence(inner)} Keys below."
        yield name, _spell(kind), _default(field), meaning


def _section(kind: Any) -> type[BaseModel] | None:
    parts = [kind, *typing.get_args(kind)]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _spell(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _spell(arguments[0])
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spell(argument) for argument in arguments if argument is not type(None)))
    if origin in (list, tuple):
        return f"list of {_spell(arguments[0])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return {"str": "text", "dict": "mapping", "bool": "true or false", "int": "integer", "float": "number"}.get(
        getattr(origin or kind, "__name__", ""), "value"
    )


def _plain(kind: str) -> str:
    """A type as the source spells it, in the same words."""
    if kind.startswith("Literal["):
        return kind[8:-1].replace('"', "")
    words = {"int": "integer", "float": "number", "bool": "true or false", "str": "text", "dict": "mapping"}
    parts = [words.get(part, part) for part in kind.replace("list[int]", "list of integer").split(" | ")]
    return " or ".join(part for part in parts if part != "None")


def _first_sentence(section: type[BaseModel]) -> str:
    return re.split(r"(?<=[.:])\s", inspect.getdoc(section) or "", maxsplit=1)[0].rstrip(":")


def _table(fields: Iterator[tuple[str, str, str, str]]) -> str:
    rows = [(f"`{name}`", kind, f"`{default}`" if default else "", text) for name, kind, default, text in fields]
    return _rows(("key", "value", "default", "meaning"), rows)


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells)]
    return "\n".join(lines) + "\n"
