"""`minimoe export --to gguf`: a file for llama.cpp, ollama and what is built on them, with tokenizer and chat template.

A model that Qwen3-MoE or Qwen3 can express is written as such. Any other MoE is written as `glm4moe`, for which
llama.cpp reads from the file how experts are scored, whether their weights are normalised and by what they are
multiplied, so that softmax routers with shared experts have a place too. Names and metadata: the package `gguf`, and
llama.cpp's `src/models`.

E experts, I expert width, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minimoe.bpe import SPLIT_REGEX
from minimoe.chat_template import render
from minimoe.convert.export import new_folder, open_ours, set_dtype
from minimoe.convert.layouts import LAYOUTS, no_research_router, stock_values
from minimoe.convert.receipt import (
    MESSAGES,
    NEW_TOKENS,
    PROMPTS,
    Receipt,
    all_logits,
    compare,
    folder_bytes,
    greedy,
    largest_difference,
    refuse_unequal,
    show,
    token_ids,
)
from minimoe.errors import MinimoeError, UserError
from minimoe.extras import extra
from minimoe.loading import FINAL, quiet_transformers
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_READ_BY_TRANSFORMERS = {"qwen3moe": "qwen3-moe", "qwen3": "qwen3"}
_BLOCK = 32  # values that share a scale in q8_0


def architecture(config: MiniMoeConfig) -> str:
    """What the model is called in a GGUF file.

    Raises:
        UserError: nothing there can express it.
    """
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise UserError(f"--to gguf writes no rope_type {rope}", fix="--to qwen3-moe or glm4-moe keeps it")
    if not config.num_moe_layers:
        if not config.use_qk_norm:
            raise UserError("--to gguf writes no dense model without QK-norm", fix="--to llama")
        return "qwen3"
    if problems := no_research_router(config):
        raise UserError(f"--to gguf has no {', no '.join(problems)}", fix="no program but minimoe knows this router")
    plain = config.scoring_func == "softmax" and config.norm_topk_prob and config.routed_scaling_factor == 1
    bare = not config.n_shared_experts and not config.first_k_dense_replace and config.use_qk_norm
    return "qwen3moe" if plain and bare else "glm4moe"


def export_gguf(model_dir: str, out: str, dtype: str | None = None) -> tuple[str, Receipt]:
    """Write `model-TYPE.gguf` and an ollama Modelfile into a new folder.

    Args:
        dtype: of matrices, a key of `TYPES`; None keeps the one they are saved in. Norms and routers are float32.

    Returns:
        The architecture's name there, and the receipt.

    Raises:
        UserError: the model or its tokenizer cannot be expressed, or the package gguf is not installed.
    """
    gguf = extra("gguf", "gguf")
    model, tokenizer = open_ours(model_dir)
    name = architecture(model.config)
    _check_tokenizer(tokenizer)
    saved = str(model.dtype).removeprefix("torch.")
    kind = TYPES[dtype or saved]
    set_dtype(model, torch.float32)
    prompts = token_ids(tokenizer)
    unrounded = all_logits(model, prompts)
    with new_folder(out) as folder:
        path = folder / f"model-{kind.lower()}.gguf"
        _write(gguf, path, model, tokenizer, name, kind)
        (folder / "Modelfile").write_text(_modelfile(path.name, tokenizer), encoding="utf-8")
        _read_back(gguf, path, model)  # which now has the rounded weights
        moved = largest_difference(all_logits(model, prompts), unrounded)
        facts = {"rounding": moved if kind != TYPES[saved] else None, "num_bytes": folder_bytes(folder)}
        receipt = _receipt(name, path, model, tokenizer, facts)
        refuse_unequal(receipt, "the GGUF file")
    return name, receipt


def tensors(model: MiniMoeForCausalLM) -> dict[str, Tensor]:
    """The weights by the names that the package maps; stacks of experts (E, I, D), (E, D, I). They share memory."""
    config, weights = model.config, {}
    for key, value in model.state_dict().items():
        place, _, last = key.rpartition(".")
        if last == "gate_up_proj":
            weights[f"{place}.gate_proj.weight"], weights[f"{place}.up_proj.weight"] = value.chunk(2, dim=1)
        elif last == "down_proj":
            weights[f"{key}.weight"] = value
        elif last == "e_score_correction_bias":
            weights[f"{place}.e_score_correction.bias"] = value
        elif key != "lm_head.weight" or not config.tie_word_embeddings:
            weights[key] = value
    return weights


def _glm_fillers(config: MiniMoeConfig) -> dict[str, Tensor]:
    """What every `glm4moe` has and this model lacks, so that it adds nothing: a bias, a shared expert."""
    filled = {}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        place = f"model.layers.{layer}.mlp"
        if config.scoring_func != "sigmoid":
            filled[f"{place}.gate.e_score_correction.bias"] = torch.zeros(config.num_experts)
        if not config.n_shared_experts:
            shape = (config.moe_intermediate_size, config.hidden_size)
            for part in ("gate_proj", "up_proj"):
                filled[f"{place}.shared_experts.{part}.weight"] = torch.zeros(shape)
            filled[f"{place}.shared_experts.down_proj.weight"] = torch.zeros(shape[::-1])
    return filled


def _write(gguf: Any, path: Path, model: MiniMoeForCausalLM, tokenizer: Any, name: str, kind: str) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    source = Path(config._name_or_path)
    writer.add_name(source.parent.name if source.name == FINAL else source.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"))
    _add_config(gguf, writer, config, name)
    _add_tokenizer(gguf, writer, tokenizer, config.vocab_size)
    weights = tensors(model) | (_glm_fillers(config) if name == "glm4moe" else {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[_ARCH[name]], config.num_hidden_layers)
    for key, value in weights.items():
        place, _, suffix = key.rpartition(".")
        own = f"{names.get_name(place)}.{suffix}"
        stored = getattr(gguf.GGMLQuantizationType, _stored_as(key, value, kind))
        writer.add_tensor(own, gguf.quants.quantize(value.float().contiguous().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ARCH = {"qwen3moe": "QWEN3MOE", "glm4moe": "GLM4_MOE", "qwen3": "QWEN3"}


def _stored_as(key: str, value: Tensor, kind: str) -> str:
    """llama.cpp wants vectors and routers in float32; rows of q8_0 are cut in blocks."""
    if value.dim() == 1 or key.endswith("mlp.gate.weight"):
        return "F32"
    return "F16" if kind == "Q8_0" and value.shape[-1] % _BLOCK else kind


def _add_config(gguf: Any, writer: Any, config: MiniMoeConfig, name: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    assert config.rope_parameters is not None
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if name == "qwen3":
        return
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "glm4moe":
        scores = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(scores.SIGMOID if config.scoring_func == "sigmoid" else scores.SOFTMAX)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_shared_count(max(config.n_shared_experts, 1))
        writer.add_leading_dense_block_count(config.first_k_dense_replace)


def _check_tokenizer(tokenizer: Any) -> None:
    """llama.cpp knows a way of splitting text by its name alone; ours is Qwen2's."""
    splitter = _state(tokenizer)["pre_tokenizer"] or {}
    patterns = [part.get("pattern", {}).get("Regex") for part in splitter.get("pretokenizers", [splitter])]
    if SPLIT_REGEX not in patterns:
        raise UserError(
            "--to gguf needs a tokenizer that splits text as Qwen2 does, and this one does not",
            fix="export to a folder, or train with a tokenizer made by `minimoe tokenizer`",
        )


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Any, vocab_size: int) -> None:
    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, kinds.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in _state(tokenizer)["model"]["merges"]]
    )
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(_without_marks(tokenizer.chat_template))


def _state(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json holds."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _without_marks(template: str) -> str:
    """The chat template without `{% generation %}`, which only training reads, and llama.cpp's Jinja does not know."""
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    if render(plain, MESSAGES)[0] != render(template, MESSAGES)[0]:
        raise MinimoeError("the chat template means something else without its generation marks")
    return plain


def _modelfile(name: str, tokenizer: Any) -> str:
    """For `ollama create NAME -f Modelfile`. ollama has a template language of its own: this is ChatML in it."""
    lines = [f"FROM ./{name}"]
    if "<|im_start|>" in (tokenizer.chat_template or ""):
        turn = (
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        )
        lines += [f'TEMPLATE """{turn}"""', 'PARAMETER stop "<|im_end|>"']
    return "\n".join(lines) + "\n"


@torch.no_grad()
def _read_back(gguf: Any, path: Path, model: MiniMoeForCausalLM) -> None:
    """Put what the file holds into the model, tensor by tensor.

    Raises:
        MinimoeError: one is missing.
    """
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture = gguf.MODEL_ARCH[_ARCH[reader.get_field("general.architecture").contents()]]
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for key, value in tensors(model).items():
        place, _, suffix = key.rpartition(".")
        tensor = stored.get(f"{names.get_name(place)}.{suffix}")
        if tensor is None:
            raise MinimoeError(f"the GGUF file lacks {key}")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        value.copy_(torch.tensor(values).view_as(value))


def _receipt(name: str, path: Path, model: MiniMoeForCausalLM, tokenizer: Any, facts: dict[str, Any]) -> Receipt:
    """Against transformers' reader of GGUF files, where it knows the architecture; else against llama.cpp, if it is
    here and the weights are float32, in which alone it computes as exactly; else the file was only read back."""
    if name in _READ_BY_TRANSFORMERS:
        layout = LAYOUTS[_READ_BY_TRANSFORMERS[name]]
        # It takes the tensors from the file, but not every size (5.24 leaves out the experts' width).
        config = AutoConfig.for_model(layout.model_type, **stock_values(layout, model.config))
        where = {"gguf_file": path.name, "local_files_only": True}
        with quiet_transformers():
            stock = AutoModelForCausalLM.from_pretrained(path.parent, config=config, dtype=torch.float32, **where)
            again = AutoTokenizer.from_pretrained(path.parent, **where)
        stock.generation_config = model.generation_config
        stock.eval()
        return compare((model, tokenizer), (stock, again), **facts)
    if importlib.util.find_spec("llama_cpp") and path.name.endswith("f32.gguf"):
        return _by_llama_cpp(path, model, tokenizer, facts)
    positions = sum(map(len, token_ids(tokenizer)))
    return Receipt(positions, None, 0.0, None, None, None, **facts)


def _by_llama_cpp(path: Path, model: MiniMoeForCausalLM, tokenizer: Any, facts: dict[str, Any]) -> Receipt:
    llama_cpp = importlib.import_module("llama_cpp")
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # keys and values in float32
    program = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **exact)
    prompts, logits, continued, texts = token_ids(tokenizer), [], [], []
    for ids, text in zip(prompts, PROMPTS, strict=True):
        program.reset()
        program.eval(ids)
        logits.append(torch.tensor(program.scores[: len(ids)].copy()))
        program.reset()
        stream = program.generate(ids, temp=0.0, repeat_penalty=1.0)
        continued.append(list(itertools.islice(stream, NEW_TOKENS)))
        typed = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        texts.append(program.tokenize(text.encode(), add_bos=False, special=False) == typed)
    program.close()
    expected = all_logits(model, prompts)
    equal = all(there[: len(ours)] == ours for there, ours in zip(continued, greedy(model, prompts), strict=True))
    largest = max(float(part.abs().max()) for part in expected)
    difference = largest_difference(logits, expected)
    return Receipt(sum(map(len, prompts)), difference, largest, equal, all(texts), None, **facts)


def run(model_dir: str, out: str, *, dtype: str | None, json_output: bool) -> None:
    """`minimoe export --to gguf`: write, check and print."""
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"--dtype {dtype}: unknown, known for GGUF: {', '.join(TYPES)}")
    name, receipt = export_gguf(model_dir, out, dtype)
    facts = {"out": out, "to": name} if json_output else {"written": f"{out}, a GGUF file of {name}, and a Modelfile"}
    show(receipt, f"{model_dir} exported", json_output, **facts)
