"""`minimoe tokenizer | pretrain | sft | distil | dpo | grpo | preview`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from minimoe.cli.app import OVERRIDES, Config, Overrides, Overwrite, Resume, app, large_imports
from minimoe.errors import UserError


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe tokenizer configs/quickstart/tokenizer.yaml tokenizer.vocab_size=8192",
)
def tokenizer(config: Config, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Train a byte-level BPE tokenizer on the documents of a config."""
    from minimoe.config import TokenizerRun
    from minimoe.config.file import load_config
    from minimoe.train.tokenizer import run

    run(load_config(TokenizerRun, config, overrides or ()), overwrite=overwrite)


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe pretrain configs/quickstart/pretrain.yaml train.max_steps=100 --resume",
)
def pretrain(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Train a model from scratch."""
    _train("pretrain", config, overrides, resume, overwrite)


@app.command(
    context_settings=OVERRIDES, epilog="Example: minimoe sft configs/quickstart/sft.yaml init_from=runs/mine/final"
)
def sft(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Fine-tune a model on conversations (supervised fine-tuning)."""
    _train("sft", config, overrides, resume, overwrite)


@app.command(
    context_settings=OVERRIDES, epilog="Example: minimoe distil configs/quickstart/distil.yaml distil.temperature=2"
)
def distil(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Train a student on a teacher's probabilities beside the text."""
    _train("distil", config, overrides, resume, overwrite)


@app.command(context_settings=OVERRIDES, epilog="Example: minimoe dpo configs/quickstart/dpo.yaml dpo.loss=ipo")
def dpo(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Learn from preferences: which of two answers is better (DPO, IPO, SimPO, ORPO), or which are wanted (KTO)."""
    _train("dpo", config, overrides, resume, overwrite)


@app.command(context_settings=OVERRIDES, epilog="Example: minimoe grpo configs/quickstart/grpo.yaml grpo.group_size=16")
def grpo(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Learn from rewards, Python functions of the model's own answers (GRPO, Dr. GRPO, CISPO)."""
    _train("grpo", config, overrides, resume, overwrite)


@app.command(context_settings=OVERRIDES, epilog="Example: minimoe preview configs/quickstart/sft.yaml --count 5")
def preview(
    config: Config,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="examples to print")] = 3,
) -> None:
    """Print the first examples as the trainer sees them: learned tokens coloured, masked ones dim."""
    from minimoe.config import TrainingRun
    from minimoe.config.file import load_config

    with large_imports():
        loaded = load_config(TrainingRun, config, overrides or ())
        from minimoe.data.preview import run

    run(loaded, count)


def _train(stage: str, config: Path, overrides: list[str] | None, resume: bool, overwrite: bool) -> None:
    """Run a training stage: its config and its module go by its name."""
    if resume and overwrite:
        raise UserError("both --resume and --overwrite are given", fix="give the one you mean")
    from minimoe.config.file import TRAINING_RUNS, load_config

    with large_imports():  # a config with an architecture needs transformers too
        loaded = load_config(TRAINING_RUNS[stage], config, overrides or ())
        module = importlib.import_module(f"minimoe.train.{stage}")
    module.run(loaded, resume=resume, overwrite=overwrite)
