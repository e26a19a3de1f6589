"""Documents -> token ids, by several processes.

Chunks of about a megabyte of text go to a pool, at most two per process in flight, and come back in order:
memory stays bounded and the result is the same whatever the number of processes. Starting processes costs
seconds, so little data is encoded right here.

Pretraining: `<|endoftext|>` text `<|endoftext|>`, all of it predicted; a conversation is rendered by the chat
template first. SFT: rendered conversations, assistant turns predicted, longer ones truncated to
`sequence_length`; a conversation with an empty answer, or none within `sequence_length`, teaches nothing and
is dropped. Preferences and judgements: see `preferences.py`.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe import tokenizer as tok
from minimoe.config import DataConfig, Encoding
from minimoe.conversation import Message
from minimoe.data.formats import Document, document_texts
from minimoe.data.preferences import Judgement, Preference, fitted, judgements, mismatched
from minimoe.errors import MinimoeError, StorageError, UserError
from minimoe.failpoints import failpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chunk = list[tuple[Document, str]]  # documents, each with its place ("stories.jsonl:12")

TIMEOUT = 300.0  # seconds; a chunk takes one or two, and the first waits for the processes to start
CHUNKS_IN_PROCESS = 6  # up to about 6 MB are encoded without starting processes


@dataclass
class Encoded:
    """A chunk's documents as arrays."""

    tokens: np.ndarray
    learned: np.ndarray | None
    lengths: np.ndarray
    num_bytes: np.ndarray
    truncated: int
    dropped: int
    splits: np.ndarray | None = None  # of documents in two parts: tokens of the first
    wanted: np.ndarray | None = None  # of judgements: their labels
    characters: int = 0  # of text read, for progress


def encode_all(
    chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerBase, encoding: Encoding, data: DataConfig
) -> Iterator[Encoded]:
    """Encoded chunks in order, by several processes where there is enough data for it to pay."""
    head = list(islice(chunks, CHUNKS_IN_PROCESS + 1))
    workers = data.num_processes or _available_cores()
    if workers == 1 or len(head) <= CHUNKS_IN_PROCESS:
        for chunk in chain(head, chunks):
            yield encode(chunk, tokenizer, encoding, data.sequence_length)
        return
    settings = (tokenizer, encoding, data.sequence_length)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=settings)
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chain(head, chunks):
            pending.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(pending) > 2 * workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # one that hangs would be waited for below; the pool has no public way before Python 3.14
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(chunk: Chunk, future: Future[Encoded]) -> Encoded:
    """What a worker made of a chunk.

    Raises:
        StorageError: it failed, died or gave no sign of life.
    """
    where = f"{chunk[0][1]} to {chunk[-1][1]}"
    try:
        return future.result(timeout=TIMEOUT)
    except MinimoeError:
        raise
    except BrokenProcessPool:
        fix = "it was killed, perhaps for memory: set data.num_processes: 1"
        raise StorageError("a tokenisation process died", where=where, fix=fix) from None
    except TimeoutError:
        fix = "start again; if it hangs again, look at these rows or set data.num_processes: 1"
        raise StorageError(f"a tokenisation process is silent for {TIMEOUT:g} s", where=where, fix=fix) from None
    except Exception as error:
        what = f"a tokenisation process failed: {type(error).__name__}: {error}"
        raise StorageError(what, where=where, fix="look at these rows") from error


_worker: dict[str, Any] = {}  # settings of this process, when it is a worker


def _start_worker(tokenizer: PreTrainedTokenizerBase, encoding: Encoding, sequence_length: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to every process of a run; the main one ends the pool
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker.update(tokenizer=tokenizer, encoding=encoding, sequence_length=sequence_length)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return encode(chunk, **_worker)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(chunk: Chunk, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, sequence_length: int) -> Encoded:
    """Token ids of a chunk's documents."""
    if failpoint("tokenise.chunk") == "raise":
        raise ValueError("a failpoint")
    if encoding == "pretrain":
        encoded = _encode_pretrain(chunk, tokenizer)
    elif encoding == "sft":
        encoded = _encode_sft(chunk, tokenizer, sequence_length)
    else:
        encoded = _encode_two_parts(chunk, tokenizer, encoding, sequence_length)
    encoded.characters = sum(num_characters(document) for document, _ in chunk)
    return encoded


@contextmanager
def _place_of_errors(place: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(error.what, where=error.where or place, fix=error.fix) from None


def num_characters(document: Document) -> int:
    """Characters of a document's text, with an allowance for the frame of each message."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, Preference):
        return num_characters(document.chosen) + num_characters(document.rejected)
    messages = document.messages if isinstance(document, Judgement) else document
    return sum(len(message["content"] or "") + 64 for message in messages)


def _encode_pretrain(chunk: Chunk, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    boundary = tok.boundary_id(tokenizer)
    # One call for all plain texts: without worker processes, tokenizers spreads them over the cores itself.
    batch = iter(tok.encode_texts(tokenizer, [text for text, _ in chunk if isinstance(text, str)]))
    ids: list[int] = []
    lengths, num_bytes = [], []
    for document, place in chunk:
        if isinstance(document, str):
            body = next(batch)
            num_bytes.append(len(document.encode()))
        else:
            assert isinstance(document, list)  # shards refuses others
            with _place_of_errors(place):
                body = tok.encode_conversation(tokenizer, document)
            num_bytes.append(sum(len(text.encode()) for text in document_texts(document)))  # not the markup
        ids += [boundary, *body, boundary]
        lengths.append(len(body) + 2)
    return Encoded(np.array(ids, np.uint32), None, np.array(lengths, np.int64), np.array(num_bytes, np.int64), 0, 0)


def _encode_sft(chunk: Chunk, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Encoded:
    ids: list[int] = []
    learned: list[bool] = []
    lengths, num_bytes = [], []
    truncated = dropped = 0
    for document, place in chunk:
        assert isinstance(document, list)  # shards refuses others
        turns = [message for message in document if message["role"] == "assistant"]
        learned_turns = [turn for turn in turns if turn.get("learned", True)]
        answered = learned_turns and all(turn["content"].strip() or turn.get("tool_calls") for turn in learned_turns)
        with _place_of_errors(place):
            row, mask = tok.encode_chat(tokenizer, document) if answered else ([], [])
        overlong = len(row) > sequence_length
        row, mask = row[:sequence_length], mask[:sequence_length]
        if not any(mask[1:]):  # the first token of a document is never predicted
            dropped += 1
            continue
        truncated += overlong
        answer = [token for token, flag in zip(row, mask, strict=True) if flag]
        ids += row
        learned += mask
        lengths.append(len(row))
        num_bytes.append(len(tokenizer.decode(answer, skip_special_tokens=True).encode()))
    return Encoded(
        np.array(ids, np.uint32),
        np.array(learned, bool),
        np.array(lengths, np.int64),
        np.array(num_bytes, np.int64),
        truncated,
        dropped,
    )


def _encode_two_parts(
    chunk: Chunk, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, sequence_length: int
) -> Encoded:
    """Preferences, or judgements whose second part has the answer of the row before."""
    pairs: list[tuple[list[Message], list[Message], bool, str]] = []
    if encoding == "pairs":
        for document, place in chunk:
            assert isinstance(document, Preference)
            pairs.append((document.chosen, document.rejected, True, place))
    else:
        judged = [(j, place) for document, place in chunk for j in judgements(document)]  # type: ignore[arg-type]
        for number, (judgement, place) in enumerate(judged):
            other = judged[number - 2 if len(judged) > 2 else number - 1][0]  # not of the same row
            second = mismatched(judgement.messages, other.messages)
            pairs.append((judgement.messages, second, judgement.wanted, place))
    ids: list[int] = []
    learned: list[bool] = []
    lengths, num_bytes, splits, wanted = [], [], [], []
    truncated = dropped = 0
    for first, second, label, place in pairs:
        with _place_of_errors(place):
            both = fitted([tok.encode_chat(tokenizer, part) for part in (first, second)], sequence_length)
        if both is None:
            dropped += 1
            continue
        row, mask, split, cut = both
        truncated += cut
        answer = [token for token, flag in zip(row[:split], mask[:split], strict=True) if flag]
        ids += row
        learned += mask
        lengths.append(len(row))
        splits.append(split)
        wanted.append(label)
        num_bytes.append(len(tokenizer.decode(answer, skip_special_tokens=True).encode()))
    return Encoded(
        np.array(ids, np.uint32),
        np.array(learned, bool),
        np.array(lengths, np.int64),
        np.array(num_bytes, np.int64),
        truncated,
        dropped,
        np.array(splits, np.int64),
        np.array(wanted, bool),
    )
