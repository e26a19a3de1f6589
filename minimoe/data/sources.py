"""Where rows come from: local txt, jsonl, json, csv and parquet files, or a Hugging Face hub dataset.

`read_rows` yields rows one by one with their place ("stories.jsonl:12"), so that every later message can name
the line. Memory is bounded by the longest line or one parquet batch; only a `.json` file that holds a list is
read whole.

A row that cannot be read (invalid UTF-8, malformed JSON) is yielded as a `BadRow` in its turn: the consumer
decides whether to stop or to count it. Problems with a whole source (missing path, unknown suffix) raise
`UserError`.

A txt file is one document, or several where it has lines that are exactly `<|endoftext|>`. CRLF becomes LF in
it and a byte order mark is dropped everywhere.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from minimoe.config import SourceConfig
from minimoe.errors import UserError

# Longer texts are cut into documents, so that one big file can be split, shuffled and tokenised in parallel.
MAX_TEXT_BYTES = 64 * 1024
MAX_ENTRIES = 100_000  # of a folder: a second's search, where the whole disk was named by mistake
DOCUMENT_SEPARATOR = b"<|endoftext|>"


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    place: str  # "file:line"


class BadRow(Exception):
    """A row that cannot be used: what is wrong with it and where it is."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.what, self.place = what, place


def describe(source: SourceConfig) -> str:
    """The source's name in messages."""
    if source.path is not None:
        return source.path
    return "/".join(part for part in (source.hub, source.subset, source.split) if part)


def read_rows(source: SourceConfig) -> Iterator[Row | BadRow]:
    """All rows of a source in a fixed order (files sorted by name).

    Raises:
        UserError: nothing at the path, no file of a known kind, an unreadable file, an unreachable hub
        dataset.
    """
    if source.path is None:
        yield from _read_hub(source)
        return
    for path in list_files(source.path):
        try:
            for row in READERS[_suffix(path)](path):
                if isinstance(row, Row) and _suffix(path) == ".txt":
                    row = Row({source.text_column: row.values["text"]}, row.place)
                yield row
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {error}", fix="check the file's permissions and contents") from None


def list_files(path: str) -> list[Path]:
    """The data files at a file, folder (searched through, hidden files left out) or glob."""
    kinds = ", ".join(sorted(READERS))
    root = Path(os.path.expanduser(path))
    try:
        if root.is_file():
            if _suffix(root) not in READERS:
                fix = f"known are {kinds}, and .gz of the text kinds"
                raise UserError(f"unknown kind of data file: {root}", fix=fix)
            return [root]
        is_folder = root.is_dir()
        walk = root.rglob("*") if is_folder else map(Path, glob.iglob(str(root), recursive=True))
        found = list(islice(walk, MAX_ENTRIES + 1))
        if len(found) > MAX_ENTRIES:
            raise UserError(f"more than {MAX_ENTRIES:,} files and folders in {path}", fix="name a smaller folder")
        if not found and not is_folder:
            raise UserError(
                f"no such file, folder or glob: {path}",
                fix="check data paths; relative ones start here: " + str(Path.cwd()),
            )
        if is_folder:
            found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
        files = sorted(file for file in found if file.is_file() and _suffix(file) in READERS)
    except OSError as error:
        raise UserError(f"cannot search {path}: {error.strerror}", fix="check the path and its permissions") from None
    if not files:
        raise UserError(f"no data files in {path}", fix=f"known kinds are {kinds}, and .gz of the text kinds")
    return files


def total_bytes(source: SourceConfig) -> int | None:
    """Bytes of the source's files, for a progress bar; None for a hub dataset."""
    return None if source.path is None else sum(file.stat().st_size for file in list_files(source.path))


def fingerprint(source: SourceConfig) -> str:
    """A hash of the source's contents.

    Local files are hashed whole (about 1 GB/s): a time stamp changes with every copy and would make a resumed
    run on another machine look like one on other data. Hub datasets are known by the fingerprint `datasets`
    gives them, streamed ones by the repository's commit.
    """
    digest = hashlib.blake2b(digest_size=16)
    if source.path is None:
        version = _hub_commit(source) if source.streaming else _load_hub(source)._fingerprint
        digest.update(f"{describe(source)}\0{version}".encode())
        return digest.hexdigest()
    for path in list_files(source.path):
        digest.update(f"{_suffix(path)}\0".encode())
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}", fix="check the file's permissions") from None
    return digest.hexdigest()


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


def _suffix(path: Path) -> str:
    """'.jsonl' for both a.jsonl and a.jsonl.gz; a compressed parquet file is not a known kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] == ".gz" and suffixes[0] != ".parquet":
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed, after the byte order mark."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        stream = io.BufferedReader(file)
        if stream.peek(3)[:3] == b"\xef\xbb\xbf":
            stream.read(3)
        yield stream


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}", place) from None


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


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                yield _as_row(_parse_json(_decode(raw, place), place), place)
            except BadRow as bad:
                yield bad


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """A list of objects, or JSON lines under the wrong name, which is common."""
    with _open(path) as file:
        head = file.peek(1).lstrip()[:1]  # type: ignore[attr-defined]
        raw = file.read() if head == b"[" else b""
    if not raw:
        yield from _read_jsonl(path)
        return
    try:
        values = _parse_json(_decode(raw, str(path)), str(path))
    except BadRow as bad:
        raise UserError(bad.what, where=bad.place, fix="fix the file: a broken list has no rows to skip") from None
    for number, value in enumerate(values, 1):
        try:
            yield _as_row(value, f"{path}, item {number}")
        except BadRow as bad:
            yield bad


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


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    with _open(path) as file:
        # Undecodable bytes become lone surrogates, which formats refuse, so that one bad row does not end the
        # file.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True)  # else an open quote swallows the rest of the file
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
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for index in range(batch.num_rows):
                number += 1
                place = f"{path}, row {number}"
                try:
                    columns = enumerate(batch.schema.names)
                    values = {name: _without_nulls(batch.column(i)[index].as_py()) for i, name in columns}
                except UnicodeDecodeError:
                    yield BadRow("invalid UTF-8", place)
                else:
                    yield Row(values, place)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}", fix="check that it is a parquet file") from None


def _without_nulls(value: Any) -> Any:
    """A value of arrow as its row had it: arrow gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _load_hub(source: SourceConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.hub, name=source.subset, split=source.split, streaming=source.streaming)
    except Exception as error:  # a dozen kinds: unknown name, no network, unknown subset or split, gated
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load hub dataset {describe(source)}: {reason}",
            fix="check hub, subset and split, the network, and access rights if the dataset is gated",
        ) from None


def _hub_commit(source: SourceConfig) -> str:
    """The commit of the dataset's repository, or "" where it cannot be asked for: the name alone must do."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(source.hub)).sha or ""
    except Exception:  # no network, or a dataset from elsewhere
        return ""


def _read_hub(source: SourceConfig) -> Iterator[Row | BadRow]:
    rows = iter(_load_hub(source))
    number = 0
    while True:
        number += 1
        place = f"{describe(source)}, row {number}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError:
            yield BadRow("invalid UTF-8", place)
        except OSError as error:
            raise UserError(f"reading stopped: {error}", where=place, fix="check the network and start again") from None
        else:
            yield Row({name: _without_nulls(value) for name, value in values.items()}, place)
