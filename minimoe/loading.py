"""A model folder -> model and tokenizer, or an error that says what is wrong with the folder.

`transformers` only warns about missing weights and fills them with random values; here that is an error. Weights
are read from safetensors alone and no code from the folder is ever run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from minimoe import adapters
from minimoe.device import pick_device
from minimoe.errors import UserError
from minimoe.folder import check_folder, read_object
from minimoe.model.config import MAX_LAYERS, architecture_problems, num_parameters
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.sharded_files import distinct, in_parts, read_into, read_shapes
from minimoe.tokenizer import load_tokenizer

FINAL = "final"  # folder of a run that holds the trained model
FIX = "give a folder with config.json and model.safetensors, such as RUN/final or RUN/checkpoints/step-…"


def load_model(path: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None) -> tuple[Any, Any]:
    """Open a model folder, or a run folder that has `final/`. An adapter is merged into its base model.

    Args:
        path: a local folder.
        device: `auto` is CUDA where there is one, then Apple's GPU, then the CPU.
        dtype: of the weights; None keeps the one they are saved in.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        UserError: no model folder, unreadable or incomplete weights, or a tokenizer that does not fit them.
    """
    folder = model_folder(path)
    target = pick_device(device)
    check_folder(folder)
    if adapters.is_adapter(folder):
        base, _ = load_model(adapters.base_of(folder), "cpu", dtype)
        model, tokenizer = adapters.merged(base, folder), load_tokenizer(str(folder))
        check_vocabulary(model, tokenizer, str(folder))
        return model.to(target).eval(), tokenizer
    _check_size(folder)
    with quiet_transformers():
        try:
            model, info = (_from_parts if in_parts(folder) else _from_files)(folder, dtype)
        except MemoryError:
            raise
        except Exception as error:  # transformers, safetensors and json raise a dozen kinds for a broken folder
            if isinstance(error, UserError):
                raise
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot open the model: {first_line}", where=str(folder), fix=FIX) from error
    _check_loaded(info, folder)
    _check_end_ids(model, folder)
    tokenizer = load_tokenizer(str(folder))
    check_vocabulary(model, tokenizer, str(folder))
    return model.to(target).eval(), tokenizer


def _from_files(folder: Path, dtype: torch.dtype | str | None) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or "auto",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported with the other defects
        output_loading_info=True,
    )
    return model, info


def _from_parts(folder: Path, dtype: torch.dtype | str | None) -> tuple[Any, dict[str, Any]]:
    """A checkpoint of a sharded run."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    targets, shapes = distinct(model), read_shapes(folder)
    info = {"missing_keys": targets.keys() - shapes.keys()}
    info["mismatched_keys"] = {name for name in targets.keys() & shapes.keys() if targets[name].shape != shapes[name]}
    if not any(info.values()):
        read_into(folder, targets)
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model, info


def load_minimoe(path: str | Path, device: str = "auto") -> tuple[MiniMoeForCausalLM, Any]:
    """`load_model` in float32, for what understands minimoe models only.

    Raises:
        UserError: also for another architecture.
    """
    model, tokenizer = load_model(path, device, torch.float32)
    if not isinstance(model, MiniMoeForCausalLM):
        kind = model.config.model_type
        raise UserError(
            f"a {kind} model; a minimoe model is needed", where=str(path), fix="give one trained by minimoe"
        )
    return model, tokenizer


def model_folder(path: str | Path) -> Path:
    """The folder that holds `config.json`: the given one, or its `final/`."""
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "not found"
        raise UserError(f"model folder {kind}: {folder}", fix=FIX)
    for candidate in (folder, folder / FINAL):
        if (candidate / "config.json").is_file() or adapters.is_adapter(candidate):
            return candidate
    raise UserError(f"no model in {folder}: neither config.json nor {FINAL}/config.json", fix=FIX)


def check_vocabulary(model: Any, tokenizer: Any, where: str = "") -> None:
    """Refuse a tokenizer with ids that the embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows",
            where=where,
            fix="use the tokenizer the model was trained with",
        )


def _check_size(folder: Path) -> None:
    """Refuse a config.json that describes far more than the weights hold, before memory is taken for it."""
    values = read_object(folder / "config.json")
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise UserError(f"num_hidden_layers {layers} is more than {MAX_LAYERS}", where=str(folder / "config.json"))
    if values.get("model_type") == "minimoe" and not architecture_problems(values):
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if num_bytes and num_parameters(values) > num_bytes:
            raise UserError(
                f"config.json describes {num_parameters(values):,} parameters, the weights have {num_bytes:,} bytes",
                where=str(folder),
                fix="the folder is damaged or mixed from two models, copy it again",
            )


def _check_end_ids(model: Any, folder: Path) -> None:
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = listed if isinstance(listed, list) else [listed]
    if not all(token is None or isinstance(token, int) for token in ids):
        raise UserError(
            f"eos_token_id is {listed!r}", where=str(folder / "generation_config.json"), fix="give token ids"
        )


def _check_loaded(info: dict[str, Any], folder: Path) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(kind) or ())
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{kind.removesuffix('_keys')}: {', '.join(keys[:3])}{more}")
    if problems:
        raise UserError(
            f"the weights do not fit config.json ({'; '.join(problems)})",
            where=str(folder),
            fix="the folder is damaged or mixed from two models, copy it again",
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no load report on the terminal: defects are raised instead."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
