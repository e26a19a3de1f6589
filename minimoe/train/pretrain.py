"""`minimoe pretrain`: a model from scratch on plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from minimoe.config import PretrainRun
from minimoe.data.loader import open_data
from minimoe.errors import UserError
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.tokenizer import boundary_id, load_tokenizer
from minimoe.train.loop import fit, make_accelerator
from minimoe.train.preemption import StopRequest
from minimoe.train.run_folder import run_folder


def run(config: PretrainRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train)
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    with (
        run_folder(config, resume=resume, overwrite=overwrite, enabled=accelerator.is_main_process) as status,
        StopRequest(status.aborted) as stop,
    ):
        with accelerator.main_process_first():  # the others find the shards in the cache
            data = open_data(config.data, tokenizer, "pretrain", config.seed)
        return fit(model, tokenizer, data, config, accelerator, stop, resume=resume)


def build_model(config: PretrainRun, tokenizer: Any) -> MiniMoeForCausalLM:
    """A freshly initialised model for this tokenizer.

    Raises:
        UserError: vocabulary too small for the tokenizer, or rows longer than the model's positions.
    """
    # A multiple of 64 keeps the output projection on the fast path of every matrix library.
    rounded = -(-len(tokenizer) // 64) * 64
    architecture = {
        "vocab_size": rounded,
        "max_position_embeddings": config.data.sequence_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    } | config.model
    if architecture["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.vocab_size {architecture['vocab_size']} is smaller than the tokenizer's {len(tokenizer)} tokens",
            where=config.tokenizer,
            mend=f"leave model.vocab_size out, or set it to {rounded}",
        )
    if architecture["max_position_embeddings"] < config.data.sequence_length:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than model.max_position_embeddings "
            f"{architecture['max_position_embeddings']}",
            mend="shorten the rows or raise max_position_embeddings",
        )
    model = MiniMoeForCausalLM(MiniMoeConfig(**architecture))
    # Either ends a text: the end of a document, or the end of a chat turn.
    ends = {boundary_id(tokenizer), tokenizer.eos_token_id} - {None}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id
    )
    return model
