"""Where rows come from: files, folders and globs of the kinds in `readers.py`, or a Hugging Face hub dataset.

`read_rows` yields rows one by one with their place, so that every later message can name the line. Problems with a
whole source (missing path, unknown suffix) raise `UserError`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from minimoe.config import SourceConfig
from minimoe.data.readers import MAX_TEXT_BYTES, READERS, kind_of, without_nulls
from minimoe.data.readers import BadRow as BadRow
from minimoe.data.readers import Row as Row
from minimoe.errors import UserError
from minimoe.hub import reachable

_OF_DATASETS = ("state.json", "dataset_info.json")  # beside the arrow files of `save_to_disk`
MAX_ENTRIES = 100_000  # of a folder: a second's search, where the whole disk was named by mistake


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
            for row in READERS[kind_of(path)](path):
                if isinstance(row, Row) and kind_of(path) == ".txt":
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
            if kind_of(root) not in READERS:
                fix = f"known are {kinds}, and .gz or .zst of the text kinds"
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
            _refuse_splits(root)
            found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
            found = [file for file in found if file.name not in _OF_DATASETS]
        files = sorted(file for file in found if file.is_file() and kind_of(file) in READERS)
    except OSError as error:
        raise UserError(f"cannot search {path}: {error.strerror}", fix="check the path and its permissions") from None
    if not files:
        raise UserError(f"no data files in {path}", fix=f"known kinds are {kinds}, and .gz or .zst of the text kinds")
    return files


def _refuse_splits(root: Path) -> None:
    """A folder of several splits, as `datasets` saves them, has documents that are not for training."""
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise UserError(f"{root} holds the splits {', '.join(splits)}", fix=f"name one, e.g. {root / splits[0]}")


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
        digest.update(f"{kind_of(path)}\0".encode())
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
