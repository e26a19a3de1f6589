"""Parameter groups, optimizers, and the learning rate as a pure function of the step.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves every hidden matrix by the orthogonalised
momentum of its gradient; embeddings, norms and routers stay with AdamW (arXiv 1711.05101). Stacked experts
(E, 2I, D) are E gate and E up matrices, orthogonalised apart, all matrices of one shape in one batched matmul.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minimoe.config import OptimizerConfig, ScheduleConfig
from minimoe.device import has_bf16
from minimoe.model.router import TopKRouter
from minimoe.ops import accelerated
from minimoe.train.sharding import is_shared_out, local, on_owners

# Quintic Newton-Schulz coefficients of Muon's authors: singular values go to about [0.7, 1.2] in 5 steps.
_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5


def lr_at_step(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 0) as a share of the peak.

    Linear warm-up reaches 1 at the last warm-up step. `cosine` then falls to `min_lr_ratio` at the last step;
    `wsd` (warm-up, stable, decay; arXiv 2404.06395) stays at 1 and falls linearly over the final `decay_fraction`
    of all steps; `constant` stays at 1.
    """
    warmup, floor = schedule.warmup(total_steps), schedule.min_lr_ratio
    if step < warmup:
        return schedule.warmup_start_ratio + (1 - schedule.warmup_start_ratio) * (step + 1) / warmup
    if schedule.name == "cosine":
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if schedule.name == "wsd":
        decay_steps = max(round(schedule.decay_fraction * total_steps), 1)
        return floor + (1 - floor) * min(max(total_steps - step, 0) / decay_steps, 1.0)
    return 1.0


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that together own every parameter once; each group keeps its peak rate as `peak_lr`."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name: p for name, p in named.items() if config.name == "muon" and _is_hidden_matrix(name, p)}
    adamw_lr = config.adamw_lr if config.name == "muon" else config.lr
    # Norm weights are not decayed: pulling a gain to 0 is no regularisation. One call of fused AdamW takes the tensors
    # of one mesh of ranks.
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in named.items():
        if name not in matrices:
            decay = config.weight_decay if p.ndim >= 2 else 0.0
            kind = p.ndim < 2, getattr(p, "device_mesh", None)
            groups.setdefault(kind, {"params": [], "weight_decay": decay})["params"].append((name, p))
    optimizers: list[Optimizer] = [
        AdamW(list(groups.values()), lr=adamw_lr, betas=config.betas, eps=config.eps, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, config.lr, momentum=config.momentum, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group to its peak rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def update_selection_bias(model: nn.Module, expert_counts: Tensor, rate: float) -> None:
    """Balance the experts without a loss, once an optimizer step: move the routers' selection bias.

    Args:
        expert_counts: (L, E) tokens of the whole step, over micro-batches and ranks.
        rate: of the move, 0 = off. The bias of frozen routers stays too.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    if rate and all(router.weight.requires_grad for router in routers):
        for router, counts in zip(routers, expert_counts, strict=True):
            router.update_selection_bias(counts, rate)


def selection_biases(model: nn.Module) -> list[list[float]]:
    """(L, E) of the routers that have a bias; empty where none has."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    return [
        [round(value, 5) for value in router.get_buffer("e_score_correction_bias").tolist()]
        for router in routers
        if router.scoring_func == "sigmoid"
    ]


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate."))


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised per matrix, with decoupled weight decay.

    Args:
        named_parameters: 2-D matrices, or 3-D stacks of matrices. A name that ends in `gate_up_proj` is split
            in two along its rows first.
        lr: step size; the update's RMS is about lr / sqrt(columns).
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(named_parameters.items()), defaults)
        self._halves = [2 if name.endswith("gate_up_proj") else 1 for name in named_parameters]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        pairs: list[tuple[Tensor, Tensor]] = []  # stacks of matrices, and what is to be orthogonalised for each
        shared: list[tuple[Tensor, Tensor]] = []  # matrices whose rows ranks share out, and our part
        for parameter, halves in zip(group["params"], self._halves, strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient, buffer, weights = local(parameter.grad), local(state["momentum_buffer"]), local(parameter)
            buffer.lerp_(gradient, 1 - momentum)
            update = torch.lerp(gradient, buffer, momentum)  # Nesterov: look one step ahead
            weights.mul_(1 - lr * group["weight_decay"])
            if parameter.ndim == 2 and is_shared_out(parameter):
                shared.append((parameter, update))
            else:  # ranks share out a stack by whole matrices
                pairs += zip(_matrices(weights, halves), _matrices(update, halves), strict=True)
        directions = orthogonal([update for _, update in pairs])
        if shared:
            parameters, updates = zip(*shared, strict=True)
            pairs += [(local(parameter), parameter) for parameter in parameters]
            directions += on_owners(
                parameters,
                updates,
                lambda whole: [stack[0] for stack in orthogonal([matrix[None] for matrix in whole])],
            )
        for (target, like), direction in zip(pairs, directions, strict=True):
            rows, columns = like.shape[-2:]
            target.add_(direction, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def orthogonal(stacks: Sequence[Tensor]) -> list[Tensor]:
    """`newton_schulz` of each stack (n, rows, columns), all matrices of one shape in one batch."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for place, stack in enumerate(stacks):
        by_shape[stack.shape[-2:]].append(place)
    found: dict[int, Tensor] = {}
    for places in by_shape.values():
        sizes = [len(stacks[place]) for place in places]
        matrices = torch.cat([stacks[place] for place in places])
        directions = newton_schulz(matrices) if len(matrices) else matrices  # other ranks may have them all
        found |= zip(places, directions.split(sizes), strict=True)
    return [found[place] for place in range(len(stacks))]


def newton_schulz(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately: U V^T of each matrix's SVD.

    Args:
        matrices: (N, rows, columns).

    Returns:
        The same shape, in bfloat16 where the hardware computes in it, else in float32.
    """
    x = matrices.to(torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    if x.shape[1] >= x.shape[2]:
        return orthogonalise(x.contiguous(), _NS_COEFFICIENTS, _NS_STEPS)
    return orthogonalise(x.mT.contiguous(), _NS_COEFFICIENTS, _NS_STEPS).mT


@accelerated
def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Each matrix over its norm, then `steps` times x <- x (a + b x^T x + c (x^T x)^2).

    Args:
        x: (N, rows, columns), no more columns than rows.
        coefficients: a, b, c.
    """
    a, b, c = coefficients
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x.mT, x)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a)
    return x


def _matrices(stack: Tensor, halves: int) -> list[Tensor]:
    """A parameter as stacks (n, rows, columns) of matrices: views, so that updates reach it."""
    stack = stack if stack.ndim == 3 else stack[None]
    return list(stack.chunk(halves, dim=1))
