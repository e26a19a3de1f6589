"""What a model or tokenizer folder may hold: plain files of its own, in formats that carry no code.

Folders come from the internet. A link or an index entry that leads out of the folder would make a stranger's folder
read our other files, and `transformers` passes over a broken `generation_config.json` in silence.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from minimoe.errors import UserError

INDEX = "model.safetensors.index.json"
_OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
_READ = (".json", ".jinja", ".safetensors", ".model", ".txt")  # what transformers opens
_MAX_JSON_BYTES = 1 << 26


def check_folder(folder: Path) -> None:
    """Refuse a folder that points outside itself or holds a broken file.

    A link may stay within the folder. In the Hugging Face cache, `snapshots/COMMIT/` links to `blobs/` beside it.

    Raises:
        UserError: a link or an index entry leads elsewhere, or a file is broken or no file.
    """
    root = Path(os.path.realpath(folder))
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for entry in sorted(root.iterdir()):
        if entry.suffix not in _READ:
            continue
        target = Path(os.path.realpath(entry))
        if not any(target.is_relative_to(place) for place in allowed):
            raise UserError(
                f"{entry.name} is a link out of the folder, to {target}",
                where=str(folder),
                fix="copy the file into the folder, if you trust it",
            )
        if not target.is_file():
            raise UserError(f"{entry.name} is not a file", where=str(folder), fix="copy the folder again")
    for name in _OBJECTS:
        if (root / name).exists():
            read_object(root / name)
    if (root / INDEX).exists():
        _check_index(root)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: something else is in it.
    """
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_JSON_BYTES))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, nested thousands of levels deep
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path.name} does not hold a JSON object", where=str(path), fix="copy the folder again")
    return values


def _check_index(root: Path) -> None:
    weight_map = read_object(root / INDEX).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names:
        raise UserError(f"{INDEX} has no weight_map", where=str(root), fix="copy the folder again")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{INDEX} names {name!r}: only .safetensors files of the folder itself are read",
                where=str(root),
                fix="copy the folder again, from a source you trust",
            )
