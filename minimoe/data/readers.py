"""Files of rows: txt, jsonl, json, csv, tsv, parquet and arrow, and the text kinds compressed.

`READERS` maps a suffix to a function from a path to rows, each with its place ("stories.jsonl:12"). Memory is bounded
by the longest line or one batch; only JSON that is one list, or is broken over lines, is read whole.

A row that cannot be read (invalid UTF-8, malformed JSON) is yielded as a `BadRow` in its turn: the consumer decides
whether to stop or to count it.

A txt file is one document, or several where it has lines that are exactly `<|endoftext|>`. CRLF becomes LF in it and a
byte order mark is dropped everywhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from minimoe.errors import UserError

# Longer texts are cut into documents, so that one big file can be split, shuffled and tokenised in parallel.
MAX_TEXT_BYTES = 64 * 1024
DOCUMENT_SEPARATOR = b"<|endoftext|>"
COMPRESSED = (".gz", ".zst")
_BINARY = (".parquet", ".arrow")  # have compression of their own


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    place: str  # "file:line"


class BadRow(Exception):
    """A row that cannot be used: what is wrong with it and where it is."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.what, self.place = what, place


def kind_of(path: Path) -> str:
    """'.jsonl' for both a.jsonl and a.jsonl.gz; a compressed parquet file is not a known kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in COMPRESSED and suffixes[0] not in _BINARY:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed, after the byte order mark.

    Raises:
        UserError: the mark is that of UTF-16 or UTF-32.
    """
    with _decompressed(path) as file:
        stream: Any = io.BufferedReader(file)
        mark = stream.peek(3)[:3]
        if mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                f"{path} is UTF-16, and UTF-8 is needed", fix=f"iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
            )
        if mark == b"\xef\xbb\xbf":
            stream.read(3)
        yield stream


def _decompressed(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"invalid UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1} (a file in another encoding is "
            "converted by iconv -f ENCODING -t UTF-8)",
            place,
        ) from None


def _read_txt(path: Path) -> Iterator[Row | BadRow]:
    lines: list[str] = []
    size, first = 0, 1

    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            ends_document = raw.strip() == DOCUMENT_SEPARATOR
            if lines and (ends_document or size + len(raw) > MAX_TEXT_BYTES):
                yield Row({"text": "".join(lines)}, f"{path}:{first}")
                lines, size, first = [], 0, number
            if ends_document:
                first = number + 1
                continue
            try:
                lines.append(_decode(raw, f"{path}:{number}").replace("\r\n", "\n"))
                size += len(raw)
            except BadRow as bad:
                yield bad
    if lines:
        yield Row({"text": "".join(lines)}, f"{path}:{first}")


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """JSON lines; or objects broken over lines, or a list of them, whichever of the two suffixes the file has."""
    with _open(path) as file:
        first = file.readline()
        while first and not first.strip():
            first = file.readline()
    if first.lstrip()[:1] == b"[" or (first.strip() and not _is_json(first)):
        whole = list(_read_whole(path))
        if whole or first.strip() == b"[]":
            yield from whole
            return
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                yield _as_row(_parse_json(_decode(raw, place), place), place)
            except BadRow as bad:
                yield bad


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _read_whole(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a file that is a list of objects, or objects one after the other; none where it is neither.

    Raises:
        UserError: it begins as a list and is cut or malformed.
    """
    with _open(path) as file:
        raw = file.read()
    decoder, number, end = json.JSONDecoder(), 0, 0
    try:
        text = raw.decode("utf-8").strip()
        while end < len(text):
            value, end = decoder.raw_decode(text, end)
            end += len(text[end:]) - len(text[end:].lstrip())
            for item in value if isinstance(value, list) else [value]:
                number += 1
                try:
                    yield _as_row(item, f"{path}, item {number}")
                except BadRow as bad:
                    yield bad
    except UnicodeDecodeError:
        return
    except (ValueError, RecursionError) as error:
        if raw.lstrip()[:1] == b"[":
            raise UserError(
                f"malformed JSON: {error}", where=str(path), fix="fix the file: a broken list has no rows to skip"
            ) from None


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"malformed JSON: {error.msg} at column {error.colno}", place) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits, nesting of thousands of levels
        raise BadRow(f"malformed JSON: {error}", place) from None


def _as_row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise BadRow(f"expected a JSON object, not {type(value).__name__}", place)
    return Row(value, place)


def _read_csv(path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    with _open(path) as file:
        # Undecodable bytes become lone surrogates, which formats refuse, so that one bad row does not end the
        # file.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.DictReader(
            text, strict=True, delimiter=delimiter
        )  # else an open quote swallows the rest of the file
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield BadRow(f"malformed CSV: {error}", f"{path}:{reader.reader.line_num}")  # DictReader's lags here
                continue
            if values is None:
                return
            place = f"{path}:{reader.line_num}"
            if None in values:
                yield BadRow("more fields than the header has", place)
            else:
                yield Row(values, place)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow.parquet

    yield from _read_batches(path, lambda: pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024))


def _read_arrow(path: Path) -> Iterator[Row | BadRow]:
    """Arrow's stream, as `datasets` writes it, or its file with an index."""
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            try:
                yield from pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))

    yield from _read_batches(path, batches)


def _read_batches(path: Path, batches: Callable[[], Iterator[Any]]) -> Iterator[Row | BadRow]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for index in range(batch.num_rows):
                number += 1
                place = f"{path}, row {number}"
                try:
                    columns = enumerate(batch.schema.names)
                    values = {name: without_nulls(batch.column(i)[index].as_py()) for i, name in columns}
                except UnicodeDecodeError:
                    yield BadRow("invalid UTF-8", place)
                else:
                    yield Row(values, place)
    except pyarrow.ArrowException as error:
        kind = kind_of(path)[1:]
        raise UserError(f"cannot read {path}: {error}", fix=f"check that it is a {kind} file") from None


def without_nulls(value: Any) -> Any:
    """A value of arrow as its row had it: arrow gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
