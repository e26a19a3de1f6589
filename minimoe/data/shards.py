"""Sources -> memory-mapped token shards, cached by a fingerprint of everything that decides their contents.

A shard is a folder `cache_dir/<fingerprint>/` with
    tokens.bin     token ids of all documents end to end; uint16, or uint32 for a vocabulary of 65,536 or more
    learned.bin    not in pretraining: bool per token, True where it is predicted
    offsets.bin    int64, N + 1: document i is tokens[offsets[i] : offsets[i + 1]]
    num_bytes.bin  int64, N: UTF-8 bytes of the text that is predicted, the denominator of bits per byte
    splits.bin     documents of two parts only: int64, N: tokens of the first part; and
    wanted.bin     bool, N: the label of a judgement
    meta.json      counts, dtype and file sizes
It is built in a temporary folder and renamed, under a lock, so a killed run leaves nothing that looks
finished and the processes of one run tokenise once. Memory stays bounded: documents are read, encoded and
written in chunks.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from minimoe.config import DataConfig, Encoding, SourceConfig
from minimoe.data import sources
from minimoe.data.encode import Chunk, encode_all, num_characters
from minimoe.data.formats import Counts, read_documents
from minimoe.data.preferences import Judgement, Preference
from minimoe.errors import StorageError, UserError
from minimoe.user_cache import user_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 2  # raise it when the same input gives other shards
CHUNK_CHARACTERS = 1 << 20
_CHECK_TOKENS = 1 << 24


# What each encoding takes, and what is said of something else.
_TAKES: dict[Encoding, Any] = {
    "pretrain": (str, list),
    "sft": list,
    "pairs": Preference,
    "labels": (Preference, Judgement),
}
_WANTS = {
    "pretrain": "pretraining learns from text or conversations",
    "sft": "SFT learns from conversations",
    "pairs": "preferences are learned from rows with chosen and rejected",
    "labels": "kto learns from rows with a label, or with chosen and rejected",
}
_IS = {str: "plain text", list: "a conversation", Preference: "a preference", Judgement: "an answer with a label"}
_FIX = {
    "pretrain": "train on it with `minimoe dpo`",
    "sft": "give rows of format messages, conversations, alpaca or prompt_completion; preferences go to `minimoe dpo`",
    "pairs": "give columns prompt, chosen and rejected; for answers with a label set dpo.loss: kto",
    "labels": "give columns prompt, completion and label",
}


@dataclass(frozen=True)
class Corpus:
    """One tokenised source; N documents."""

    tokens: np.ndarray  # (total,) memory map
    learned: np.ndarray | None  # (total,) bool memory map; None: every token is predicted
    offsets: np.ndarray  # (N + 1,) int64 memory map
    num_bytes: np.ndarray  # (N,) int64 memory map
    fingerprint: str
    counts: dict[str, int]  # documents, tokens, bytes, truncated, dropped, bad_rows, empty_rows
    ignored: dict[str, int] = field(default_factory=dict)  # rows with a column that the format does not read
    splits: np.ndarray | None = None  # (N,) int64: of documents of two parts, tokens of the first
    wanted: np.ndarray | None = None  # (N,) bool: labels of judgements
    reference: np.ndarray | None = None  # (N, 2) float32: log-probabilities of both parts under another model

    @property
    def num_documents(self) -> int:
        return len(self.num_bytes)


def cache_folder(data: DataConfig) -> Path:
    """Where tokenised data is kept, and what models have said of it."""
    return Path(os.path.expanduser(data.cache_dir)) if data.cache_dir else user_cache()


def prepare(source: SourceConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Corpus:
    """Open the source's shard, building it first if it is not in the cache.

    Raises:
        UserError: bad rows, no usable row, a format the stage cannot take, token ids outside the vocabulary.
    """
    fingerprint = _fingerprint(source, data, tokenizer, encoding)
    cache = Path("the cache")
    try:
        cache = cache_folder(data)
        folder = cache / fingerprint
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f"{fingerprint}.lock").touch()  # the lock itself would wait for a folder that can be written
        with FileLock(cache / f"{fingerprint}.lock"):
            if not _complete(folder):
                _sweep(cache, fingerprint)
                shutil.rmtree(folder, ignore_errors=True)
                temporary = Path(tempfile.mkdtemp(prefix=f"{fingerprint}.building-", dir=cache))
                try:
                    _build(temporary, source, data, tokenizer, encoding)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        setting = "data.cache_dir" if data.cache_dir else "XDG_CACHE_HOME"
        fix = f"free disk space, or set {setting} to a folder that can be written"
        raise StorageError(f"cannot write tokenised data: {error}", where=str(cache), fix=fix) from None
    return _open(folder, fingerprint, len(tokenizer))


def _sweep(cache: Path, held: str) -> None:
    """Delete what killed processes were building: nobody has the lock of it, or we do."""
    for left in cache.glob("*.building-*"):
        fingerprint = left.name.partition(".")[0]
        lock = FileLock(cache / f"{fingerprint}.lock", timeout=0)
        with suppress(Timeout), nullcontext() if fingerprint == held else lock:
            shutil.rmtree(left, ignore_errors=True)


def _fingerprint(source: SourceConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> str:
    """Hash of contents, tokenizer and every setting that decides the shard."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = {
        "version": _VERSION,
        "source": sources.fingerprint(source),
        "format": [source.format, source.text_column],
        "tokenizer": hashlib.blake2b(vocabulary.encode()).hexdigest(),
        "template": str(tokenizer.chat_template),
        "special": tokenizer.special_tokens_map,
        "stage": encoding,
        "sequence_length": data.sequence_length if encoding != "pretrain" else None,  # which cuts rows later
        "max_documents": data.max_documents,
        "on_bad_rows": data.on_bad_rows,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _open(folder: Path, fingerprint: str, vocab_size: int) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    corpus = Corpus(
        tokens=_map(folder / "tokens.bin", meta["dtype"]),
        learned=_map(folder / "learned.bin", bool) if meta["learned"] else None,
        offsets=_map(folder / "offsets.bin", np.int64),
        num_bytes=_map(folder / "num_bytes.bin", np.int64),
        fingerprint=fingerprint,
        counts=meta["counts"],
        ignored=meta["ignored"],
        splits=np.fromfile(folder / "splits.bin", dtype=np.int64) if "splits.bin" in meta["sizes"] else None,
        wanted=np.fromfile(folder / "wanted.bin", dtype=bool) if "wanted.bin" in meta["sizes"] else None,
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each host
        _check_ids(folder, corpus, vocab_size)
    return corpus


def _map(file: Path, dtype: Any) -> np.ndarray:
    """A file as an array that is read where it is looked at, which is here and there: nothing is read ahead."""
    with file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, dtype)


def _check_ids(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Read in blocks beside the map, whose pages would stay."""
    with (folder / "tokens.bin").open("rb") as file:
        for start in range(0, len(corpus.tokens), _CHECK_TOKENS):
            block = np.fromfile(file, corpus.tokens.dtype, _CHECK_TOKENS)
            if block.max() >= vocab_size:
                position = start + int(np.argmax(block >= vocab_size))
                document = int(np.searchsorted(corpus.offsets, position, side="right")) - 1
                raise UserError(
                    f"document {document} has token id {corpus.tokens[position]}; ids must be below {vocab_size}",
                    where=str(folder),
                    fix="delete this folder of the cache and start again",
                )


def _complete(folder: Path) -> bool:
    """Whether the folder holds a shard whose files have the sizes they were written with."""
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _build(
    folder: Path, source: SourceConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    dtype = np.uint16 if len(tokenizer) < 1 << 16 else np.uint32
    skipped = Counts()
    counts = dict.fromkeys(("documents", "tokens", "bytes", "truncated", "dropped"), 0)
    names = ["tokens.bin", "offsets.bin", "num_bytes.bin"]
    names += {"pretrain": [], "sft": ["learned.bin"]}.get(encoding, ["learned.bin", "splits.bin", "wanted.bin"])
    files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in names}
    try:
        np.zeros(1, np.int64).tofile(files["offsets.bin"])
        chunks = _chunks(source, data, encoding, skipped)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            # Characters of text are somewhat less than bytes of the files, so the bar may end a little early.
            bar = progress.add_task(f"tokenising {sources.describe(source)}", total=sources.total_bytes(source))
            for encoded in encode_all(chunks, tokenizer, encoding, data):
                encoded.tokens.astype(dtype).tofile(files["tokens.bin"])
                (counts["tokens"] + np.cumsum(encoded.lengths)).astype(np.int64).tofile(files["offsets.bin"])
                encoded.num_bytes.astype(np.int64).tofile(files["num_bytes.bin"])
                for name in ("learned", "splits", "wanted"):
                    if (values := getattr(encoded, name)) is not None:
                        values.tofile(files[f"{name}.bin"])
                counts["documents"] += len(encoded.lengths)
                counts["tokens"] += len(encoded.tokens)
                counts["bytes"] += int(encoded.num_bytes.sum())
                counts["truncated"] += encoded.truncated
                counts["dropped"] += encoded.dropped
                progress.advance(bar, encoded.characters)
    finally:
        for file in files.values():
            file.close()
    if not counts["documents"]:
        raise UserError(
            f"nothing to learn: no answer within {data.sequence_length} tokens in {counts['dropped']} rows",
            where=sources.describe(source),
            fix="give conversations with non-empty assistant messages, or raise data.sequence_length",
        )
    meta = {
        "dtype": np.dtype(dtype).name,
        "learned": encoding != "pretrain",
        "counts": counts | {"bad_rows": skipped.bad_rows, "empty_rows": skipped.empty_rows},
        "ignored": dict(skipped.ignored),
        "sizes": {name: (folder / name).stat().st_size for name in names},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _chunks(source: SourceConfig, data: DataConfig, encoding: Encoding, skipped: Counts) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for document, place in read_documents(source, data, skipped):
        if not isinstance(document, _TAKES[encoding]):
            raise UserError(f"{_WANTS[encoding]}, and this is {_IS[type(document)]}", where=place, fix=_FIX[encoding])
        chunk.append((document, place))
        size += num_characters(document)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
