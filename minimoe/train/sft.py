"""`minimoe sft`: fine-tune a model folder on conversations; loss on the assistant's turns only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from minimoe.config import SftRun
from minimoe.data.loader import open_data
from minimoe.loading import load_minimoe
from minimoe.tokenizer import set_chat_template
from minimoe.train.loop import fit
from minimoe.train.objectives import next_token
from minimoe.train.parallel import make_accelerator


def run(config: SftRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Fine-tune as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train)
    model, tokenizer = load_minimoe(config.init_from, device="cpu")
    set_chat_template(tokenizer, config.chat_template)
    torch.manual_seed(config.seed)
    data = partial(open_data, config.data, tokenizer, config.stage, config.seed)
    return fit(config, model, tokenizer, data, next_token, accelerator, resume=resume, overwrite=overwrite)
