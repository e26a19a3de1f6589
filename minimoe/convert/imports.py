"""`minimoe import`: a model from elsewhere as a folder of ours, with a receipt that it is the same model.

Read are the architectures of `layouts.py`, and minimind's own. A dense model becomes a dense model of ours, which
`minimoe upcycle` makes an MoE of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from minimoe.convert.export import new_folder, set_dtype
from minimoe.convert.layouts import LAYOUTS, Layout, our_config
from minimoe.convert.minimind import open_minimind
from minimoe.convert.receipt import Receipt, compare, folder_bytes, refuse_unequal, show
from minimoe.errors import UserError
from minimoe.folder import check_folder, read_object
from minimoe.loading import check_vocabulary, load_model, model_folder, quiet_transformers
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.rotary import MiniMoeRotaryEmbedding
from minimoe.tokenizer import load_tokenizer


def _from_qwen2_moe(config: PreTrainedConfig) -> dict[str, Any]:
    shared = config.shared_expert_intermediate_size / config.moe_intermediate_size
    return LAYOUTS["qwen3-moe"].imported(config) | {"use_qk_norm": False, "n_shared_experts": int(shared)}


def _foreign_qwen2_moe(config: PreTrainedConfig) -> list[str]:
    problems = LAYOUTS["qwen3-moe"].foreign(config) + (["qkv_bias true"] if config.qkv_bias else [])
    whole = config.shared_expert_intermediate_size % config.moe_intermediate_size == 0
    return problems + ([] if whole else ["shared experts that are not as wide as the others"])


_BY_TYPE = {layout.model_type: layout for layout in LAYOUTS.values()} | {
    "mistral": LAYOUTS["llama"],
    "qwen2_moe": Layout("qwen2_moe", lambda config: {}, lambda config: [], _from_qwen2_moe, _foreign_qwen2_moe),
}


def import_folder(model_dir: str, out: str, *, allow_pickle: bool = False) -> tuple[MiniMoeConfig, Receipt]:
    """Write a model folder of ours.

    Args:
        allow_pickle: read a pytorch_model.bin (minimind's folders only).

    Raises:
        UserError: the architecture, or something in it, is not known here.
    """
    model, stock, tokenizer = open_foreign(model_dir, allow_pickle)
    with new_folder(out) as folder:
        save(model, tokenizer, folder, stock.config.dtype or torch.float32)
        reloaded, again = load_model(folder, "cpu", torch.float32)
        receipt = compare((stock, tokenizer), (reloaded, again), num_bytes=folder_bytes(folder))
        refuse_unequal(receipt, "the imported folder")
    return model.config, receipt


def open_foreign(model_dir: str, allow_pickle: bool = False) -> tuple[MiniMoeForCausalLM, Any, Any]:
    """A model from elsewhere as ours, as it is, and its tokenizer; both models in float32, and they share weights.

    Raises:
        UserError: as `import_folder`.
    """
    if not Path(model_dir).expanduser().exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model_dir):
        fix = f"if it is on the hub, download it first: hf download {model_dir} --local-dir NAME"
        raise UserError(f"model folder not found: {model_dir}", fix=fix)
    folder = model_folder(model_dir)
    check_folder(folder)
    kind = read_object(folder / "config.json").get("model_type")
    if kind == "minimoe":
        raise UserError("a minimoe model already", where=str(folder))
    if kind == "minimind":
        with quiet_transformers():
            stock = open_minimind(folder, allow_pickle)
            tokenizer = load_tokenizer(folder)
        check_vocabulary(stock, tokenizer, str(folder))
    elif kind in _BY_TYPE:
        stock, tokenizer = load_model(folder, "cpu")
        dtype, stock = stock.dtype, stock.float()
        stock.config.dtype = dtype
    else:
        known = ", ".join(sorted([*_BY_TYPE, "minimind"]))
        raise UserError(f"a {kind} model cannot be imported", where=str(folder), fix=f"known: {known}")
    config = our_config(_BY_TYPE[stock.config.model_type], stock.config)
    model = _with_weights(config, _our_names(stock.state_dict(), config))
    model.generation_config = stock.generation_config
    return model, stock, tokenizer


def save(model: MiniMoeForCausalLM, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model folder of ours, its weights rounded to `dtype`."""
    set_dtype(model, dtype)
    model.config.dtype = dtype
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_weights(config: MiniMoeConfig, weights: dict[str, Tensor]) -> MiniMoeForCausalLM:
    """A model made of the tensors themselves, without random ones that they would replace."""
    with torch.device("meta"):
        model = MiniMoeForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = MiniMoeRotaryEmbedding(config)  # its tables are no weights
    return model.eval()


def _our_names(weights: dict[str, Tensor], config: MiniMoeConfig) -> dict[str, Tensor]:
    """The weights of a stock model as ours; `config` loses shared experts that add nothing.

    Raises:
        UserError: Qwen2-MoE's shared experts are weighted for each token, which ours are not.
    """
    gates = [weights.pop(key) for key in list(weights) if key.endswith("shared_expert_gate.weight")]
    if any(gate.any() for gate in gates) and config.n_shared_experts:
        raise UserError("minimoe has no qwen2_moe model with shared experts that are weighted for each token")
    for key in [key for key in weights if ".shared_expert." in key]:
        half = 0.5 if "down_proj" in key else 1  # the sigmoid of a gate of zeros
        weights[key.replace(".shared_expert.", ".shared_experts.")] = half * weights.pop(key)
    shared = [key for key in weights if ".shared_experts." in key]
    if shared and not any(weights[key].any() for key in shared):  # zeros never learn anything either
        config.n_shared_experts = 0
        for key in shared:
            del weights[key]
    return weights


def run(model_dir: str, out: str, *, json_output: bool, allow_pickle: bool) -> None:
    """`minimoe import`: write, check and print."""
    config, receipt = import_folder(model_dir, out, allow_pickle=allow_pickle)
    dense = "" if config.num_moe_layers else ", a dense model: `minimoe upcycle` makes an MoE of it"
    facts = {"out": out} if json_output else {"written": out + dense}
    show(receipt, f"{model_dir} imported", json_output, **facts)
