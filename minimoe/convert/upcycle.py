"""`minimoe upcycle`: a dense model as an MoE that computes the same function, to train on (arXiv 2212.05055).

Every expert begins as a copy of the layer's feed-forward network. The chosen experts' weights sum to 1, so whatever the
router chooses, their sum is that network.

Experts may also be slices of it (`slices` = G > 1, arXiv 2410.07524): expert G*c + s is the s-th slice of copy c. The
G slices of a copy begin with the same row of the router, so that they are chosen together; each then has 1/G of the
copy's weight, for which its last matrix is multiplied by G.

E experts, k experts per token, D hidden, F dense width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from minimoe.convert.export import new_folder, set_dtype
from minimoe.convert.imports import open_foreign, save
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
from minimoe.errors import UserError
from minimoe.folder import read_object
from minimoe.loading import load_model, model_folder
from minimoe.model.config import MiniMoeConfig, architecture_problems, num_parameters
from minimoe.model.feed_forward import SwiGLU
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.moe import MoEFeedForward


@torch.no_grad()
def upcycled(
    dense: MiniMoeForCausalLM,
    num_experts: int,
    num_experts_per_tok: int,
    *,
    slices: int = 1,
    first_k_dense: int = 0,
    seed: int = 0,
) -> MiniMoeForCausalLM:
    """An MoE that computes what `dense` does.

    Args:
        slices: experts that a copy of the dense network is cut into.
        first_k_dense: layers at the bottom that stay dense.
        seed: of the router's weights.

    Raises:
        UserError: the numbers do not fit each other or the model.
    """
    config = _moe_config(dense.config, num_experts, num_experts_per_tok, slices, first_k_dense)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = MiniMoeForCausalLM(config).to(dense.dtype)
    own = model.state_dict()
    own.update({key: value for key, value in dense.state_dict().items() if key in own})
    model.load_state_dict(own)
    for layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
        if isinstance(layer.mlp, MoEFeedForward):
            assert isinstance(dense_layer.mlp, SwiGLU)
            _fill(layer.mlp, dense_layer.mlp, slices)
    model.generation_config = dense.generation_config
    return model.eval()


@torch.no_grad()
def add_noise(model: MiniMoeForCausalLM, amount: float, seed: int) -> None:
    """Gaussian noise on the experts, so that they differ from the first step on.

    Args:
        amount: its standard deviation, in those of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoEFeedForward):
            for stack in layer.mlp.experts.parameters():
                noise = torch.randn(stack.shape, generator=generator)
                stack.add_(amount * stack.float().std() * noise)


def upcycle_folder(
    model_dir: str,
    out: str,
    num_experts: int,
    num_experts_per_tok: int,
    *,
    noise: float = 0.0,
    allow_pickle: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[MiniMoeConfig, Receipt, float]:
    """Write an MoE made of a dense model folder, ours or one that `minimoe import` knows.

    Returns:
        Its config; the receipt, without noise; and by how much the noise moves a logit.
    """
    folder = model_folder(model_dir)
    if read_object(folder / "config.json").get("model_type") == "minimoe":
        dense, tokenizer = load_model(folder, "cpu")
        dtype = dense.dtype
    else:
        dense, stock, tokenizer = open_foreign(model_dir, allow_pickle)
        dtype = stock.config.dtype or torch.float32
    set_dtype(dense, torch.float32)
    model = upcycled(dense, num_experts, num_experts_per_tok, seed=seed, **options)
    with new_folder(out) as target:
        receipt = compare((dense, tokenizer), (model, tokenizer))
        refuse_unequal(receipt, "the MoE")
        prompts = token_ids(tokenizer)
        before = all_logits(model, prompts)
        if noise:
            add_noise(model, noise, seed)
        save(model, tokenizer, target, dtype)
        reloaded, _ = load_model(target, "cpu", torch.float32)
        moved = largest_difference(all_logits(reloaded, prompts), before)
        size = folder_bytes(target)
    return model.config, replace(receipt, num_bytes=size), moved


def _moe_config(dense: MiniMoeConfig, num_experts: int, k: int, slices: int, first_k_dense: int) -> MiniMoeConfig:
    if dense.num_moe_layers:
        raise UserError("the model has experts already", fix="give a dense one")
    for name, number in (("--num-experts", num_experts), ("--num-experts-per-tok", k)):
        if number % slices:
            raise UserError(
                f"{name} {number} is no multiple of --slices {slices}", fix="each copy has that many experts"
            )
    if dense.intermediate_size % slices:
        raise UserError(f"--slices {slices} does not divide the dense width {dense.intermediate_size}")
    if first_k_dense >= dense.num_hidden_layers:
        raise UserError(f"--first-k-dense {first_k_dense} leaves none of {dense.num_hidden_layers} layers to upcycle")
    values = {
        key: value
        for key, value in dense.to_dict().items()
        if key not in ("model_type", "architectures", "transformers_version", "dtype")
    }
    values |= {
        "num_experts": num_experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": dense.intermediate_size // slices,
        "first_k_dense_replace": first_k_dense,
        "norm_topk_prob": True,  # weights that sum to 1 are what makes the functions equal
        "n_shared_experts": 0,
        "routed_scaling_factor": 1.0,
    }
    problems = architecture_problems(values)
    if problems:
        raise UserError("; ".join(f"{key}: {problem}" for key, problem in problems.items()))
    return MiniMoeConfig(**values)


def _fill(block: MoEFeedForward, dense: SwiGLU, slices: int) -> None:
    """Copies of the dense network, or of its slices, into the experts (E, 2F/G, D) and (E, D, F/G)."""
    experts, width = block.experts, dense.down_proj.weight.shape[1] // slices
    rows = block.gate.weight[: len(experts) // slices]  # one of the router for each copy
    block.gate.weight.copy_(rows.repeat_interleave(slices, dim=0))
    for e in range(len(experts)):
        part = slice(e % slices * width, (e % slices + 1) * width)
        experts.gate_up_proj[e] = torch.cat((dense.gate_proj.weight[part], dense.up_proj.weight[part]))
        experts.down_proj[e] = slices * dense.down_proj.weight[:, part]


def run(model_dir: str, out: str, *, json_output: bool, **options: Any) -> None:
    """`minimoe upcycle`: write, check and print."""
    config, receipt, moved = upcycle_folder(model_dir, out, **options)
    values = config.to_dict()
    total, active = num_parameters(values), num_parameters(values, active=True)
    noise = options.get("noise")
    if json_output:
        facts: dict[str, Any] = {
            "out": out,
            "parameters": total,
            "active_parameters": active,
            "noise_difference": moved,
        }
    else:
        facts = {"written": out, "parameters": f"{total:,}, {active:,} active per token"}
        if noise:
            facts["noise"] = f"{noise:g} moves a logit by up to {moved:.1e}"
    show(
        receipt, f"{model_dir} as an MoE, before any noise" if noise else f"{model_dir} as an MoE", json_output, **facts
    )
