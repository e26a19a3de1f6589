"""`minimoe evaluate --needle`: can a model still use what stands far back in its context?

A sentence that names a secret word is put into other text at some depth, and at the end the model is asked for the word
(github.com/gkamradt/LLMTest_NeedleInAHaystack). Small models answer few questions, but know which of some words is the
likeliest: that is what is scored, beside chance, one forward pass a trial.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from minimoe.config import EvaluateRun
from minimoe.config.file import load_config
from minimoe.data.formats import Counts, document_texts, read_documents
from minimoe.errors import UserError
from minimoe.loading import load_model
from minimoe.tokenizer import boundary_id, encode_text

NEEDLE, QUESTION = "The secret word is{word}.", "The secret word is"
WORDS = (
    "apple river window music garden bread winter silver paper dragon stone letter coffee yellow market bridge".split()
)
CHOICES = 8
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Where no text is given.
FILLER = (
    "The road went on past the mill and over the hill. ",
    "In the morning there was fog on the water, and later the sun came out. ",
    "She put the cups on the table and looked out at the yard. ",
    "Nobody was there, so they walked home and talked about the day. ",
)


@dataclass(frozen=True)
class Found:
    """The share of trials in which the right word was the likeliest, at a length and a depth."""

    length: int
    depth: float
    accuracy: float


def search(
    model: Any, tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], trials: int, text: str = ""
) -> list[Found]:
    """Hide a word and ask for it, `trials` times at each length (tokens) and depth (0 is the beginning)."""
    rng = random.Random(0)
    words = _distinct(tokenizer)
    hay = encode_text(tokenizer, text or "".join(rng.choice(FILLER) for _ in range(max(lengths))))
    question, start = encode_text(tokenizer, " " + QUESTION), [boundary_id(tokenizer)]
    found = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("looking for needles", total=len(lengths) * len(depths) * trials)
        for length in lengths:
            for depth in depths:
                right = 0
                for _ in range(trials):
                    word = rng.choice(list(words))
                    needle = encode_text(tokenizer, " " + NEEDLE.format(word=" " + word))
                    room = length - len(start) - len(needle) - len(question)
                    offset = rng.randrange(max(len(hay) - room, 1))
                    around = (hay[offset:] + hay * (room // max(len(hay), 1) + 1))[:room]
                    place = round(depth * room)
                    ids = [*start, *around[:place], *needle, *around[place:], *question]
                    with torch.no_grad():
                        inputs = torch.tensor([ids], device=model.device)
                        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
                    right += max(words, key=lambda name: float(logits[words[name]])) == word
                    progress.advance(bar)
                found.append(Found(length, depth, right / trials))
    return found


def _distinct(tokenizer: Any) -> dict[str, int]:
    """Words and the first token of each, no two the same."""
    words: dict[str, int] = {}
    for word in WORDS:
        ids = encode_text(tokenizer, " " + word)
        # A leading space may be a token of its own.
        first = next((token for token in ids if tokenizer.decode([token]).strip()), ids[-1])
        if first not in words.values() and (ids[0] == first):
            words[word] = first
        if len(words) == CHOICES:
            return words
    raise UserError(
        f"this tokenizer begins only {len(words)} of {len(WORDS)} words with tokens of their own; {CHOICES} are needed",
        fix="the check needs a tokenizer of English with a larger vocabulary",
    )


def run(
    model_dir: str,
    data: str | None,
    *,
    lengths: Sequence[int],
    trials: int,
    json_output: bool,
    device: str = "auto",
) -> None:
    """Search and print."""
    model, tokenizer = load_model(model_dir, device)
    limit = getattr(model.config, "max_position_embeddings", 2048)
    lengths = lengths or [limit // 8, limit // 4, limit // 2, limit]
    wrong = [length for length in lengths if not 48 <= length <= limit]
    if wrong:
        raise UserError(f"--lengths {wrong[0]}: 48 to the model's {limit} positions are possible", where=model_dir)
    text = ""
    if data is not None:
        source = load_config(EvaluateRun, None, [f"data.train={json.dumps(data)}"]).data
        documents = (text for part in source.train for text, _ in read_documents(part, source, Counts()))
        parts: list[str] = []
        while sum(map(len, parts)) < 8 * max(lengths) and (document := next(documents, None)) is not None:
            parts += document_texts(document)
        text = "\n\n".join(parts)
    found = search(model, tokenizer, lengths, DEPTHS, trials, text)
    if json_output:
        rows = [{"length": f.length, "depth": f.depth, "accuracy": f.accuracy} for f in found]
        print(json.dumps({"chance": 1 / CHOICES, "trials": trials, "found": rows}))
        return
    table = Table("tokens", *(f"depth {depth:.0%}" for depth in DEPTHS), title=f"right word of {CHOICES}: {model_dir}")
    for length in lengths:
        table.add_row(f"{length:,}", *(f"{f.accuracy:.0%}" for f in found if f.length == length))
    Console().print(table)
    Console().print(f"{trials} trials each; chance is {1 / CHOICES:.1%}", highlight=False)
