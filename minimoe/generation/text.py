"""Token ids -> text while they arrive: whole characters only, and nothing beyond a stop string.

A byte-level token may end inside a UTF-8 character; such a tail decodes to one U+FFFD and is held back until
the next tokens settle it. Pieces concatenate to exactly the decoding of all ids (cut at the first stop
string).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minimoe.tokenizer import TAGS

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental decoding; special tokens give no text, but for the tags of think parts and tool calls."""

    def __init__(self, tokenizer: Any, after: Sequence[int] = ()) -> None:
        """Decode what follows the tokens `after`, which give no text themselves."""
        self._tokenizer = tokenizer
        tags = set(tokenizer.convert_tokens_to_ids([tag for tag in TAGS if tag in tokenizer.get_vocab()]))
        self._hidden = set(tokenizer.all_special_ids) - tags
        self._ids = list(after)
        # Decoding restarts at `_start`. It keeps the tokens of the previous piece as context, because some
        # decoders treat the first token of a text specially (SentencePiece drops its space).
        self._start, self._read = 0, len(self._ids)
        self._emitted = len(self._decode(0))  # characters of decode(ids[start:]) already given out

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, often one token's, possibly empty."""
        self._ids.append(token_id)
        text = self._decode(self._start)
        if text.endswith(REPLACEMENT):
            # Only the last mark can still change: an unfinished character is never more than one mark.
            piece = text[self._emitted : -1]
            self._emitted += len(piece)
            return piece
        piece = text[self._emitted :]
        self._start, self._read = self._read, len(self._ids)
        self._emitted = len(self._decode(self._start))
        return piece

    def flush(self) -> str:
        """The held-back rest, once no more tokens will come."""
        piece = self._decode(self._start)[self._emitted :]
        self._emitted += len(piece)
        return piece

    def _decode(self, start: int) -> str:
        return str(self._tokenizer.decode([token for token in self._ids[start:] if token not in self._hidden]))


class StopFilter:
    """Passes text on until a stop string occurs; holds back an end that could be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The held-back rest, once no more text will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`: ('a wo', 'world') -> 2."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
