"""`minimoe export`: a model of ours in a folder that other programs open, with a receipt that it is the same model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minimoe.convert.layouts import LAYOUTS, layout_for, stock_values
from minimoe.convert.receipt import (
    Receipt,
    all_logits,
    compare,
    folder_bytes,
    largest_difference,
    refuse_unequal,
    show,
    token_ids,
)
from minimoe.errors import UserError, disk_errors
from minimoe.loading import load_model, model_folder, quiet_transformers
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_folder(
    model_dir: str, out: str, to: str | None = None, dtype: str | None = None, max_shard_size: str = "5GB"
) -> tuple[str, Receipt]:
    """Write a folder that stock `transformers` opens.

    Args:
        to: a name of `LAYOUTS`; None is the one that says all of the model's config.
        dtype: of the weights; None keeps the one they are saved in.

    Returns:
        The name of the layout and the receipt.

    Raises:
        UserError: the layout has no place for something in the model, or `out` is not empty.
    """
    model, tokenizer = open_ours(model_dir)
    name = layout_for(model.config, to)
    saved = model.dtype
    target = DTYPES[dtype] if dtype else saved
    prompts = token_ids(tokenizer)
    with new_folder(out) as folder:
        set_dtype(model, torch.float32)  # in which everything is compared
        unrounded = all_logits(model, prompts)
        set_dtype(model, target)
        with quiet_transformers():
            _write(model, name, folder, max_shard_size)
            tokenizer.save_pretrained(folder)
            stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        set_dtype(model, torch.float32)
        rounding = None if target == saved else largest_difference(all_logits(model, prompts), unrounded)
        other = (stock, load_tokenizer(folder))
        receipt = compare((model, tokenizer), other, rounding=rounding, num_bytes=folder_bytes(folder))
        refuse_unequal(receipt, f"the {name} folder")
    return name, receipt


def open_ours(model_dir: str) -> tuple[MiniMoeForCausalLM, Any]:
    """A minimoe model in the dtype it is saved in, and its tokenizer.

    Raises:
        UserError: no model folder of ours.
    """
    model, tokenizer = load_model(model_dir, "cpu")
    if not isinstance(model, MiniMoeForCausalLM):
        kind = model.config.model_type
        raise UserError(f"a {kind} model already", where=model_dir, fix="give a folder trained by minimoe")
    return model, tokenizer


def set_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters; the selection bias stays in float32, where it chooses experts."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end, if nothing went wrong.

    Raises:
        UserError: `out` holds something.
        StorageError: it cannot be written.
    """
    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder", fix="choose another or remove it")
    with disk_errors("the model", target, again="start the same command again"):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.parent / f".{target.name}-{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
            if target.exists():
                target.rmdir()
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write(model: MiniMoeForCausalLM, name: str, folder: Path, max_shard_size: str) -> None:
    """config.json, generation_config.json and the weights, one tensor an expert."""
    layout, dtype = LAYOUTS[name], model.dtype
    config = AutoConfig.for_model(layout.model_type, **stock_values(layout, model.config))
    config.dtype = dtype
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = model.state_dict()
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    missing = {key: value for key, value in stock.state_dict().items() if key not in weights}
    assert all("shared_experts" in key for key in missing), sorted(missing)
    weights |= {key: torch.zeros(value.shape, dtype=dtype) for key, value in missing.items()}
    stock.load_state_dict(weights, assign=True)
    stock.generation_config = model.generation_config
    stock.save_pretrained(folder, max_shard_size=max_shard_size)
    if layout.model_type == "qwen3_moe":
        _name_experts_twice(folder / "config.json")


def _name_experts_twice(path: Path) -> None:
    """`num_experts` and `num_local_experts`: programs read the one or the other."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["num_experts"] = values["num_local_experts"]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def run(model_dir: str, out: str, *, to: str | None, json_output: bool, **options: Any) -> None:
    """`minimoe export`: write, check and print."""
    if to == "gguf":
        from minimoe.convert import gguf_file

        gguf_file.run(model_dir, out, dtype=options["dtype"], json_output=json_output)
        return
    if to is not None and to not in LAYOUTS:
        raise UserError(f"--to {to}: unknown, known: {', '.join([*LAYOUTS, 'gguf'])}")
    size = options["max_shard_size"]
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]I?B", size.upper()):
        raise UserError(f"--max-shard-size {size}: no size", fix="give one such as 500MB or 2GB")
    if options["dtype"] is not None and options["dtype"] not in DTYPES:
        raise UserError(f"--dtype {options['dtype']}: unknown, known for a folder: {', '.join(DTYPES)}")
    name, receipt = export_folder(model_dir, out, to, **options)
    facts = {"written": f"{out}, a {name} folder"} if not json_output else {"out": out, "to": name}
    show(receipt, f"{model_folder(model_dir)} exported", json_output, **facts)
