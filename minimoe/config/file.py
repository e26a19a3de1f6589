"""A YAML file and `key.sub=value` overrides -> a validated config, or one error that names all that is wrong.

Defaults < YAML < overrides; an override takes along what belongs to the value that it replaces. Unknown keys get a "did
you mean", every problem is reported with its line or override.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from minimoe.config import DistilRun, DpoRun, GrpoRun, PretrainRun, Section, SftRun, TrainingRun
from minimoe.config.strict_yaml import parse, read_yaml
from minimoe.errors import UserError, shorten, suggestion

Config = TypeVar("Config", bound=Section)
TRAINING_RUNS: dict[str, type[TrainingRun]] = {
    kind.stage: kind for kind in (PretrainRun, DistilRun, DpoRun, GrpoRun, SftRun)
}


def load_config(kind: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides and validate.

    Args:
        kind: of run; `TrainingRun` is the stage that most of the file's keys belong to.

    Raises:
        UserError: the file is missing or no YAML mapping, an override has no `=`, or values are wrong; every
            wrong value is named with its line or override and the rule it breaks.
    """
    values, lines = ({}, {}) if path is None else read_yaml(Path(path))
    given: set[str] = set()
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in given:
            raise UserError(f"{key} is given twice", where="the command line", fix="keep one of the two")
        given.add(key)
        _apply_override(values, lines, override)
    for note in _drop_what_is_replaced(values, given):
        _say(f"{note} ({path})")
    if kind is TrainingRun:
        stages: Any = reversed(
            TRAINING_RUNS.values()
        )  # what could be several is SFT: the others have a section of their own
        kind = max(stages, key=lambda stage: len(values.keys() & stage.model_fields.keys()))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _as_user_error(kind, error, "overrides" if path is None else str(path), lines) from None


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, ready to be run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(values: dict[str, Any], lines: dict[str, str], override: str) -> None:
    """Set one `key.sub=value`; the value is parsed as YAML."""
    key, equals, text = override.partition("=")
    if key.startswith("-"):
        raise UserError(
            f"unknown option {shorten(override)}",
            fix="options are in --help; values of the config are written key.sub=value, like train.max_steps=100",
        )
    if not equals or not key.strip():
        raise UserError(f"override {shorten(override)} is not key=value", fix="write it like train.max_steps=100")
    try:
        value = parse(text, "the value")
    except UserError as error:
        raise UserError(f"override {shorten(override)}: {error.what}", fix="quote the value") from None
    *parents, last = key.strip().split(".")
    target = values
    for depth, parent in enumerate(parents):
        child = target[parent] = target[parent] if target.get(parent) is not None else {}
        if not isinstance(child, dict):
            dotted = ".".join(parents[: depth + 1])
            raise UserError(
                f"override {shorten(override)}: {dotted} is a value, not a section", fix=f"override {dotted} itself"
            )
        target = child
    target[last] = value
    lines[key.strip()] = f"override {shorten(override)}"


def _drop_what_is_replaced(values: dict[str, Any], given: set[str]) -> Iterator[str]:
    """Leave out values of the file that belong to what an override has replaced; yields what a person should know.

    A run is so many steps or so many epochs: either replaces the other. Validation documents belong to the training
    documents, and a learning rate to its optimizer.
    """
    train, data, optimizer = (_section(values, name) for name in ("train", "data", "optimizer"))
    for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if f"train.{key}" in given and f"train.{other}" not in given and train.get(key) is not None:
            train.pop(other, None)
    if _touched("data.train", given) and not _touched("data.validation", given) and data.get("validation") is not None:
        del data["validation"]
        yield (
            "data.validation is left out, as data.train is another: a share of the new documents is held out instead, "
            "see data.validation_fraction"
        )
    for key in ("tokenizer", "model"):
        if "init_from" in given and values.get(key) is not None and not _touched(key, given):
            del values[key]
            yield f"{key} is left out, as it comes from init_from"
    if "optimizer.name" in given:
        for rate in ("lr", "adamw_lr"):
            if rate in optimizer and f"optimizer.{rate}" not in given:
                del optimizer[rate]
                yield f"optimizer.{rate} is left out, as optimizer.name is another: its default is used"


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _touched(key: str, given: set[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in given)


def _say(note: str) -> None:
    """On the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def _as_user_error(kind: type[BaseModel], error: ValidationError, source: str, lines: dict[str, str]) -> UserError:
    """All problems of a validation in one message, each with its place."""
    problems = []
    for item in error.errors(include_url=False):
        location = tuple(part for part in item["loc"] if isinstance(part, (str, int)))
        dotted = ".".join(str(part) for part in location)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown key{suggestion(str(location[-1]), _known_keys(kind, location[:-1]))}"
        elif item["type"] == "missing":
            message = "required, but missing"
        elif "input" in item and not isinstance(item["input"], dict) and "got" not in message:
            message = f"{message[0].lower()}{message[1:]}, got {shorten(item['input'])}"
        place = _nearest_line(dotted, lines, source)
        problems.append(f"{dotted + ': ' if dotted else ''}{message} ({place})")
    if len(problems) == 1:
        return UserError(problems[0], fix="correct the value and run the command again")
    listing = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
    return UserError(f"{len(problems)} problems in {source}\n{listing}")


def _known_keys(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Field names of the section at `location` inside `kind`."""
    current: type[BaseModel] = kind
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # an index into a list of sources
        sections = [item for item in _flatten(field.annotation) if isinstance(item, type) and issubclass(item, Section)]
        if not sections:
            return []
        current = sections[0]
    return list(current.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", None)
    return [annotation] if not arguments else [leaf for item in arguments for leaf in _flatten(item)]


def _nearest_line(dotted: str, lines: dict[str, str], source: str) -> str:
    while dotted:
        if dotted in lines:
            return lines[dotted]
        dotted = dotted.rpartition(".")[0]
    return source
