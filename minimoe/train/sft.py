"""`minimoe sft`: fine-tune a model folder on conversations; loss on the assistant's turns only."""

from __future__ import annotations

from pathlib import Path

import torch

from minimoe.config import SftRun
from minimoe.data.loader import Data, open_data
from minimoe.errors import UserError
from minimoe.loading import load_model
from minimoe.model.decoder import MiniMoeForCausalLM
from minimoe.train.loop import fit
from minimoe.train.objectives import next_token
from minimoe.train.parallel import make_accelerator


def run(config: SftRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Fine-tune as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train)
    model, tokenizer = load_model(config.init_from, device="cpu", dtype=torch.float32)
    if not isinstance(model, MiniMoeForCausalLM):
        raise UserError(
            f"init_from is a {model.config.model_type} model, sft trains minimoe models",
            where=config.init_from,
            mend="give a folder written by minimoe pretrain or minimoe sft",
        )
    torch.manual_seed(config.seed)

    def data() -> Data:
        return open_data(config.data, tokenizer, config.stage, config.seed)

    return fit(config, model, tokenizer, data, next_token, accelerator, resume=resume, overwrite=overwrite)
