"""Rollouts: the model's own answers to prompts, their rewards, and the batches made of them.

The decode engine answers with the weights that are being trained. Its dispatch path and the training's are one
function, so the probabilities it sampled with are those that training computes: no routing is recorded to be replayed,
and no weights are sent anywhere.

A rollout is a function of the weights, the seed and its number. It is used for `updates_per_rollout` steps; a
checkpoint between them holds it. Prompts are shared out among ranks by their place, and answers do not depend on that.

B batch, S sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from minimoe.config import GenerationSection, GrpoRun
from minimoe.data.batch import Batch
from minimoe.data.loader import Batches
from minimoe.data.prompts import Prompt, Prompts, prompt_at
from minimoe.errors import disk_errors
from minimoe.failpoints import failpoint
from minimoe.generation.engine import Completion, Engine
from minimoe.train.answers import Answer, RolloutBatch, pack_answers, set_advantages, token_weights
from minimoe.train.files import ROLLOUTS_FILE
from minimoe.train.rewards import Rewards
from minimoe.train.sharding import in_step


class Rollouts(Batches):
    """Batches of the model's answers; see the module.

    Args:
        reference: the log-probabilities (B, S) of a batch's labels under the first model; None without one.
    """

    def __init__(
        self,
        config: GrpoRun,
        model: Any,
        tokenizer: Any,
        prompts: Prompts,
        rewards: Rewards,
        accelerator: Accelerator,
        reference: Callable[[Batch], Tensor] | None,
    ) -> None:
        self._config, self._grpo, self._model, self._tokenizer = config, config.grpo, model, tokenizer
        self._prompts, self._rewards, self._accelerator, self._reference = prompts, rewards, accelerator, reference
        self._group = config.grpo.group_size
        self._per_rollout = config.train.batch_size // self._group  # prompts
        # An epoch answers every prompt once; a row is an answer of a step.
        self.rows_per_epoch = len(prompts.train) * self._group * config.grpo.updates_per_rollout
        self._number = -1
        self._batch: RolloutBatch | None = None
        self._facts: dict[str, float] = {}
        self._log_is_clean = False
        self._told = ""  # what went wrong with a reward

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> RolloutBatch:
        """The rank's rows of the step's rollout, which is made if it is not the last one."""
        number = step // self._grpo.updates_per_rollout
        if number != self._number or self._batch is None:
            self._batch, self._facts = self._roll_out(number, step, world_size)
            self._number = number
        return RolloutBatch(*(tensor[rank::world_size] for tensor in self._batch.tensors().values()))

    def facts(self) -> dict[str, float]:
        """Of the last rollout, for the metrics."""
        return dict(self._facts)

    def state_tensors(self, step: int) -> dict[str, Tensor]:
        """The rollout, where the next step goes on with it."""
        if step % self._grpo.updates_per_rollout == 0 or self._batch is None:
            return {}
        numbers = {f"fact.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self._facts.items()}
        return {**self._batch.tensors(), **numbers, "number": torch.tensor(self._number)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state_tensors`."""
        if "number" in tensors:
            self._number = int(tensors["number"])
            self._batch = RolloutBatch(*(tensors[field.name] for field in fields(RolloutBatch)))
            self._facts = {
                name.removeprefix("fact."): value.item() for name, value in tensors.items() if name.startswith("fact.")
            }

    def _roll_out(self, number: int, step: int, world_size: int) -> tuple[RolloutBatch, dict[str, float]]:
        failpoint("rollout.begin")
        grpo, accelerator = self._grpo, self._accelerator
        places = range(self._per_rollout)
        prompts = [
            prompt_at(self._prompts.train, number * self._per_rollout + place, self._config.seed) for place in places
        ]
        mine = [place for place in places if place % world_size == accelerator.process_index]
        # A seed of its own for each rollout, so that a prompt is answered anew in the next epoch.
        digest = hashlib.blake2b(f"{self._config.seed} {number}".encode(), digest_size=7).digest()
        settings = self._settings(grpo.temperature, int.from_bytes(digest, "little"))
        jobs = [(place, repeat) for place in mine for repeat in range(self._group)]
        completions = answer_all(
            self._model,
            self._tokenizer,
            [prompts[place] for place, _ in jobs],
            settings,
            accelerator.autocast(),
            [place * self._group + repeat for place, repeat in jobs],
        )
        made = [
            (place, repeat, _answer(prompts[place], completion, self._rewards))
            for (place, repeat), completion in zip(jobs, completions, strict=True)
        ]
        if self._rewards.last_error != self._told:  # once for each kind
            self._told = self._rewards.last_error
            accelerator.print(f"warning: a reward failed, and its answer is left out: {self._told}")
        if world_size > 1:
            made = gather_object(made)
        answers = [answer for _, _, answer in sorted(made, key=lambda item: item[:2])]
        groups = [answers[start : start + self._group] for start in range(0, len(answers), self._group)]
        degenerate = [not set_advantages(group, grpo.loss, grpo.learn_truncated) for group in groups]
        if accelerator.is_main_process:
            self._write(step, prompts, groups)
        return self._pack(answers, world_size), self._find(answers, degenerate)

    def _settings(self, temperature: float, seed: int) -> GenerationSection:
        return GenerationSection(
            max_new_tokens=self._grpo.max_new_tokens,
            temperature=temperature,
            top_p=1.0,
            seed=seed,
            chat=True,
            batch_size=self._config.train.batch_size,
        )

    def _pack(self, answers: Sequence[Answer], world_size: int) -> RolloutBatch:
        """Rows of whole answers, as many for every rank, with what the first model says of them.

        Answers that teach nothing are left out, but where they keep the model near the first one. They count in the
        mean that the loss is.
        """
        pad_id = self._tokenizer.pad_token_id or 0
        weights = token_weights(answers, self._grpo.loss, self._grpo.max_new_tokens)
        kept = [n for n, answer in enumerate(answers) if answer.advantage or self._grpo.kl_weight] or [0]
        answers, weights = [answers[n] for n in kept], [weights[n] for n in kept]
        batch = pack_answers(answers, weights, self._config.data.sequence_length, pad_id, world_size)
        if self._reference is None:
            return batch
        return RolloutBatch(**{**batch.tensors(), "reference_logprobs": self._reference(batch)})

    def _find(self, answers: Sequence[Answer], degenerate: Sequence[bool]) -> dict[str, float]:
        known = [answer.reward for answer in answers if answer.reward is not None]
        facts = {
            "reward": float(np.mean(known)) if known else 0.0,
            "reward_std": float(np.std(known)) if known else 0.0,
        }
        for number, reward in enumerate(self._grpo.rewards):
            if len(self._grpo.rewards) > 1:
                single = [a.rewards[number] for a in answers if a.rewards[number] is not None]
                facts[f"reward.{reward.function}"] = float(np.mean(single)) if single else 0.0  # type: ignore[arg-type]
        return facts | {
            "tokens": float(sum(len(answer.prompt_ids) + len(answer.token_ids) for answer in answers)),
            "answer_tokens": float(np.mean([len(answer.token_ids) for answer in answers])),
            "truncated": float(np.mean([answer.truncated for answer in answers])),
            "degenerate_groups": float(np.mean(degenerate)),
            "failed_rewards": float(sum(answer.reward is None for answer in answers)),
        }

    def _write(self, step: int, prompts: Sequence[Prompt], groups: Sequence[Sequence[Answer]]) -> None:
        """Log every answer; what an interrupted run logged from this step on is dropped first."""
        file = Path(self._config.output_dir) / ROLLOUTS_FILE
        with disk_errors("rollouts", file):
            if not self._log_is_clean:
                _drop_rows_from(file, step)
                self._log_is_clean = True
            with file.open("a", encoding="utf-8") as stream:
                for prompt, group in zip(prompts, groups, strict=True):
                    for answer in group:
                        row = {
                            "step": step,
                            "prompt": prompt.messages[-1]["content"],
                            "answer": answer.text,
                            "reward": answer.reward,
                            "rewards": dict(zip([r.function for r in self._grpo.rewards], answer.rewards, strict=True)),
                            "advantage": round(answer.advantage, 6),
                            "tokens": len(answer.token_ids),
                            "truncated": answer.truncated,
                        }
                        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSection,
    autocast: AbstractContextManager[Any],
    occurrences: Sequence[int] | None = None,
) -> list[Completion]:
    """Answers of the decode engine, with their log-probabilities; the model is left in training as it was.

    Of a sharded model it is a collective, with prompts of each rank's own, or none.
    """
    was_training = model.training
    try:
        with autocast, in_step(model.eval()):
            if not prompts:
                return []
            return Engine(model, tokenizer).complete(
                [prompt.token_ids for prompt in prompts], settings, occurrences, with_logprobs=True
            )
    finally:
        model.train(was_training)


def _answer(prompt: Prompt, completion: Completion, rewards: Rewards) -> Answer:
    reward, values = rewards(completion.text, prompt.row)
    return Answer(
        prompt.token_ids,
        list(completion.token_ids),
        list(completion.logprobs or ()),
        completion.text,
        completion.finish_reason == "length",
        reward,
        values,
    )


def _drop_rows_from(file: Path, step: int) -> None:
    """Keep rows of earlier steps: what comes after will be made again."""
    if not file.exists():
        return
    replacement = file.with_suffix(".tmp")
    with file.open(encoding="utf-8") as old, replacement.open("w", encoding="utf-8") as new:
        new.writelines(_rows_before(old, step))
    replacement.replace(file)


def _rows_before(lines: Iterator[str] | Any, step: int) -> Iterator[str]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] < step:
            yield line
