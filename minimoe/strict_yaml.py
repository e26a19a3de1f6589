"""YAML that means what it seems to say.

PyYAML's safe loader with three repairs: duplicate keys are an error, only `true` and `false` are booleans (`no` and
`on` stay text), and `1e-4` is a number. The line of every key is kept for error messages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from minimoe.errors import UserError


class Loader(yaml.SafeLoader):
    """Safe YAML without PyYAML's surprises: see the module docstring."""


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values, and 'file:line' for every dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}", mend="check the path; recipes are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}", mend="give a YAML text file") from None
    lines: dict[str, str] = {}
    try:
        root = yaml.compose(text, Loader=Loader)
        _record_lines(root, "", str(path), lines)
        values = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    except RecursionError:
        raise UserError("not valid YAML: nested too deeply", where=str(path)) from None
    if not isinstance(values, dict):
        kind = "empty" if values is None else type(values).__name__
        raise UserError(f"config file {path} must hold a mapping, it is {kind}", mend="see the recipes in configs/")
    return values, lines


def _record_lines(node: yaml.Node | None, prefix: str, file: str, lines: dict[str, str]) -> None:
    """Fill `lines`; refuse duplicate and non-text keys."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            where = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("a config key must be plain text", where=where)
            key = str(key_node.value)
            if key in seen:
                raise UserError(
                    f"duplicate key {prefix}{key}, first on line {seen[key]}",
                    where=where,
                    mend="keep one of the two",
                )
            seen[key] = key_node.start_mark.line + 1
            lines[prefix + key] = where
            _record_lines(value_node, f"{prefix}{key}.", file, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = f"{file}:{item.start_mark.line + 1}"
            _record_lines(item, f"{prefix}{index}.", file, lines)
