"""`minimoe experts`: take experts out of a model, put them together or give them a new start, and see what it costs.

The result is an ordinary model folder. What a change costs is the difference of the losses on the same documents; its
interval is a bootstrap over them. L MoE layers, E experts.

    ablate   an expert of one layer no longer answers: its output weights are zero
    prune    every layer keeps its most used experts only (as in expert pruning, arXiv 2404.05089)
    merge    every layer's experts are put together in groups of those with similar routers, weighted by their use
             (as in MC-SMoE, arXiv 2310.01334)
    freeze   experts keep their weights in all later training (see train/frozen.py); of itself it changes no loss
    revive   experts with hardly a token become copies of the most used one of their layer, with a little noise
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from minimoe.data.loader import Validation
from minimoe.errors import UserError
from minimoe.evaluate.perplexity import documents_of, open_documents
from minimoe.loading import load_minimoe
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.losses import IGNORE_INDEX
from minimoe.train.checkpoint import save_weights, written_whole
from minimoe.train.guard import expert_load

_BATCH = 8
_RESAMPLES = 1000
_IDLE = 0.1  # of a fair share: what `revive` takes for dead
_NOISE = 0.02  # of a weight's standard deviation, so that a copy can become something else


@dataclass
class Measured:
    """Held-out rows of a model: R rows."""

    nats: np.ndarray  # (R,)
    tokens: np.ndarray  # (R,)
    counts: np.ndarray  # (L, E) choices

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / max(self.tokens.sum(), 1))

    @property
    def load(self) -> np.ndarray:
        """(L, E), 1 = a fair share."""
        return expert_load(torch.from_numpy(self.counts)).numpy()


@dataclass
class Change:
    """Of the loss, nats per token: new minus old, with its 95 % interval."""

    what: str
    loss: float
    change: float
    low: float
    high: float


@torch.no_grad()
def measure(model: MiniMoeForCausalLM, validation: Validation) -> Measured:
    """Loss of each row of the held-out documents, and the experts' use."""
    nats, tokens, counts = [], [], None
    model.eval()
    for batch in validation.batches(_BATCH):
        inputs = batch.to(model.device).model_inputs()
        outputs = model(**inputs, skip_logits=True, use_cache=False, logprob_temperature=1.0)
        nats.append(-outputs.token_logprobs.sum(1).double().cpu())
        tokens.append((inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1).cpu())
        counts = outputs.expert_counts if counts is None else counts + outputs.expert_counts
    assert counts is not None
    return Measured(torch.cat(nats).numpy(), torch.cat(tokens).numpy(), counts.cpu().numpy())


def compare(what: str, before: Measured, after: Measured, seed: int = 0) -> Change:
    """The change with its interval, from the same rows of both."""
    difference, tokens = after.nats - before.nats, before.tokens
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(tokens), size=(_RESAMPLES, len(tokens)))
    changes = difference[drawn].sum(1) / np.maximum(tokens[drawn].sum(1), 1)
    low, high = np.percentile(changes, [2.5, 97.5])
    return Change(what, after.loss, after.loss - before.loss, float(low), float(high))


@torch.no_grad()
def ablated(model: MiniMoeForCausalLM, layer: int, expert: int) -> MiniMoeForCausalLM:
    """The model with one expert whose output is nothing."""
    _check_expert(model, layer, expert)
    model = copy.deepcopy(model)
    _block(model, layer).experts.down_proj[expert] = 0.0
    return model


def pruned(model: MiniMoeForCausalLM, load: np.ndarray, keep: int) -> MiniMoeForCausalLM:
    """The model with each layer's `keep` most used experts, in their order."""
    _check_number(model, keep)
    groups = [[[expert] for expert in sorted(np.argsort(-row, kind="stable")[:keep].tolist())] for row in load]
    return _regrouped(model, groups, load)


def merged(model: MiniMoeForCausalLM, load: np.ndarray, keep: int) -> MiniMoeForCausalLM:
    """The model whose experts are means of groups: each joins the one of the `keep` most used whose router row is
    closest to its own by angle, and counts by its use."""
    _check_number(model, keep)
    groups = []
    for layer, row in zip(moe_layers(model), load, strict=True):
        directions = torch.nn.functional.normalize(_block(model, layer).gate.weight.detach().float(), dim=1)
        heads = sorted(np.argsort(-row, kind="stable")[:keep].tolist())
        found = {head: [head] for head in heads}
        for expert in range(len(row)):
            if expert not in found:
                found[heads[int((directions[heads] @ directions[expert]).argmax())]].append(expert)
        groups.append([found[head] for head in heads])
    return _regrouped(model, groups, load)


@torch.no_grad()
def revived(model: MiniMoeForCausalLM, load: np.ndarray, seed: int = 0) -> tuple[MiniMoeForCausalLM, int]:
    """The model whose idle experts are noisy copies of the most used of their layer, and how many they were."""
    _check_router(model)
    model, count = copy.deepcopy(model), 0
    generator = torch.Generator().manual_seed(seed)
    for layer, row in zip(moe_layers(model), load, strict=True):
        block, source = _block(model, layer), int(row.argmax())
        for expert in np.flatnonzero(row < _IDLE).tolist():
            for stack in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight):
                noise = torch.randn(stack[source].shape, generator=generator).to(stack)
                stack[expert] = stack[source] + _NOISE * stack[source].std() * noise
            if "e_score_correction_bias" in dict(block.gate.named_buffers()):
                block.gate.e_score_correction_bias[expert] = block.gate.e_score_correction_bias[source]
            count += 1
    return model, count


def frozen(model: MiniMoeForCausalLM, layer: int | None, expert: int | None) -> MiniMoeForCausalLM:
    """The model with one expert, or all, marked to be left alone by training."""
    before = model.config.frozen_experts or {}
    if layer is None or expert is None:
        marked = {str(n): list(range(model.config.num_experts)) for n in moe_layers(model)}
    else:
        _check_expert(model, layer, expert)
        marked = before | {str(layer): sorted({*before.get(str(layer), []), expert})}
    model = copy.deepcopy(model)
    model.config.frozen_experts = marked
    return model


@torch.no_grad()
def _regrouped(
    model: MiniMoeForCausalLM, groups: Sequence[Sequence[Sequence[int]]], load: np.ndarray
) -> MiniMoeForCausalLM:
    """A model with an expert for each group: its members' mean, weighted by their use; the first one's router row."""
    # Experts have other numbers then.
    values = model.config.to_dict() | {"num_experts": len(groups[0]), "frozen_experts": None}
    smaller = MiniMoeForCausalLM(MiniMoeConfig(**values))
    weights = model.state_dict()
    for layer, found, row in zip(moe_layers(model), groups, load, strict=True):
        prefix = f"model.layers.{layer}.mlp."
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            stack = weights[prefix + name]
            means = []
            for members in found:
                share = torch.tensor(row[list(members)] + 1e-9, dtype=stack.dtype, device=stack.device)
                means.append(torch.einsum("e,eij->ij", share / share.sum(), stack[list(members)]))
            weights[prefix + name] = torch.stack(means)
        heads = [members[0] for members in found]
        for name in ("gate.weight", "gate.noise_weight", "gate.e_score_correction_bias"):
            if prefix + name in weights:
                weights[prefix + name] = weights[prefix + name][heads]
    smaller.load_state_dict(weights)
    smaller.generation_config = model.generation_config
    return smaller.to(model.device).eval()


def _block(model: MiniMoeForCausalLM, layer: int) -> Any:
    """The MoE block of a layer."""
    return model.model.layers[layer].mlp


def moe_layers(model: MiniMoeForCausalLM) -> list[int]:
    """The numbers of the layers with experts."""
    return list(range(model.config.first_k_dense_replace, model.config.num_hidden_layers))


def _check_expert(model: MiniMoeForCausalLM, layer: int, expert: int) -> None:
    if layer not in moe_layers(model):
        raise UserError(f"layer {layer} has no experts", fix=f"layers with experts: {moe_layers(model)}")
    if not 0 <= expert < model.config.num_experts:
        raise UserError(f"there is no expert {expert}", fix=f"give 0 to {model.config.num_experts - 1}")


def _check_router(model: MiniMoeForCausalLM) -> None:
    """Experts can be moved where the router has a row for each, and for nothing else."""
    if model.config.router_type == "hash" or model.config.num_zero_computation_experts:
        what = "zero-computation experts" if model.config.num_zero_computation_experts else "router_type: hash"
        raise UserError(f"experts of a model with {what} cannot be regrouped", fix="ablate takes any model")


def _check_number(model: MiniMoeForCausalLM, keep: int) -> None:
    _check_router(model)
    least, most = model.config.num_experts_per_tok, model.config.num_experts
    if not least <= keep < most:
        raise UserError(
            f"--keep {keep}: the model has {most} experts, a token needs {least}", fix=f"{least} to {most - 1}"
        )


def run(
    model_dir: str,
    action: str,
    *,
    data: str,
    out: str | None = None,
    keep: int | None = None,
    layer: int | None = None,
    expert: int | None = None,
    json_output: bool = False,
    device: str = "auto",
) -> None:
    """Change, measure, save.

    Raises:
        UserError: an option that the action needs is missing, or does not fit the model; `out` is there already.
    """
    _check_options(action, out, keep, layer, expert)
    model, tokenizer = load_minimoe(model_dir, device)
    if not moe_layers(model):
        raise UserError("the model has no experts: all of its layers are dense", where=model_dir)
    validation = open_documents(documents_of(data), model, tokenizer)
    before = measure(model, validation)
    changes: list[Change] = []
    changed: MiniMoeForCausalLM | None = None
    if action == "ablate" and layer is None:
        pairs = [(n, e) for n in moe_layers(model) for e in range(model.config.num_experts)]
        for n, e in track(pairs, "experts", console=Console(stderr=True), transient=True):
            after = measure(ablated(model, n, e), validation)
            changes.append(compare(f"layer {n} expert {e}", before, after))
    else:
        what = action
        if action == "ablate":
            assert layer is not None
            assert expert is not None
            changed, what = ablated(model, layer, expert), f"layer {layer} expert {expert}"
        elif action == "freeze":
            changed, what = (
                frozen(model, layer, expert),
                "all experts" if layer is None else f"layer {layer} expert {expert}",
            )
        elif action == "revive":
            changed, count = revived(model, before.load)
            what = f"{count} experts revived"
        else:
            assert keep is not None
            changed = (pruned if action == "prune" else merged)(model, before.load, keep)
            what = f"{action} to {keep} experts"
        changes.append(compare(what, before, measure(changed, validation)))
    if changed is not None and out is not None:
        with written_whole(Path(out)) as temporary:
            save_weights(changed, tokenizer, temporary)
    _show(before, changes, out, json_output)


def _check_options(action: str, out: str | None, keep: int | None, layer: int | None, expert: int | None) -> None:
    if action in ("prune", "merge") and keep is None:
        raise UserError(f"{action} needs --keep", fix="--keep 4: experts that every layer has then")
    if (layer is None) != (expert is None):
        raise UserError("--layer and --expert belong together", fix="give both, or neither for every expert")
    if action not in ("ablate", "freeze") and layer is not None:
        raise UserError(f"--layer is for ablate and freeze, not for {action}", fix="leave it out")
    if action not in ("prune", "merge") and keep is not None:
        raise UserError(f"--keep is for prune and merge, not for {action}", fix="leave it out")
    if action == "ablate" and layer is None and out is not None:
        raise UserError("--out needs one expert to ablate", fix="give --layer and --expert")
    if action == "freeze" and out is None:
        raise UserError("freeze needs --out", fix="--out models/frozen: the folder that training starts from")
    if out is not None and Path(out).exists():
        raise UserError(f"{out} exists already", fix="choose another --out")


def _show(before: Measured, changes: Sequence[Change], out: str | None, json_output: bool) -> None:
    if json_output:
        print(json.dumps({"loss": before.loss, "changes": [asdict(change) for change in changes], "out": out}))
        return
    table = Table("change", "loss", "difference", "95 % interval")
    table.title = f"loss before: {before.loss:.4f} nats per token, {int(before.tokens.sum()):,} tokens"
    for change in sorted(changes, key=lambda one: -one.change):
        interval = f"{change.low:+.4f} to {change.high:+.4f}"
        table.add_row(change.what, f"{change.loss:.4f}", f"{change.change:+.4f}", interval)
    console = Console()
    console.print(table)
    if out:
        console.print(f"model folder: {out}", highlight=False)
