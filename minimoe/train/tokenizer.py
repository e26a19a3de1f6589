"""`minimoe tokenizer`: byte-level BPE from the documents of a config."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from minimoe.bpe import train_bpe
from minimoe.config import TokenizerRun
from minimoe.data.formats import Counts, document_texts, left_aside, read_documents
from minimoe.errors import UserError
from minimoe.tokenizer import encode_texts

_SAMPLE_BYTES = 1_000_000  # text on which bytes per token is measured
_WRITTEN = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


def run(config: TokenizerRun, *, overwrite: bool = False) -> Path:
    """Train a tokenizer on `config.data.train`, save it in `config.output_dir` and return that folder.

    Args:
        overwrite: replace the tokenizer that the folder holds.

    Raises:
        UserError: the folder holds a tokenizer, or anything that is not a tokenizer's; or it cannot be written.
    """
    started = time.monotonic()
    folder = Path(config.output_dir)
    _refuse_used(folder, overwrite)
    sample: list[str] = []
    counts = Counts()
    tokenizer = train_bpe(_training_texts(config, sample, counts), config.tokenizer.vocab_size)
    try:
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot write the tokenizer: {error}", where=str(folder), fix="change output_dir") from None

    num_tokens = sum(len(ids) for ids in encode_texts(tokenizer, sample))
    num_bytes = sum(len(text.encode()) for text in sample)
    print(
        f"tokenizer: {len(tokenizer):,} tokens, {num_bytes / max(num_tokens, 1):.2f} bytes per token, "
        f"{time.monotonic() - started:.1f} s, saved in {folder}"
    )
    if counts.bad_rows or counts.empty_rows:
        print(f"  left out: {counts.bad_rows:,} bad rows, {counts.empty_rows:,} empty rows")
    for name, value in left_aside(config.data.train, counts.ignored).items():
        print(f"  {name}: {value}")
    if len(tokenizer) < config.tokenizer.vocab_size:
        print(f"  fewer than the {config.tokenizer.vocab_size:,} asked for: the text has no more pairs to merge")
    return folder


def _refuse_used(folder: Path, overwrite: bool) -> None:
    """A tokenizer goes into a folder of its own."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(names - _WRITTEN)
    if foreign:
        raise UserError(
            f"output_dir {folder} holds more than a tokenizer: {', '.join(foreign[:3])}",
            fix="choose another output_dir",
        )
    if names and not overwrite:
        raise UserError(
            f"output_dir {folder} already holds a tokenizer",
            fix="--overwrite replaces it (models trained with it need the old one), or choose another output_dir",
        )


def _training_texts(config: TokenizerRun, sample: list[str], counts: Counts) -> Iterator[str]:
    """Texts of the training sources up to `max_training_bytes`, under a progress bar; fills `sample`."""
    limit, used, sampled = config.tokenizer.max_training_bytes, 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading text", total=limit)
        for source in config.data.train:
            for document, _ in read_documents(source, config.data, counts):
                for text in document_texts(document):
                    data = text.encode()[: limit - used]
                    used += len(data)
                    text = data.decode(errors="ignore")  # the last text may be cut inside a character
                    if sampled < _SAMPLE_BYTES:
                        sample.append(text)
                        sampled += len(data)
                    yield text
                    progress.update(bar, completed=used)
                if used >= limit:
                    break
        progress.update(bar, description="learning merges", total=used)
        yield ""  # keeps the bar on screen until the trainer asks for more, that is until it starts merging
