"""minimind's own folders, whose code is not run: their weights as the architecture of `transformers` that they are.

Read from github.com/jingyaogong/minimind, `model/model_minimind.py`. Dense models are Llama, or Qwen3 since March 2026,
when QK-norm came. MoE models since then are Qwen3-MoE. Those of 2025 have softmax routers, experts that every token
uses, and no QK-norm. That is Qwen2-MoE whose gate of the shared experts is zero: they count half, so their last matrix
is doubled, which is exact.

E experts, D hidden, I expert width.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minimoe.errors import UserError
from minimoe.folder import read_object

_SAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps bos_token_id eos_token_id"
).split()
_PICKLE = "pytorch_model.bin"


def open_minimind(folder: Path, allow_pickle: bool) -> Any:
    """The model in float32, and in eval mode; its config's `dtype` says what the weights are saved in.

    Raises:
        UserError: the folder has no weights that may be read, or is of another layout.
    """
    values = read_object(folder / "config.json")
    weights = _weights(folder, allow_pickle)
    try:
        config, stock = _translated(values, weights)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"not one of minimind's layouts that are known here: {error}",
            where=str(folder),
            fix="known are those of April 2025 and of March 2026",
        ) from None
    config.dtype = weights["model.norm.weight"].dtype
    model = AutoModelForCausalLM.from_config(config).float().eval()
    result = model.load_state_dict({key: value.float() for key, value in stock.items()}, strict=False)
    missing = set(result.missing_keys) - {"lm_head.weight"}
    if missing or result.unexpected_keys:
        raise UserError(
            f"the weights do not fit config.json (missing: {sorted(missing)[:3]}, "
            f"unexpected: {sorted(result.unexpected_keys)[:3]})",
            where=str(folder),
        )
    return model


def _weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= load_file(file)
    elif (folder / _PICKLE).is_file():
        if not allow_pickle:
            raise UserError(
                f"the weights are in {_PICKLE}, a pickle, which can carry code",
                where=str(folder),
                fix="if you trust where it comes from: --allow-pickle (torch reads it with weights_only=True)",
            )
        weights = torch.load(folder / _PICKLE, map_location="cpu", weights_only=True)
    else:
        raise UserError("no weights: neither *.safetensors nor pytorch_model.bin", where=str(folder))
    if "model.embed_tokens.weight" not in weights and "lm_head.weight" in weights:
        weights["model.embed_tokens.weight"] = weights["lm_head.weight"]  # tied, and saved under one name
    return weights


def _translated(values: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The stock architecture's config and its weights."""
    if values.get("inference_rope_scaling"):
        raise ValueError("inference_rope_scaling true")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    qk_norm = "model.layers.0.self_attn.q_norm.weight" in weights
    common = {key: values[key] for key in _SAME} | {
        "head_dim": values.get("head_dim") or width // heads,
        "intermediate_size": values["intermediate_size"],
        "rope_parameters": {"rope_type": "default", "rope_theta": _theta(values)},
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
    }
    if not values.get("use_moe"):
        return AutoConfig.for_model("qwen3" if qk_norm else "llama", **common), weights
    k = values["num_experts_per_tok"]
    early = "n_routed_experts" in values  # 2025: a single expert's weight is not normalised
    common |= {
        "num_experts": values["n_routed_experts" if early else "num_experts"],
        "num_experts_per_tok": k,
        "moe_intermediate_size": weights["model.layers.0.mlp.experts.0.gate_proj.weight"].shape[0],
        "norm_topk_prob": values["norm_topk_prob"] and (k > 1 or not early),
    }
    stock = _stacked(weights, common["num_experts"])
    if qk_norm:
        return AutoConfig.for_model("qwen3_moe", **common), stock
    shared = values.get("n_shared_experts", 0)
    for layer in range(values["num_hidden_layers"]):
        _share(stock, f"model.layers.{layer}.mlp", shared)
    common |= {"qkv_bias": False, "shared_expert_intermediate_size": shared * common["moe_intermediate_size"]}
    return AutoConfig.for_model("qwen2_moe", **common), stock


def _theta(values: dict[str, Any]) -> float:
    """transformers 4 wrote it by itself, 5 writes it among the parameters."""
    return values.get("rope_theta") or values["rope_parameters"]["rope_theta"]


def _stacked(weights: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """experts.E.{gate,up,down}_proj.weight as gate_up_proj (E, 2I, D) and down_proj (E, D, I)."""
    stock = {key: value for key, value in weights.items() if not re.search(r"\.experts\.\d+\.", key)}
    for place in sorted({key.split(".experts.")[0] for key in weights if ".experts." in key}):
        gate, up, down = (
            torch.stack([weights[f"{place}.experts.{e}.{name}.weight"] for e in range(num_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        stock |= {f"{place}.experts.gate_up_proj": torch.cat((gate, up), 1), f"{place}.experts.down_proj": down}
    return stock


def _share(stock: dict[str, Tensor], place: str, num_shared: int) -> None:
    """Put the shared experts of a block, side by side, into the one that Qwen2-MoE has."""
    for name, axis, factor in (("gate_proj", 0, 1), ("up_proj", 0, 1), ("down_proj", 1, 2)):
        parts = [stock.pop(f"{place}.shared_experts.{s}.{name}.weight") for s in range(num_shared)]
        hidden = stock[f"{place}.gate.weight"].shape[1]
        empty = torch.zeros((0, hidden) if axis == 0 else (hidden, 0))
        stock[f"{place}.shared_expert.{name}.weight"] = factor * torch.cat(parts, axis) if parts else empty
    stock[f"{place}.shared_expert_gate.weight"] = torch.zeros(1, stock[f"{place}.gate.weight"].shape[1])
