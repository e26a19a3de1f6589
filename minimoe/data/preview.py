"""`minimoe preview`: the first rows exactly as the trainer sees them; of preferences, both answers apart.

Learned tokens are coloured (two shades in turn, so that token borders show), masked ones dim. A token is
learned if the loss predicts it, that is if its label is not IGNORE_INDEX.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from minimoe.config import GrpoRun, TrainingRun
from minimoe.data.batch import Batch
from minimoe.data.formats import left_aside
from minimoe.data.loader import open_data
from minimoe.data.pairs import PairBatch
from minimoe.data.prompts import open_prompts, prompt_at
from minimoe.model.losses import IGNORE_INDEX
from minimoe.tokenizer import load_tokenizer, set_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED_STYLES = ("green", "cyan")
MASKED_STYLE = "dim"


def run(config: TrainingRun, count: int = 3, console: Console | None = None) -> None:
    """Print the first `count` training rows of a run and their share of learned tokens."""
    console = console or Console()
    tokenizer = load_tokenizer(config.tokenizer_source)
    set_chat_template(tokenizer, config.chat_template)
    if isinstance(config, GrpoRun):
        _show_prompts(config, tokenizer, count, console)
        return
    data = open_data(config.data, tokenizer, config.encoding, config.seed)
    titles = ("chosen", "rejected") if config.encoding == "pairs" else ("", "answer to another prompt")
    loader = data.train
    count = min(count, loader.rows_per_epoch)
    batch = loader.batch(step=0, batch_size=count)

    for number in range(count):
        real = batch.attention_mask[number].bool()
        ids = batch.input_ids[number][real].tolist()
        labels = batch.labels[number][real].tolist()
        positions = batch.position_ids[number][real].tolist()
        learned = [label != IGNORE_INDEX for label in labels]
        console.print(Rule(f"row {number}"))
        for title, part in _parts(batch, number, len(ids), titles):
            if title:
                console.print(title, style="bold", markup=False, highlight=False)
            console.print(_colour(ids[part], learned[part], tokenizer))
        console.print(
            f"{len(ids)} tokens, {positions.count(0)} documents or parts, {len(real) - len(ids)} padding, "
            f"{sum(learned) / len(ids):.0%} learned",
            highlight=False,
        )
    for name, value in left_aside(config.data.train, data.ignored).items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    total, share = int(batch.attention_mask.sum()), int((batch.labels != IGNORE_INDEX).sum())
    console.print(Rule())
    console.print(
        f"{loader.rows_per_epoch:,} rows of {config.data.sequence_length} tokens per epoch; "
        f"learned in these {count} rows: {share / total:.0%}",
        highlight=False,
    )


def _show_prompts(config: GrpoRun, tokenizer: PreTrainedTokenizerBase, count: int, console: Console) -> None:
    """What is asked, and what a reward gets to know of it."""
    prompts = open_prompts(config.data, tokenizer, config.seed, config.grpo.max_new_tokens, config.grpo.eval_prompts)
    for number in range(min(count, len(prompts.train))):
        prompt = prompt_at(prompts.train, number, config.seed)
        console.print(Rule(f"prompt {number}"))
        console.print(_colour(prompt.token_ids, [False] * len(prompt.token_ids), tokenizer))
        for name, value in prompt.row.items():
            if name not in ("prompt", "messages", "conversations"):
                console.print(f"{name}: {value}", markup=False, highlight=False)
    console.print(Rule())
    console.print(
        f"{len(prompts.train):,} prompts, {len(prompts.held_out):,} held out, {prompts.counts['dropped']:,} too long; "
        f"{config.grpo.group_size} answers to each",
        highlight=False,
    )


def _parts(batch: Batch, row: int, length: int, titles: tuple[str, str]) -> Iterator[tuple[str, slice]]:
    """The row as it is shown: whole, or the parts of its pairs with their titles."""
    if not isinstance(batch, PairBatch):
        yield "", slice(length)
        return
    parts = batch.parts[row][:length].tolist()
    for number in sorted(set(parts)):
        pair, side = divmod(number - 1, 2)
        label = "wanted" if batch.wanted[row, pair] else "unwanted"
        start = parts.index(number)
        yield f"[{pair + 1}] {titles[side] or label}", slice(start, start + parts.count(number))


def _colour(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row as text. A character whose bytes are several tokens is shown with the last of them."""
    text = Text()
    pending: list[int] = []
    for number, (token, flag) in enumerate(zip(ids, learned, strict=True)):
        pending.append(token)
        shown = tokenizer.decode(pending)
        incomplete = shown.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4
        if not incomplete or number + 1 == len(ids):
            text.append(shown, style=LEARNED_STYLES[number % 2] if flag else MASKED_STYLE)
            pending = []
    return text
