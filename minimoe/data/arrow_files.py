"""Rows of parquet and arrow files, and the files of a folder that `datasets.save_to_disk` made.

Memory is bounded by one batch of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimoe.data.rows import BadRow, Row
from minimoe.errors import UserError

_SPLITS = "dataset_dict.json"  # what `save_to_disk` puts into the folder of a `DatasetDict`
_STATE, _INFO = "state.json", "dataset_info.json"  # and into that of a `Dataset`


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow.parquet

    try:
        yield from _rows(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024), path)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}", fix="check that it is a parquet file") from None


def read_arrow(path: Path) -> Iterator[Row | BadRow]:
    """Rows of an IPC stream, which `datasets` writes, or of an IPC file, as Feather's version 2 is."""
    import pyarrow

    try:
        with pyarrow.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(file))
            yield from _rows(batches, path)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}", fix="check that it is an arrow file") from None


def refuse_splits(files: list[Path]) -> None:
    """Refuse a folder of several splits, as `save_to_disk` of a `DatasetDict` makes it: some are not for training.

    Raises:
        UserError: its description is among the files.
    """
    for file in files:
        splits = _read(file).get("splits") if file.name == _SPLITS else None
        if isinstance(splits, list) and splits:
            raise UserError(
                f"{file.parent} holds the splits {', '.join(map(str, splits))}",
                fix=f"name the folder of one, e.g. {file.parent / str(splits[0])}",
            )


def saved_files(folder: Path) -> list[Path] | None:
    """The data files of a dataset that `save_to_disk` put into this folder; None if it made no such folder.

    Beside them it holds descriptions (.json), and perhaps what `map` has cached (.arrow).

    Raises:
        UserError: one of them is missing.
    """
    if not (folder / _STATE).is_file() or not (folder / _INFO).is_file():
        return None
    try:
        names = [Path(entry["filename"]).name for entry in _read(folder / _STATE)["_data_files"]]
    except (KeyError, TypeError):
        return None  # files of these names that are something else
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing, which {_STATE} names", where=str(folder), fix="copy the folder again"
        )
    return [folder / name for name in names]


def without_nulls(value: Any) -> Any:
    """A value of arrow as its row had it: arrow gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _rows(batches: Iterator[Any], path: Path) -> Iterator[Row | BadRow]:
    number = 0
    for batch in batches:
        columns = [(field.name, field.type, batch.column(i)) for i, field in enumerate(batch.schema)]
        for index in range(batch.num_rows):
            number += 1
            place = f"{path}, row {number}"
            try:
                values = {name: _value(column[index].as_py(), kind) for name, kind, column in columns}
            except UnicodeDecodeError:
                yield BadRow("invalid UTF-8", place)
            else:
                yield Row(values, place)


def _value(value: Any, kind: Any) -> Any:
    """A value as its row had it: objects without the nulls that arrow adds, JSON of a column of mixed types parsed."""
    import pyarrow

    if isinstance(value, str) and getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {field.name: _value(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if isinstance(value, list) and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        return [_value(part, kind.value_type) for part in value]
    return without_nulls(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else {}
