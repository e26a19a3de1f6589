"""`minimoe grpo`: reinforcement learning from rewards of the model's own answers.

GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783) and CISPO (2506.13585), with clipping from above apart from below
(2503.14476) and the divergence from the first model by the k3 estimate (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from minimoe import adapters
from minimoe.config import GenerationSection, GrpoConfig, GrpoRun
from minimoe.data.batch import Batch
from minimoe.data.loader import Data
from minimoe.data.prompts import Prompt, open_prompts
from minimoe.errors import UserError
from minimoe.failpoints import failpoint
from minimoe.train.answers import RolloutBatch, answers_mask
from minimoe.train.loop import fit
from minimoe.train.objectives import HeldOut, Losses, Objective, Step, add_router_terms
from minimoe.train.parallel import fast_float32, make_accelerator
from minimoe.train.rewards import Rewards
from minimoe.train.rollouts import Rollouts, answer_all
from minimoe.train.sft import start_from
from minimoe.train.sharding import is_sharded

_ANSWERED_TOGETHER = 64


class HeldOutPrompts(list[Prompt]):
    """What the loop asks of held-out data: how much there is."""

    @property
    def num_documents(self) -> int:
        return len(self)


def run(config: GrpoRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train, config.parallel)
    model, tokenizer = start_from(config.init_from, config, config.lora)
    if config.grpo.max_new_tokens >= config.data.sequence_length:
        raise UserError(
            f"grpo.max_new_tokens {config.grpo.max_new_tokens} leaves no room for a prompt in data.sequence_length "
            f"{config.data.sequence_length}",
            fix="lower the one or raise the other",
        )
    with Rewards(config.grpo.rewards, config.grpo.reward_seconds) as rewards:
        return fit(
            config,
            model,
            tokenizer,
            partial(_open, config, model, tokenizer, rewards, accelerator),
            rollout_objective(config.grpo),
            accelerator,
            evaluate=partial(held_out_rewards, config, tokenizer, rewards),
            resume=resume,
            overwrite=overwrite,
        )


def _open(config: GrpoRun, model: Any, tokenizer: Any, rewards: Rewards, accelerator: Accelerator) -> Data:
    grpo = config.grpo
    prompts = open_prompts(config.data, tokenizer, config.seed, grpo.max_new_tokens, grpo.eval_prompts)
    reference = None
    if grpo.kl_weight > 0:
        # With adapters, the first model is the base without them; else a copy of it stays in memory.
        first = model if adapters.has_adapter(model) else copy.deepcopy(model)
        reference = partial(first_logprobs, first, grpo.temperature, config.train.micro_rows(1), accelerator)
    return Data(
        train=Rollouts(config, model, tokenizer, prompts, rewards, accelerator, reference),
        validation=HeldOutPrompts(prompts.held_out) if prompts.held_out else None,
        counts=prompts.counts,
        fingerprint=prompts.fingerprint,
    )


def rollout_objective(grpo: GrpoConfig) -> Objective:
    """What `minimoe grpo` learns.

    Logged beside the loss: `policy_loss`; `lm_loss`, the answers' cross-entropy per token at the sampling's
    temperature; `clipped`, the share of tokens whose ratio of probabilities is clipped; `ratio_difference`, how far
    that ratio is from 1; `kl`, the divergence from the first model, where there is one.
    """

    def objective(model: Any, batch: RolloutBatch, step: Step) -> Losses:
        outputs = model(**batch.model_inputs(), skip_logits=True, logprob_temperature=grpo.temperature, use_cache=False)
        logprobs, mask = outputs.token_logprobs, answers_mask(batch)
        per_token = policy_loss(logprobs, batch.old_logprobs, batch.advantages, grpo)
        terms = {"policy_loss": (batch.weights * per_token).sum()}
        loss = terms["policy_loss"]
        if grpo.kl_weight:
            ahead = batch.reference_logprobs - logprobs
            kl = (batch.weights * (ahead.exp() - 1 - ahead)).sum()
            loss = loss + grpo.kl_weight * kl
            terms["kl"] = kl
        ratio = (logprobs - batch.old_logprobs).detach().exp()
        outside = (ratio < 1 - grpo.clip_low) | (ratio > 1 + grpo.clip_high)
        share = mask / step.num_items.clamp(min=1)
        terms["lm_loss"] = -(share * logprobs.detach()).sum()
        terms["clipped"] = (share * outside).sum()
        terms["ratio_difference"] = (share * (ratio - 1).abs()).sum()
        return add_router_terms(loss, terms, model, outputs, batch, step)

    return objective


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, grpo: GrpoConfig) -> Tensor:
    """The loss of each token, all (...): what makes an answer with a positive advantage likelier.

    Args:
        logprobs: with gradient.
        old: when the token was sampled.
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high)
    if grpo.loss == "cispo":  # every token keeps its gradient; its weight is clipped
        return -clipped.detach() * advantages * logprobs
    return -torch.minimum(ratio * advantages, clipped * advantages)


@torch.no_grad()
def first_logprobs(model: Any, temperature: float, rows: int, accelerator: Accelerator, batch: Batch) -> Tensor:
    """(B, S) float32 on the CPU: log-probabilities of the batch's labels under the first model."""
    adapted = adapters.has_adapter(model)
    was_training = model.training
    if not is_sharded(model):  # the policy, whose adapter is switched off
        model.to(accelerator.device)
    model.eval()
    if adapted:
        adapters.choose(model, None)
    try:
        parts = []
        with accelerator.autocast(), fast_float32(model, accelerator.device):
            for part in Batch(*list(batch.tensors().values())[:4]).to(accelerator.device).split(rows):
                inputs = part.model_inputs()
                outputs = model(**inputs, skip_logits=True, logprob_temperature=temperature, use_cache=False)
                parts.append(outputs.token_logprobs.float().cpu())
        return torch.cat(parts)
    finally:
        if adapted:
            adapters.choose(model, "default")
        model.train(was_training)


def held_out_rewards(
    config: GrpoRun,
    tokenizer: Any,
    rewards: Rewards,
    model: Any,
    prompts: HeldOutPrompts,
    batch_size: int,
    accelerator: Accelerator,
    poll: Callable[[], None],
) -> HeldOut:
    """The mean reward of greedy answers to held-out prompts."""
    rank, world = accelerator.process_index, accelerator.num_processes
    settings = GenerationSection(
        max_new_tokens=config.grpo.max_new_tokens, temperature=0, chat=True, batch_size=_ANSWERED_TOGETHER
    )
    total = torch.zeros(3, dtype=torch.float64)  # rewards, answers, truncated ones
    for start in range(0, len(prompts), _ANSWERED_TOGETHER):
        failpoint("evaluate.batch")
        poll()
        mine = prompts[start : start + _ANSWERED_TOGETHER][rank::world]
        completions = answer_all(model, tokenizer, mine, settings, accelerator.autocast())
        for prompt, completion in zip(mine, completions, strict=True):
            reward, _ = rewards(completion.text, prompt.row)
            total += torch.tensor([reward or 0.0, reward is not None, completion.finish_reason == "length"])
    if world > 1:
        total = accelerator.reduce(total.to(accelerator.device)).cpu()
    reward = float(total[0] / total[1].clamp(min=1))
    return HeldOut({"val_reward": reward, "val_truncated": float(total[2] / len(prompts))}, -reward)
