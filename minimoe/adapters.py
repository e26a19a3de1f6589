"""LoRA adapters, in the format of `peft`: small trained matrices beside a model folder that stays as it is.

An adapter folder has `adapter_config.json`, which names the base model, `adapter_model.safetensors`, the tokenizer, and
`base.json`: the fingerprint of the base's weights, so that an adapter is never put on another model unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.config import LoraConfig
from minimoe.errors import UserError
from minimoe.extras import extra
from minimoe.folder import read_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PREFIX = "base_model.model."  # of the names in a file, as `peft` has them
_ATTENTION = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj"  # modules
# Parameters. `peft` takes any *module* gate_proj, up_proj or down_proj of a stock MoE for one expert's.
_PARAMETERS = {
    "dense": tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "shared_experts": tuple(f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")),
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "router": ("mlp.gate.weight",),
}


def add_lora(model: Any, lora: LoraConfig, base: str | Path, control_tokens: Sequence[int] = ()) -> None:
    """Freeze a model and put trainable adapters on it.

    Args:
        base: the folder that the model is from, to be named in the adapter's.
        control_tokens: ids whose embeddings are trained where the targets say so.

    Raises:
        UserError: `peft` is not installed, or the model has none of the targets.
    """
    peft = extra("peft", "lora")
    parameters = [name for target in lora.targets for name in _PARAMETERS.get(target, ())]
    present = [name for name, _ in model.named_parameters()]
    parameters = [name for name in parameters if any(own.endswith(name) for own in present)]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_ATTENTION if "attention" in lora.targets else [],
        target_parameters=parameters or None,
        trainable_token_indices=_token_indices(model, control_tokens) if "control_tokens" in lora.targets else None,
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(
            f"lora.targets {', '.join(lora.targets)}: the model has nothing of them ({str(error).splitlines()[0]})",
            fix="choose others of attention, control_tokens, " + ", ".join(_PARAMETERS),
        ) from None
    config.base_model_name_or_path = os.path.abspath(os.path.expanduser(base))


def _token_indices(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """Tied embeddings are adapted at both ends by `peft` itself."""
    names = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return {name: sorted(ids) for name in names}


def untrained(model: Any, ids: Mapping[str, int]) -> list[str]:
    """Tokens that no text of the model's can have had.

    Embeddings at both ends of a model (tied) have all been pushed the same way where they were never the right token,
    and are nearly parallel; others are as short as they began.
    """
    weight = model.get_input_embeddings().weight.detach().float()
    norms = weight.norm(dim=1)
    chosen = weight[list(ids.values())] / norms[list(ids.values()), None].clamp(min=1e-9)
    alike = (chosen @ chosen.T).fill_diagonal_(0).amax(dim=1)
    short = norms < 0.5 * norms.median()
    tied = getattr(model.config, "tie_word_embeddings", False)
    return [
        token
        for (token, index), closest in zip(ids.items(), alike.tolist(), strict=True)
        if (closest > 0.99 if tied else bool(short[index]))
    ]


def has_adapter(model: Any) -> bool:
    """Whether what is trained and saved of this model is an adapter."""
    return hasattr(model, "peft_config")


def adapts_experts(model: Any) -> bool:
    """Whether adapters stand on stacked experts, whose faster forms then decline."""
    return has_adapter(model) and any(
        ".mlp.experts." in name and ".lora_" in name for name, _ in model.named_parameters()
    )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def trained_tensors(model: Any) -> dict[str, Any]:
    """The entries of the model's state that training changes: all, or the adapter's."""
    state = model.state_dict()
    if not has_adapter(model):
        return state
    tied = getattr(model.config, "tie_word_embeddings", False)
    return {
        name: tensor
        for name, tensor in state.items()
        if ".lora_" in name or ("trainable_tokens_delta" in name and not (tied and name.startswith("lm_head")))
    }


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter as `peft` does, and beside it what it belongs to.

    Args:
        weights: of the model's state; None takes them from the model.
    """
    # While a checkpoint is written, training goes on, and `peft` puts modules in and takes them out in every forward
    # pass: here nothing but the config is read of a model whose weights are given.
    ((name, config),) = model.peft_config.items()
    tensors = trained_tensors(model) if weights is None else weights
    save_file(
        {name_in_file(key, name): tensor.contiguous() for key, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    base = config.base_model_name_or_path
    (folder / BASE).write_text(json.dumps({"base": base, "sha256": fingerprint(Path(base))}, indent=1))


def name_in_file(key: str, name: str = "default") -> str:
    """What a tensor of the model's state is called in the file of the adapter of that name."""
    return _PREFIX + key.replace(f".{name}.", ".").removesuffix(f".{name}")


def load_weights(model: Any, folder: Path, name: str = "default") -> None:
    """The weights of an adapter folder, into an adapter that is on the model.

    Raises:
        UserError: they do not fit.
    """
    from peft import set_peft_model_state_dict

    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        result: Any = set_peft_model_state_dict(
            model, {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}, adapter_name=name
        )
    except KeyError as error:
        raise UserError(
            f"the adapter's weights do not fit its config: {error} is missing",
            where=str(folder),
            fix="copy the folder again",
        ) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the adapter: {reason}", where=str(folder), fix="copy the folder again") from error
    marks = (f".lora_A.{name}.", f".lora_B.{name}.", f"embed_tokens.token_adapter.trainable_tokens_delta.{name}")
    missing = [key for key in result.missing_keys if any(mark in key for mark in marks)]
    if missing or result.unexpected_keys:
        raise UserError(
            f"the adapter's weights do not fit its config or its base: {len(missing)} are missing, "
            f"{len(result.unexpected_keys)} have no place",
            where=str(folder),
            fix="copy the folder again",
        )


def base_of(folder: Path, given: str | Path | None = None) -> Path:
    """The folder of the model that an adapter belongs to.

    Args:
        given: where that model is now; None looks where it was.

    Raises:
        UserError: it is not there, or its weights are not those that the adapter was trained on.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():  # `peft` would go on to adapter_model.bin, a pickle
        raise UserError(
            f"no {ADAPTER_WEIGHTS}, and no other file is read", where=str(folder), fix="copy the folder again"
        )
    config = read_object(folder / ADAPTER_CONFIG)
    base = Path(os.path.expanduser(given or str(config.get("base_model_name_or_path"))))
    if not (base / "config.json").is_file():
        raise UserError(
            f"the adapter's base model is not in {base}",
            where=str(folder),
            fix=f"put it there, or name its folder as base_model_name_or_path in {ADAPTER_CONFIG}",
        )
    if (folder / BASE).is_file():
        expected = read_object(folder / BASE).get("sha256")
        if expected != fingerprint(base):
            raise UserError(
                f"the adapter was trained on other weights than those in {base}",
                where=str(folder),
                fix="restore that model, or train the adapter again on this one",
            )
    return base


def check_same_base(model: Any, folder: Path) -> None:
    """The adapter in a folder was trained on the base that this model is.

    Raises:
        UserError: it was another.
    """
    (config,) = model.peft_config.values()
    base = Path(config.base_model_name_or_path)
    if read_object(folder / BASE).get("sha256") != fingerprint(base):
        raise UserError(
            f"a resumed run cannot change its base: the weights in {base} are others now",
            where=str(folder),
            fix="restore that model, or start a new run with another output_dir",
        )


def put_on(model: Any, folder: Path, name: str) -> None:
    """An adapter onto its base model, beside others that may be there; `choose` says which one counts.

    Raises:
        UserError: it is broken, or does not fit.
    """
    peft = extra("peft", "lora")
    try:
        with warnings.catch_warnings():  # of a second adapter, which is wanted
            warnings.simplefilter("ignore", UserWarning)
            peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), model, adapter_name=name)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot use {ADAPTER_CONFIG}: {error}", where=str(folder), fix="copy the folder again"
        ) from None
    load_weights(model, folder, name)


def choose(model: Any, name: str | None) -> None:
    """Which of the adapters on a model counts; None: the base model alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter(name)


def merged(model: Any, folder: Path) -> Any:
    """A base model with an adapter added to its weights: the same function, and an ordinary model again.

    Raises:
        UserError: the adapter is broken, or does not fit.
    """
    peft = extra("peft", "lora")
    try:
        with warnings.catch_warnings():  # peft asks transformers by an old name
            warnings.simplefilter("ignore", FutureWarning)
            return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # peft, safetensors and torch raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the adapter: {reason}", where=str(folder), fix="copy the folder again") from error


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's weights."""
    files = sorted(folder.glob("*.safetensors"))
    return _fingerprint(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)  # every checkpoint of a run asks
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
