"""`minimoe sft`: fine-tune a model folder on conversations; loss on the assistant's turns only."""

from __future__ import annotations

from pathlib import Path

import torch

from minimoe.config import SftRun
from minimoe.data.loader import open_data
from minimoe.errors import UserError
from minimoe.loading import load_model
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.train.loop import fit, make_accelerator
from minimoe.train.preemption import StopRequest
from minimoe.train.run_folder import run_folder


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
    limit = model.config.max_position_embeddings
    if config.data.sequence_length > limit:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than the model's {limit} positions",
            where=config.init_from,
            mend=f"set data.sequence_length to {limit} or less",
        )
    with (
        run_folder(config, resume=resume, overwrite=overwrite, enabled=accelerator.is_main_process) as status,
        StopRequest(status.aborted) as stop,
    ):
        with accelerator.main_process_first():  # the others find the shards in the cache
            data = open_data(config.data, tokenizer, "sft", config.seed)
        torch.manual_seed(config.seed)
        return fit(model, tokenizer, data, config, accelerator, stop, resume=resume)
