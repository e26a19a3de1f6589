"""Rows of text files: txt, jsonl, json, csv and tsv, each also compressed (.gz, .zst).

Text is UTF-8. A byte order mark is dropped; UTF-16 and UTF-32 are refused with the command that converts them, and so
is any other encoding at its first row that is no UTF-8.

A txt file is one document, or several where it has lines that are exactly `<|endoftext|>`; CRLF becomes LF in it. A
jsonl or json file has an object a line; or it begins with a list or a line `{`, and holds a list of objects, or objects
laid out over several lines. Such a file is read whole. All others are read line by line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minimoe.data.rows import BadRow, Row
from minimoe.errors import UserError, shorten

# Longer texts are cut into documents, so that one big file can be split, shuffled and tokenised in parallel.
MAX_TEXT_BYTES = 64 * 1024
DOCUMENT_SEPARATOR = b"<|endoftext|>"
COMPRESSED = {".gz": "zcat", ".zst": "zstdcat"}  # and what prints their text
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"
_UNDECODED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are no UTF-8
_SPACE = re.compile(r"[ \t\r\n]*")


def cut_text(text: str, limit: int = MAX_TEXT_BYTES) -> Iterator[str]:
    """Pieces of at most `limit` characters that join to `text`, cut after a line break, else a space."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for separator in ("\n", " "):
            found = text.rfind(separator, start, end)
            if found >= start:
                end = found + 1
                break
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def read_txt(path: Path) -> Iterator[Row | BadRow]:
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
                lines.append(_decode(raw, path, number).replace("\r\n", "\n"))
                size += len(raw)
            except BadRow as bad:
                yield bad
    if lines:
        yield Row({"text": "".join(lines)}, f"{path}:{first}")


def read_json(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        lines = ((number, raw) for number, raw in enumerate(file, 1) if raw.strip())
        first, head = next(lines, (1, b""))
        if not head.lstrip().startswith(b"[") and head.strip() != b"{":
            yield from _read_json_line(path, first, head)
            for number, raw in lines:
                yield from _read_json_line(path, number, raw)
            return
        raw = head + file.read()
    try:
        values = list(_json_values(_decode(raw, path, first), path, first))
    except BadRow as bad:
        fix = bad.fix or "fix the file: it is read whole, so that no row of it can be skipped"
        raise UserError(bad.what, where=bad.place, fix=fix) from None
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    for number, value in enumerate(values, 1):
        yield _as_row(value, f"{path}, item {number}")


def read_table(path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    """Rows of a csv or tsv file, whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    with _open(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        # Not strict, an open quote would swallow the rest of the file.
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                kind = "CSV" if delimiter == "," else "TSV"
                yield BadRow(f"malformed {kind}: {error}", f"{path}:{reader.reader.line_num}")  # DictReader's lags here
                continue
            if values is None:
                return
            place = f"{path}:{reader.line_num}"
            if None in values:
                yield BadRow("more fields than the header has", place)
            elif twice := _repeated(name for name in reader.fieldnames or () if name):  # spreadsheets leave some empty
                yield BadRow(f"the header has the column {shorten(twice)} twice", place)
            elif undecoded := _UNDECODED.search("\0".join(filter(None, (*values, *values.values())))):
                raw = "".join(filter(None, values.values())).encode("utf-8", "surrogateescape")
                what = f"invalid UTF-8: byte {ord(undecoded[0]) - 0xDC00:#04x}"
                yield BadRow(what, place, _other_encoding(raw, path))
            else:
                yield Row(values, place)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed, after the byte order mark.

    Raises:
        UserError: they are UTF-16 or UTF-32.
    """
    with _decompressed(path) as file:
        stream = io.BufferedReader(file)
        head = stream.peek(1024)[:1024]
        if encoding := _wide_encoding(head):
            raise UserError(f"{path} is {encoding}, not UTF-8", fix=_conversion(path, encoding))
        if head.startswith(_UTF8_MARK):
            stream.read(len(_UTF8_MARK))
        yield stream


def _decompressed(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return path.open("rb")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the mark or by the zeros beside ASCII."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) == 0 and max(even, odd) * 4 > len(head):
        return "UTF-16LE" if odd else "UTF-16BE"
    return None


def _decode(raw: bytes, path: Path, line: int) -> str:
    """The text of bytes that begin with line `line` of the file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        line += raw.count(b"\n", 0, error.start)
        what = f"invalid UTF-8: byte {raw[error.start]:#04x} at column {error.start - line_start + 1}"
        raise BadRow(what, f"{path}:{line}", _other_encoding(raw, path)) from None


def _other_encoding(raw: bytes, path: Path) -> str:
    """What to do about bytes that are no UTF-8, with a guess at what they are: only a person can know."""
    # Letters with accents stand between ASCII ones; the characters of Chinese are two bytes each, in a row.
    runs = re.findall(rb"[\x80-\xff]+", raw)
    guess = "CP1252" if sum(map(len, runs)) < 2 * len(runs) else "GB18030"
    return f"if the file is {guess} (a guess), convert it: {_conversion(path, guess)}"


def _conversion(path: Path, encoding: str) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    new = shlex.quote(str(name.with_suffix(f".utf8{name.suffix}")))
    old = shlex.quote(str(path))
    if path.suffix.lower() in COMPRESSED:
        return f"{COMPRESSED[path.suffix.lower()]} {old} | iconv -f {encoding} -t UTF-8 > {new}"
    return f"iconv -f {encoding} -t UTF-8 {old} > {new}"


def _read_json_line(path: Path, number: int, raw: bytes) -> Iterable[Row | BadRow]:
    try:
        values = list(_json_values(_decode(raw, path, number), path, number))
        if len(values) > 1:
            return [BadRow("malformed JSON: more than one value in the line", f"{path}:{number}")]
        return [_as_row(value, f"{path}:{number}") for value in values]
    except BadRow as bad:
        return [bad]


def _json_values(text: str, path: Path, line: int) -> Iterator[Any]:
    """The JSON values that follow each other in a text, which begins with line `line` of the file."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position = _end_of_space(text, 0)
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            place = f"{path}:{line + error.lineno - 1}"
            raise BadRow(f"malformed JSON: {error.msg.removesuffix(' at')} at column {error.colno}", place) from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of levels
            raise BadRow(f"malformed JSON: {error}", f"{path}:{line}") from None
        yield value
        position = _end_of_space(text, position)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What Python makes of an object, but that it would keep the last of two values in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {shorten(_repeated(key for key, _ in pairs))} twice in one object")
    return values


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _as_row(value: Any, place: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(f"expected a JSON object, not {type(value).__name__}", place)
    return Row(value, place)
