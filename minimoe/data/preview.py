"""`minimoe preview`: the first rows exactly as the trainer sees them.

Learned tokens are coloured (two shades in turn, so that token borders show), masked ones dim. A token is
learned if the loss predicts it, that is if its label is not IGNORE_INDEX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from minimoe.config import TrainingRun
from minimoe.data.formats import left_aside
from minimoe.data.loader import open_data
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
    data = open_data(config.data, tokenizer, config.encoding, config.seed)
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
        console.print(_colour(ids, learned, tokenizer))
        console.print(
            f"{len(ids)} tokens, {positions.count(0)} documents or parts, {len(real) - len(ids)} padding, "
            f"{sum(learned) / len(ids):.0%} learned",
            highlight=False,
        )
    for name, value in left_aside(config.data.train, data.ignored).items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    total, share = int(batch.attention_mask.sum()), int(batch.num_items())
    console.print(Rule())
    console.print(
        f"{loader.rows_per_epoch:,} rows of {config.data.sequence_length} tokens per epoch; "
        f"learned in these {count} rows: {share / total:.0%}",
        highlight=False,
    )


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
