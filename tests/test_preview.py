from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from minimoe.config import PretrainRun, SftRun
from minimoe.data import preview

TRAIN = {"max_steps": 1}


def show(config, count=2, colour=False) -> str:
    console = Console(file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None, width=200)
    preview.run(config, count, console)
    return console.file.getvalue()


@pytest.fixture
def sft_run(write_jsonl, tmp_path, tiny_tokenizer_dir):
    path = write_jsonl([{"prompt": "Where is the cat?", "completion": "On the [bold]mat[/bold] 😀"}])
    data = {"train": str(path), "cache_dir": str(tmp_path / "cache"), "sequence_length": 96}
    values = {"output_dir": "x", "init_from": str(tiny_tokenizer_dir), "data": data, "train": TRAIN}
    return SftRun.model_validate(values)


def test_the_preview_shows_rows_as_the_trainer_sees_them(sft_run):
    shown = show(sft_run)
    assert "<|im_start|>user\nWhere is the cat?<|im_end|>" in shown
    assert "On the [bold]mat[/bold] 😀<|im_end|>" in shown
    assert "1 documents or parts" in shown
    assert "% learned" in shown
    assert "1 rows of 96 tokens per epoch" in shown


def test_learned_tokens_are_coloured_and_masked_ones_dim(sft_run):
    shown = Text.from_ansi(show(sft_run, colour=True))
    question, answer = shown.plain.index("<|im_start|>user"), shown.plain.index("On the")
    end = shown.plain.index("<|im_end|>", answer) + len("<|im_end|>")
    styles = [shown.get_style_at_offset(Console(), offset) for offset in range(question, end)]
    styles = [style for style, letter in zip(styles, shown.plain[question:end], strict=True) if letter != "\n"]
    border = len(styles) - (end - answer)  # the answer has no line break
    assert all(style.dim and style.color is None for style in styles[:border])
    assert all(style.color is not None and not style.dim for style in styles[border:])


def test_pretraining_is_learned_but_for_document_starts(write_jsonl, tmp_path, tiny_tokenizer_dir):
    data = {
        "train": str(write_jsonl([{"text": "the cat"}])),
        "cache_dir": str(tmp_path),
        "sequence_length": 8,
    }
    values = {
        "output_dir": "x",
        "tokenizer": str(tiny_tokenizer_dir),
        "model": {},
        "data": data,
        "train": TRAIN,
    }
    shown = show(PretrainRun.model_validate(values), count=1)
    assert "<|endoftext|>the cat<|endoftext|>" in shown
    assert "80% learned" in shown
