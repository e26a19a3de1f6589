"""How other architectures of `transformers` say what a `MiniMoeConfig` says, and what each of them cannot say.

Their weights have the names that ours have, so a layout is a matter of the config alone. Sources: the configs and
models of qwen3_moe, glm4_moe, qwen3 and llama in transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from minimoe.errors import UserError
from minimoe.model.config import MiniMoeConfig, architecture_problems

# What all of them have, under the same name and with the same meaning.
_COMMON = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "hidden_act max_position_embeddings rms_norm_eps initializer_range attention_dropout tie_word_embeddings use_cache "
    "pad_token_id bos_token_id eos_token_id"
).split()
_MOE = "num_experts_per_tok moe_intermediate_size norm_topk_prob".split()


class Layout(NamedTuple):
    """An architecture that another program knows."""

    model_type: str
    exported: Callable[[MiniMoeConfig], dict[str, Any]]  # its own keys, beside the common ones
    refusals: Callable[[MiniMoeConfig], list[str]]  # what of a config it cannot say
    imported: Callable[[PreTrainedConfig], dict[str, Any]]  # the same back
    foreign: Callable[[PreTrainedConfig], list[str]]  # what of its config minimoe cannot say


def stock_values(layout: Layout, config: MiniMoeConfig) -> dict[str, Any]:
    """The config of the other architecture, as keyword arguments."""
    return {key: getattr(config, key) for key in _COMMON} | layout.exported(config)


def our_config(layout: Layout, config: PreTrainedConfig) -> MiniMoeConfig:
    """The config of a model from elsewhere as ours.

    Raises:
        UserError: it has something that minimoe has not.
    """
    problems = _foreign_attention(config) + layout.foreign(config)
    if problems:
        raise UserError(
            f"minimoe has no {layout.model_type} model with {'; '.join(problems)}", fix="import one without that"
        )
    values = {key: getattr(config, key) for key in _COMMON if getattr(config, key, None) is not None}
    rope = {key: value for key, value in (config.rope_parameters or {}).items() if key != "partial_rotary_factor"}
    values |= {"rope_parameters": rope or None} | layout.imported(config)
    wrong = architecture_problems(values)
    if wrong:
        raise UserError("; ".join(f"{key}: {problem}" for key, problem in wrong.items()))
    return MiniMoeConfig(**values)


def layout_for(config: MiniMoeConfig, wanted: str | None) -> str:
    """The name of the wanted layout, or by default of the one that says all of `config`.

    Raises:
        UserError: it cannot say all, or none can.
    """
    refused = {name: layout.refusals(config) for name, layout in LAYOUTS.items()}
    if wanted is None:
        fitting = [name for name, problems in refused.items() if not problems]
        if fitting:
            return fitting[0]
        reasons = "; ".join(f"{name} has no {', no '.join(problems)}" for name, problems in refused.items())
        raise UserError(f"no architecture of transformers is this model: {reasons}", fix="--to gguf may be able to")
    if refused[wanted]:
        others = [name for name, problems in refused.items() if not problems]
        raise UserError(
            f"{wanted} has no {', no '.join(refused[wanted])}",
            fix=f"--to {others[0]}" if others else "--to gguf may be able to",
        )
    return wanted


def _qwen3_moe(config: MiniMoeConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in [*_MOE, "router_aux_loss_coef", "output_router_logits"]} | {
        "rope_parameters": config.rope_parameters,
        "num_experts": config.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.first_k_dense_replace)),
    }


def _not_qwen3_moe(config: MiniMoeConfig) -> list[str]:
    problems = _no(config, "use_qk_norm", True)
    if not config.num_moe_layers:
        return [*problems, "model without experts"]
    problems += _no(config, "scoring_func", "softmax") + _no(config, "n_shared_experts", 0)
    return problems + _no_scaling(config) + no_research_router(config)


def _from_qwen3_moe(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in [*_MOE, "num_experts", "router_aux_loss_coef"]} | {
        "first_k_dense_replace": len(config.mlp_only_layers),
    }


def no_research_router(config: MiniMoeConfig) -> list[str]:
    """What other programs cannot express of the routers that papers compare."""
    return _no(config, "router_type", "top_k") + _no(config, "num_zero_computation_experts", 0)


def _foreign_qwen3_moe(config: PreTrainedConfig) -> list[str]:
    problems = [] if config.decoder_sparse_step == 1 else [f"decoder_sparse_step {config.decoder_sparse_step}"]
    if sorted(config.mlp_only_layers) != list(range(len(config.mlp_only_layers))):
        problems.append(f"mlp_only_layers {config.mlp_only_layers}: dense layers are the first ones here")
    return problems


def _glm4_moe(config: MiniMoeConfig) -> dict[str, Any]:
    same = [*_MOE, "first_k_dense_replace", "routed_scaling_factor", "use_qk_norm"]
    return {key: getattr(config, key) for key in same} | {
        "rope_parameters": {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0},
        "n_routed_experts": config.num_experts,
        "n_shared_experts": max(config.n_shared_experts, 1),  # it always has one: of zeros, where ours has none
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
        "tie_word_embeddings": False,  # vLLM does not tie them
    }


def _not_glm4_moe(config: MiniMoeConfig) -> list[str]:
    if not config.num_moe_layers:
        return ["model without experts"]
    few = [] if config.num_experts > 1 else ["num_experts: 1"]
    return _no(config, "scoring_func", "sigmoid") + few + no_research_router(config)


def _from_glm4_moe(config: PreTrainedConfig) -> dict[str, Any]:
    same = [*_MOE, "first_k_dense_replace", "routed_scaling_factor", "use_qk_norm", "n_shared_experts"]
    return {key: getattr(config, key) for key in same} | {
        "num_experts": config.n_routed_experts,
        "scoring_func": "sigmoid",
        "router_aux_loss_coef": 0.0,  # balanced by the bias
    }


def _foreign_glm4_moe(config: PreTrainedConfig) -> list[str]:
    partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    problems = [] if partial == 1.0 else [f"partial_rotary_factor {partial}"]
    return problems + ([] if config.n_group == 1 else [f"n_group {config.n_group}"])


def _dense(config: MiniMoeConfig) -> dict[str, Any]:
    return {"rope_parameters": config.rope_parameters}


def _from_dense(use_qk_norm: bool) -> Callable[[PreTrainedConfig], dict[str, Any]]:
    return lambda config: {"first_k_dense_replace": config.num_hidden_layers, "use_qk_norm": use_qk_norm}


def _not_dense(use_qk_norm: bool) -> Callable[[MiniMoeConfig], list[str]]:
    return lambda config: (["experts"] if config.num_moe_layers else []) + _no(config, "use_qk_norm", use_qk_norm)


def _no(config: MiniMoeConfig, key: str, value: Any) -> list[str]:
    own = getattr(config, key)
    return [] if own == value else [f"{key}: {str(own).lower() if isinstance(own, bool) else own}"]


def _no_scaling(config: MiniMoeConfig) -> list[str]:
    return _no(config, "routed_scaling_factor", 1.0)


def _foreign_attention(config: PreTrainedConfig) -> list[str]:
    """What no model of ours has, whatever the architecture: most of it is off in most models."""
    problems = []
    if getattr(config, "hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config.hidden_act}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, key, False):
            problems.append(f"{key} true")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        problems.append(f"sliding_window {config.sliding_window}")
    return problems


def _nothing(config: PreTrainedConfig) -> list[str]:
    return []


LAYOUTS: Mapping[str, Layout] = {
    "qwen3-moe": Layout("qwen3_moe", _qwen3_moe, _not_qwen3_moe, _from_qwen3_moe, _foreign_qwen3_moe),
    "glm4-moe": Layout("glm4_moe", _glm4_moe, _not_glm4_moe, _from_glm4_moe, _foreign_glm4_moe),
    "qwen3": Layout("qwen3", _dense, _not_dense(True), _from_dense(True), _nothing),
    "llama": Layout("llama", _dense, _not_dense(False), _from_dense(False), _nothing),
}
