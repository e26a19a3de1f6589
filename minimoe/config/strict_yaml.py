"""YAML that means what it seems to say.

PyYAML's safe loader with these repairs: duplicate keys are an error, only `true` and `false` are booleans (`no` and
`on` stay text), a date stays text, `1e-4` is a number. Aliases (`*name`) are refused: nine lines of them can stand
for a billion values. The line of every key is kept for error messages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from minimoe.errors import UserError

MAX_BYTES = 1 << 18  # of a file: PyYAML parses some 200 kB a second
MAX_NUMBER_LENGTH = 100  # characters: Python's time to read a number grows with the square of its digits


class Loader(yaml.SafeLoader):
    """Safe YAML without PyYAML's surprises: see the module docstring."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; refuses an alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, f"the alias *{event.anchor}: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        """A scalar's text; refuses what no file name, file or integer can hold."""
        text = super().construct_scalar(node)
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ConstructorError(None, None, "a text with a NUL or half a surrogate pair", node.start_mark)
        if node.tag.endswith((":int", ":float")) and len(text) > MAX_NUMBER_LENGTH:
            raise ConstructorError(None, None, f"a number of {len(text)} characters", node.start_mark)
        return text


_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values, and 'file:line' for every dotted key."""
    lines: dict[str, str] = {}
    values = parse(_read_text(path), str(path), lines)
    if not isinstance(values, dict):
        kind = "empty" if values is None else type(values).__name__
        raise UserError(f"config file {path} must hold a mapping, it is {kind}", fix="see the recipes in configs/")
    return values, lines


def parse(text: str, source: str, lines: dict[str, str] | None = None) -> Any:
    """The value that `text` spells; `lines` receives 'source:line' of every dotted key.

    Raises:
        UserError: no YAML, or YAML that means something else than it seems to say.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        _record_lines(node, "", source, {} if lines is None else lines)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # such as !!int of no number
        raise UserError(f"not valid YAML: {error}", where=source) from None
    except RecursionError:
        raise UserError("not valid YAML: nested too deeply", where=source) from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"config file {path} is longer than {MAX_BYTES >> 10} KiB", fix="give a run's config")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}", fix="check the path; recipes are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}", fix="give a YAML text file") from None


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
                    fix="keep one of the two",
                )
            seen[key] = key_node.start_mark.line + 1
            lines[prefix + key] = where
            _record_lines(value_node, f"{prefix}{key}.", file, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = f"{file}:{item.start_mark.line + 1}"
            _record_lines(item, f"{prefix}{index}.", file, lines)
