"""`minimoe sft`: fine-tune a model folder on conversations; loss on the assistant's turns only."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minimoe.adapters import add_lora, is_adapter, untrained
from minimoe.config import LoraConfig, SftRun, TrainingRun
from minimoe.data.loader import open_data
from minimoe.errors import UserError
from minimoe.loading import load_minimoe, model_folder
from minimoe.tokenizer import set_chat_template
from minimoe.train.loop import fit
from minimoe.train.new_weights import open_without_weights
from minimoe.train.objectives import next_token
from minimoe.train.parallel import make_accelerator


def run(config: SftRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Fine-tune as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train, config.parallel)
    whole = config.parallel is None or config.lora is not None
    model, tokenizer = start_from(config.init_from, config, config.lora, whole=whole)
    data = partial(open_data, config.data, tokenizer, config.encoding, config.seed)
    return fit(config, model, tokenizer, data, next_token, accelerator, resume=resume, overwrite=overwrite)


def start_from(init_from: str, config: TrainingRun, lora: LoraConfig | None, whole: bool = True) -> tuple[Any, Any]:
    """The model and tokenizer that a stage goes on from, on the CPU, with new adapters where they are asked for.

    Args:
        whole: False gives a model without weights, to be sharded; but for an adapter, which has to be merged.

    Raises:
        UserError: no model there; or adapters on a model that has one already.
    """
    if whole or is_adapter(model_folder(init_from)):
        model, tokenizer = load_minimoe(init_from, device="cpu")
    else:
        model, tokenizer = open_without_weights(init_from)
    set_chat_template(tokenizer, config.chat_template)
    torch.manual_seed(config.seed)
    if lora is not None:
        base = model_folder(init_from)
        if is_adapter(base):
            raise UserError(
                "init_from is an adapter, and lora would put another on it: a folder can name one base only",
                where=init_from,
                fix="write the merged model with `minimoe merge`, and start from that",
            )
        control = {token: index for token, index in tokenizer.get_added_vocab().items() if token != tokenizer.pad_token}
        strange = [] if "control_tokens" in lora.targets else untrained(model, control)
        if strange:
            print(
                f"note: no text of the base model's had {', '.join(strange)}; "
                "if the data has, add control_tokens to lora.targets",
                file=sys.stderr,
            )
        add_lora(model, lora, base, list(control.values()))
    return model, tokenizer
