"""Architecture of a minimoe decoder: everything that decides the shapes and the function, nothing about training.

Field names follow `transformers` (Qwen3-MoE, GLM4-MoE, DeepSeek-V3), so that exporting a checkpoint is a config
rewrite. `PreTrainedConfig` accepts any keyword in silence; here unknown and contradictory keys are refused.
"""

import dataclasses
import importlib
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minimoe.errors import suggestion
from minimoe.model.costs import parameters_by_part
from minimoe.model.dispatch import DISPATCHES

# Written into config.json by transformers or accepted by every config, beside the declared fields.
_FOREIGN_KEYS = frozenset(
    "model_type auto_map architectures transformers_version torch_dtype _name_or_path name_or_path "
    "_commit_hash num_labels attn_implementation _attn_implementation _attn_implementation_internal "
    "experts_implementation _experts_implementation_internal output_attentions rope_theta rope_scaling "
    "partial_rotary_factor quantization_config".split()
)

# For who opens a folder of ours without `import minimoe` first, and allows it to: it carries no code but the import.
_LOADER = "minimoe_classes"
_LOADER_TEXT = '''"""Lets `transformers` open this folder with trust_remote_code=True, where minimoe is installed."""

from minimoe.model.language_model import *
'''
_AUTO_MAP = {
    "AutoConfig": "MiniMoeConfig",
    "AutoModel": "MiniMoeModel",
    "AutoModelForCausalLM": "MiniMoeForCausalLM",
    "AutoModelForSequenceClassification": "MiniMoeForSequenceClassification",
    "AutoModelForTokenClassification": "MiniMoeForTokenClassification",
}
_UNKNOWN = "unknown key"
_AT_LEAST_ONE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "max_position_embeddings num_experts num_experts_per_tok moe_intermediate_size".split()
)
# Far beyond any small model, and built or refused in seconds: a wrong figure must not fill the memory.
MAX_LAYERS = 1000
_MAX_PARAMETERS = 10**12
_MAX_POSITIONS = 1 << 31
_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_NOT_NEGATIVE = (
    "n_shared_experts num_zero_computation_experts first_k_dense_replace attention_dropout router_aux_loss_coef "
    "router_z_loss_coef router_entropy_loss_coef router_bias_update_rate".split()
)


class MiniMoeConfig(PreTrainedConfig):
    """Shapes and switches of `MiniMoeForCausalLM`.

    Layers below `first_k_dense_replace` have a dense SwiGLU of width `intermediate_size`; all others have
    `num_experts` SwiGLU experts of width `moe_intermediate_size` of which each token uses `num_experts_per_tok`,
    and `n_shared_experts` more that every token uses. `first_k_dense_replace = num_hidden_layers` is a dense model.

    Raises:
        ValueError: an unknown key or a contradiction; all of them are listed.
    """

    model_type = "minimoe"
    # What `Trainer` does not hand to compute_metrics: everything but the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = (
        "cache past_key_values aux_loss router_logits lm_loss load_balancing_loss router_z_loss "
        "router_entropy_loss expert_counts expert_probabilities router_confidence".split()
    )
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "num_experts",
        "n_routed_experts": "num_experts",
    }
    auto_map: ClassVar[dict[str, str]] = {}
    # Which part of a layer tensor, expert and pipeline parallelism put where.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    } | {
        f"layers.*.mlp.{part}_proj": "rowwise" if part.endswith("down") else "colwise"
        for part in ("gate", "up", "down", "shared_experts.gate", "shared_experts.up", "shared_experts.down")
    }
    base_model_ep_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["x"], ["x"]),
        "norm": (["x"], ["x"]),
    }

    vocab_size: int = 6400  # entries of the embedding; in a training config: from the tokenizer
    hidden_size: int = 512  # width of the residual stream
    num_hidden_layers: int = 8  # layers, the dense ones included
    num_attention_heads: int = 8  # query heads
    num_key_value_heads: int = 2  # key and value heads, shared by groups of query heads
    head_dim: int | None = None  # null: hidden_size / num_attention_heads
    intermediate_size: int = 1408  # of dense layers
    hidden_act: Literal["silu"] = "silu"  # activation of the SwiGLU
    max_position_embeddings: int = 2048  # positions; in a training config: data.sequence_length
    rope_parameters: dict | None = None  # transformers' rope_parameters; null: default RoPE with theta 10000
    rms_norm_eps: float = 1e-6  # added to the mean square
    initializer_range: float = 0.02  # standard deviation of new weights
    attention_dropout: float = 0.0  # share of attention probabilities dropped in training
    use_qk_norm: bool = True  # RMS norm of each head's queries and keys; false only for models from elsewhere
    tie_word_embeddings: bool = True  # input and output embeddings are one matrix
    use_cache: bool = True  # transformers' generate keeps keys and values

    num_experts: int = 4  # experts of each MoE layer
    num_experts_per_tok: int = 2  # experts that a token uses
    moe_intermediate_size: int = 1408  # width of an expert
    n_shared_experts: int = 0  # experts that every token uses, beside the chosen ones
    first_k_dense_replace: int = 0  # dense layers at the bottom
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"  # of the router; sigmoid has a selection bias
    norm_topk_prob: bool = True  # the weights of the chosen experts sum to 1
    routed_scaling_factor: float = 1.0  # all weights times this
    router_type: Literal["top_k", "noisy_top_k", "top_p", "expert_choice", "hash"] = "top_k"  # see router.py
    router_top_p: float = 0.4  # top_p only: probability that the chosen experts have together
    num_zero_computation_experts: int = 0  # more choices of the router, which give a token back as it is
    train_dispatch: str = "replicated"  # path in training, see dispatch.py
    eval_dispatch: str = "grouped"  # path in evaluation and generation

    router_aux_loss_coef: float = 0.01  # weight of the load-balancing loss, 0 = off
    router_aux_loss_type: Literal["batch", "sequence", "global"] = "global"  # balance over what
    router_z_loss_coef: float = 0.0  # weight of the router z-loss, 0 = off
    router_entropy_loss_coef: float = 0.0  # weight of the router's entropy, which makes it sure of itself, 0 = off
    router_bias_update_rate: float = 0.0  # sigmoid only: step of the selection bias per optimizer step, 0 = off
    frozen_experts: dict | None = None  # experts that training leaves as they are: {layer: [numbers]}; null: none
    output_router_logits: bool = False  # the model returns the router's logits too, as in transformers

    pad_token_id: int | None = None  # these three: in a training config from the tokenizer
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        problems = architecture_problems({**values, **kwargs})
        if problems:
            raise ValueError("; ".join(f"{key}: {problem}" for key, problem in problems.items()))
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.n_shared_experts:
            plan = self.base_model_tp_plan
            self.base_model_tp_plan = {part: way for part, way in plan.items() if "shared" not in part}  # type: ignore[misc]
        kwargs.pop("auto_map", None)  # it is for who opens a file; a model in memory is looked for in no folder
        super().__post_init__(**kwargs)
        importlib.import_module("minimoe.model.language_model")  # which tells transformers what to make of this config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. Keys that are no misspelled ones, which tools set on any config, are kept and named."""
        # What is there was not misspelled.
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in config_dict]
        foreign = [key for key in unknown_keys(config_dict) if not suggestion(key, missing)]
        if foreign:
            warnings.warn(f"minimoe does not read {', '.join(foreign)} of config.json", stacklevel=2)
        made = super().from_dict({key: config_dict[key] for key in config_dict if key not in foreign}, **kwargs)
        for key in foreign:
            setattr(made[0] if isinstance(made, tuple) else made, key, config_dict[key])
        return made

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers, after the module that config.json names for `trust_remote_code`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{_LOADER}.py").write_text(_LOADER_TEXT, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the classes of `_LOADER` named."""
        return {**super().to_dict(), "auto_map": {auto: f"{_LOADER}.{name}" for auto, name in _AUTO_MAP.items()}}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing is left to do: every folder names its classes."""

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router."""
        return max(self.num_hidden_layers - self.first_k_dense_replace, 0)

    @property
    def num_router_outputs(self) -> int:
        """Choices of a router: the experts, and those that compute nothing."""
        return self.num_experts + self.num_zero_computation_experts


def unknown_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys that neither minimoe nor transformers knows: {key: what may have been meant}."""
    fields = sorted(field.name for field in dataclasses.fields(MiniMoeConfig))
    known = {*fields, *_FOREIGN_KEYS, *MiniMoeConfig.attribute_map}
    known |= set(GenerationConfig._get_default_generation_params())
    return {key: _UNKNOWN + suggestion(key, fields) for key in values if key not in known}


def architecture_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with these config values: {key: rule that is broken}, empty when nothing is.

    Defaults stand in for keys that are not given, so a partial mapping (a YAML section) can be checked too.
    """
    fields = {field.name: field for field in dataclasses.fields(MiniMoeConfig)}
    hints = {name: hint for name, hint in MiniMoeConfig.__annotations__.items() if name in fields}
    problems = unknown_keys(values)
    for key, value in values.items():
        if key in hints and not _has_type(value, hints[key]):
            problems[key] = f"expected {_spell(hints[key])}, got {value!r}"
    if problems:
        return problems

    get: dict[str, Any] = {name: field.default for name, field in fields.items()} | dict(values)
    for key in _AT_LEAST_ONE:
        if get[key] < 1:
            problems[key] = f"must be at least 1, got {get[key]}"
    for key in _NOT_NEGATIVE:
        if get[key] < 0:
            problems[key] = f"must not be negative, got {get[key]}"
    for key in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
        if not 0 < get[key] < float("inf"):
            problems[key] = f"must be a positive number, got {get[key]}"
    if get["head_dim"] is not None and get["head_dim"] < 1:
        problems["head_dim"] = f"must be at least 1, got {get['head_dim']}"
    for key, most in (("num_hidden_layers", MAX_LAYERS), ("max_position_embeddings", _MAX_POSITIONS)):
        if get[key] > most:
            problems[key] = f"must be at most {most}, got {get[key]}"
    problems.update(_token_id_problems(get))
    if not _has_type(get.get("num_labels", 2), int) or get.get("num_labels", 2) > 1000:  # a name is made for each
        problems["num_labels"] = f"must be at most 1000, got {get['num_labels']!r}"
    if problems:
        return problems
    if num_parameters(get) > _MAX_PARAMETERS:
        return {"hidden_size": f"with it the model has more than {_MAX_PARAMETERS:.0e} parameters"}

    if get["head_dim"] is None and get["hidden_size"] % get["num_attention_heads"]:
        problems["num_attention_heads"] = (
            f"{get['num_attention_heads']} heads do not divide hidden_size {get['hidden_size']}; "
            "set head_dim or change one"
        )
    elif (get["head_dim"] or get["hidden_size"] // get["num_attention_heads"]) % 2:
        problems["head_dim"] = "must be even, rotary embeddings turn pairs"
    if get["num_attention_heads"] % get["num_key_value_heads"]:
        problems["num_key_value_heads"] = (
            f"{get['num_key_value_heads']} does not divide num_attention_heads {get['num_attention_heads']}"
        )
    if get["num_experts_per_tok"] > get["num_experts"]:
        problems["num_experts_per_tok"] = (
            f"{get['num_experts_per_tok']} experts per token, but there are only num_experts = {get['num_experts']}"
        )
    if get["first_k_dense_replace"] > get["num_hidden_layers"]:
        problems["first_k_dense_replace"] = f"more than num_hidden_layers = {get['num_hidden_layers']}"
    if get["router_bias_update_rate"] and get["scoring_func"] != "sigmoid":
        problems["router_bias_update_rate"] = "a selection bias exists only with scoring_func: sigmoid"
    if get["attention_dropout"] >= 1:
        problems["attention_dropout"] = f"must be below 1, got {get['attention_dropout']}"
    problems.update(_router_problems(get))
    problems.update(_rope_problems(get))
    problems.update(_dispatch_problems(get))
    return problems


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture with what it leaves out."""
    return {field.name: field.default for field in dataclasses.fields(MiniMoeConfig)} | dict(values)


def num_parameters(values: Mapping[str, Any], *, active: bool = False) -> int:
    """Parameters of a valid architecture, by arithmetic alone.

    Args:
        active: leave out the routed experts that a token does not choose.
    """
    return sum(parameters_by_part(with_defaults(values), active=active).values())


def _token_id_problems(get: Mapping[str, Any]) -> dict[str, str]:
    problems = {}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = get[key] if isinstance(get[key], list) else [get[key]]
        if not all(token is None or (_has_type(token, int) and 0 <= token < get["vocab_size"]) for token in ids):
            problems[key] = f"must be below vocab_size {get['vocab_size']} and not negative, got {get[key]!r}"
    return problems


def _router_problems(get: Mapping[str, Any]) -> dict[str, str]:
    problems, router = {}, get["router_type"]
    for layer, experts in (get["frozen_experts"] or {}).items():
        known = str(layer).isdigit() and get["first_k_dense_replace"] <= int(layer) < get["num_hidden_layers"]
        numbers = isinstance(experts, list) and all(_has_type(e, int) and 0 <= e < get["num_experts"] for e in experts)
        if not (known and numbers and len(set(experts)) == len(experts)):
            problems["frozen_experts"] = f"no such experts in an MoE layer: {{{layer!r}: {experts!r}}}"
    if router != "top_k" and get["scoring_func"] != "softmax":
        problems["scoring_func"] = f"router_type: {router} takes softmax, got {get['scoring_func']!r}"
    if not 0 < get["router_top_p"] <= 1:
        problems["router_top_p"] = f"must be above 0 and at most 1, got {get['router_top_p']}"
    elif router != "top_p" and get["router_top_p"] != MiniMoeConfig.router_top_p:
        problems["router_top_p"] = f"only router_type: top_p reads it, got {router!r}"
    if get["num_zero_computation_experts"] and router in ("expert_choice", "hash"):
        problems["num_zero_computation_experts"] = f"router_type: {router} cannot choose them; set it to 0"
    return problems


def _rope_problems(get: Mapping[str, Any]) -> dict[str, str]:
    """Wrong rope_parameters; `transformers` only logs a warning about most of them."""
    rope = get["rope_parameters"] or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default" and (not isinstance(rope_type, str) or rope_type not in ROPE_INIT_FUNCTIONS):
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        return {"rope_parameters": f"unknown rope_type {rope_type!r}, known: {known}"}
    missing = [key for key in _ROPE_KEYS.get(rope_type, ()) if key not in rope]
    if missing:
        return {"rope_parameters": f"rope_type {rope_type} also needs {', '.join(missing)}"}
    for key, value in (("rope_theta", get.get("rope_theta")), *rope.items()):
        numbers = value if isinstance(value, list) else [value]
        is_number = all(_has_type(number, float) and 0 < number < float("inf") for number in numbers)
        if key not in ("rope_type", "type", "truncate") and value is not None and not is_number:
            return {"rope_parameters": f"{key} must be a positive number, got {value!r}"}
    return {}


def _dispatch_problems(get: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: f"unknown dispatch {get[key]!r}, known: {', '.join(DISPATCHES)}"
        for key in ("train_dispatch", "eval_dispatch")
        if get[key] not in DISPATCHES
    }


def _has_type(value: Any, hint: Any) -> bool:
    """Whether `value` fits a hint made of int, float, bool, str, dict, list, Literal and unions of them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if arguments and origin is not list:
        return any(_has_type(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spell(hint: Any) -> str:
    """A hint in words: int | None -> 'int or None', Literal -> the choices."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if arguments and typing.get_origin(hint) is not list:
        return " or ".join(_spell(argument) for argument in arguments)
    return str(hint) if arguments else "None" if hint is type(None) else hint.__name__
