"""`minimoe pretrain`: a model from scratch on plain text, or one that is there already on more."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from minimoe.config import ContextConfig, PretrainRun
from minimoe.data.loader import open_data
from minimoe.errors import UserError
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.tokenizer import boundary_id, load_tokenizer, set_chat_template
from minimoe.train.loop import fit
from minimoe.train.new_weights import draw, has_none, without_weights
from minimoe.train.objectives import next_token
from minimoe.train.parallel import make_accelerator
from minimoe.train.preflight import check_vocab_size
from minimoe.train.sft import start_from


def run(config: PretrainRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train, config.parallel)
    model: Any
    if config.init_from is not None:
        model, tokenizer = start_from(config.init_from, config, None, whole=config.parallel is None)
        if config.context is not None:
            model = lengthened(model, config.context)
    else:
        tokenizer = load_tokenizer(config.tokenizer_source)
        set_chat_template(tokenizer, config.chat_template)
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer)
        if config.parallel is None:
            draw(model)
    data = partial(open_data, config.data, tokenizer, config.encoding, config.seed)
    return fit(config, model, tokenizer, data, next_token, accelerator, resume=resume, overwrite=overwrite)


def lengthened(model: MiniMoeForCausalLM, context: ContextConfig) -> MiniMoeForCausalLM:
    """The model with more positions: the same weights, and rotary angles scaled to the new length.

    Raises:
        UserError: it has as many already, or its angles are scaled already.
    """
    old = model.config.max_position_embeddings
    rope = dict(model.config.rope_parameters or {})
    if context.length <= old:
        raise UserError(f"context.length {context.length} is not more than the model's {old}", fix="raise it")
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"the model's rotary angles are scaled already ({rope['rope_type']}, {old} positions)",
            fix="start from the model before that",
        )
    values = model.config.to_dict()
    rope["rope_theta"] = context.rope_theta or rope.get("rope_theta", 10_000.0)
    if context.rope_type != "default":
        rope |= {"rope_type": context.rope_type, "factor": context.length / old}
        rope["original_max_position_embeddings"] = old
    values |= {"max_position_embeddings": context.length, "rope_parameters": rope}
    longer = without_weights(MiniMoeConfig(**values))
    if not has_none(model):
        draw(longer)
        longer.load_state_dict(model.state_dict())
    longer.generation_config = model.generation_config
    return longer


def build_model(config: PretrainRun, tokenizer: Any) -> MiniMoeForCausalLM:
    """A model for this tokenizer, without weights.

    Raises:
        UserError: vocabulary too small for the tokenizer.
    """
    return _empty_model(config.model or {}, tokenizer, config.data.sequence_length, config.tokenizer_source)


def new_model(
    values: dict[str, Any], tokenizer: Any, sequence_length: int, tokenizer_source: str
) -> MiniMoeForCausalLM:
    """A freshly initialised model of an architecture, with what follows from tokenizer and data where it is not given.

    Raises:
        UserError: vocabulary too small for the tokenizer.
    """
    model = _empty_model(values, tokenizer, sequence_length, tokenizer_source)
    draw(model)
    return model


def _empty_model(
    values: dict[str, Any], tokenizer: Any, sequence_length: int, tokenizer_source: str
) -> MiniMoeForCausalLM:
    architecture = complete_architecture(values, tokenizer, sequence_length)
    check_vocab_size(architecture["vocab_size"], tokenizer, tokenizer_source)
    model = without_weights(MiniMoeConfig(**architecture))
    # Either ends a text: the end of a document, or the end of a chat turn.
    ends = {boundary_id(tokenizer), tokenizer.eos_token_id} - {None}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id
    )
    return model


def complete_architecture(values: dict[str, Any], tokenizer: Any, sequence_length: int) -> dict[str, Any]:
    """An architecture with what follows from tokenizer and data where it is not given."""
    return {
        # A multiple of 64 keeps the output projection on the fast path of every matrix library.
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "max_position_embeddings": sequence_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    } | values
