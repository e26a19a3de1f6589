"""Where rows come from: local files (txt, jsonl, json, csv, tsv, parquet, arrow), or a Hugging Face hub dataset.

`read_rows` yields rows one by one with their place ("stories.jsonl:12"), so that every later message can name
the line. Memory is bounded by the longest line or one batch of arrow; only a json file that is no object a line is read
whole.

A row that cannot be read (invalid UTF-8, malformed JSON) is yielded as a `BadRow` in its turn: the consumer
decides whether to stop or to count it. Problems with a whole source (missing path, unknown suffix) raise
`UserError`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from minimoe.config import SourceConfig
from minimoe.data.arrow_files import read_arrow, read_parquet, refuse_splits, saved_files, without_nulls
from minimoe.data.rows import BadRow, Row
from minimoe.data.text_files import COMPRESSED, read_json, read_table, read_txt
from minimoe.errors import UserError
from minimoe.hub import reachable

MAX_ENTRIES = 100_000  # of a folder: a second's search, where the whole disk was named by mistake

_TEXT: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {  # kinds that may be compressed
    ".txt": read_txt,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
}
READERS = _TEXT | {".parquet": read_parquet, ".arrow": read_arrow}
_KINDS = f"{', '.join(sorted(READERS))}, and {' or '.join(COMPRESSED)} of the text kinds"


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
    return _search(path)[0]


def unread_files(source: SourceConfig) -> Counter[str]:
    """How many files of each suffix lie beside the source's data files and are not read."""
    others = [] if source.path is None else _search(source.path)[1]
    return Counter(path.suffix or "without suffix" for path in others)


def _search(path: str) -> tuple[list[Path], list[Path]]:
    """The data files, and the other files there."""
    root = Path(os.path.expanduser(path))
    try:
        if root.is_file():
            if _suffix(root) not in READERS:
                raise UserError(f"unknown kind of data file: {root}", fix=f"known are {_KINDS}")
            return [root], []
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
        found = [file for file in found if file.is_file()]
        files = sorted(file for file in found if _suffix(file) in READERS)
        refuse_splits(files)
        saved = {folder: saved_files(folder) for folder in {file.parent for file in files}}
        files = [file for file in files if (names := saved[file.parent]) is None or file in names]
    except OSError as error:
        raise UserError(f"cannot search {path}: {error.strerror}", fix="check the path and its permissions") from None
    if not files:
        kinds = sorted({file.suffix for file in found if file.suffix})[:5]
        others = f", only {', '.join(kinds)}" if kinds else ""
        raise UserError(f"no data files in {path}{others}", fix=f"known kinds are {_KINDS}")
    of_datasets = {folder for folder, names in saved.items() if names is not None}  # with what it writes beside them
    return files, [file for file in found if _suffix(file) not in READERS and file.parent not in of_datasets]


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


def _suffix(path: Path) -> str:
    """'.jsonl' for both a.jsonl and a.jsonl.gz; a compressed parquet file is not a known kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in COMPRESSED and suffixes[0] in _TEXT:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def _load_hub(source: SourceConfig) -> Any:
    import datasets

    reachable("dataset", str(source.hub))
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
            yield Row({name: without_nulls(value) for name, value in values.items()}, place)
