"""`minimoe distil`: a student that learns from a teacher's probabilities beside the text (arXiv 1503.02531).

B batch, S sequence, N learned positions, V vocabulary, K tokens kept of the teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from minimoe.adapters import fingerprint
from minimoe.config import DistilConfig, DistilRun
from minimoe.data.batch import Batch
from minimoe.data.loader import open_data
from minimoe.data.shards import cache_folder
from minimoe.errors import UserError
from minimoe.loading import load_model, model_folder
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.losses import IGNORE_INDEX, next_token_loss
from minimoe.ops.onednn import float32_by_onednn
from minimoe.tokenizer import set_chat_template
from minimoe.train.loop import fit
from minimoe.train.objectives import Losses, Objective, Step, add_router_terms
from minimoe.train.parallel import make_accelerator
from minimoe.train.pretrain import new_model
from minimoe.train.sft import start_from
from minimoe.train.teacher_cache import TeacherCache, row_key


class Taught(NamedTuple):
    """What the teacher says of N positions."""

    ids: Tensor | None  # (N, K) int64; None: of all tokens
    logprobs: Tensor  # (N, K), or (N, V): at the temperature


def run(config: DistilRun, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the config says; returns the folder of the final model."""
    accelerator = make_accelerator(config.train, config.parallel)
    model: Any
    teacher, tokenizer = load_model(config.distil.teacher, "cpu", torch.float32)
    set_chat_template(tokenizer, config.chat_template)
    if config.init_from is not None:
        model, own = start_from(config.init_from, config, config.lora)
        check_same_vocabulary(own, tokenizer, config)
    else:
        torch.manual_seed(config.seed)
        model = new_model(config.model or {}, tokenizer, config.data.sequence_length, config.distil.teacher)
    limit = getattr(teacher.config, "max_position_embeddings", None)
    if limit is not None and config.data.sequence_length > limit:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than the teacher's {limit} positions",
            where=config.distil.teacher,
            fix=f"set it to {limit} or less",
        )
    ask = Teacher(teacher, len(tokenizer), config, accelerator)
    data = partial(open_data, config.data, tokenizer, config.encoding, config.seed)
    objective = distil_objective(config.distil, ask)
    return fit(config, model, tokenizer, data, objective, accelerator, resume=resume, overwrite=overwrite)


def check_same_vocabulary(student: Any, teacher: Any, config: DistilRun) -> None:
    """Probabilities of tokens say nothing about other tokens.

    Raises:
        UserError: the two tokenizers differ.
    """
    if student.get_vocab() != teacher.get_vocab():
        raise UserError(
            f"the student's tokenizer ({len(student)} tokens) is not the teacher's ({len(teacher)} tokens)",
            where=f"{config.init_from}, {config.distil.teacher}",
            fix="give a student with the teacher's tokenizer, or a new one by model",
        )


class Teacher:
    """A model's probabilities, from its cache or by running it."""

    def __init__(self, model: Any, vocabulary: int, config: DistilRun, accelerator: Accelerator) -> None:
        self._model = model.to(accelerator.device).eval().requires_grad_(False)
        self._vocabulary, self._distil, self._accelerator = vocabulary, config.distil, accelerator
        self._width = model.config.hidden_size
        self._cache: TeacherCache | None = None
        if config.distil.cache:
            assert config.distil.top_k is not None
            length = config.data.sequence_length
            folder = model_folder(config.distil.teacher)
            settings = (fingerprint(folder), length, config.distil.top_k, config.distil.temperature)
            settings += (vocabulary, accelerator.mixed_precision, accelerator.device.type)  # type: ignore[assignment]
            name = hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
            rank = accelerator.process_index
            self._cache = TeacherCache(cache_folder(config.data) / f"teacher-{name}", length, config.distil.top_k, rank)

    @torch.no_grad()
    def __call__(self, batch: Batch, learned: Tensor) -> Taught:
        """What it says of the positions (B, S) bool that predict something learned."""
        if self._cache is None:
            return self._ask(batch, learned)
        tensors = batch.tensors()
        keys = [row_key({name: t[row] for name, t in tensors.items()}) for row in range(len(learned))]
        found = [self._cache.get(key) for key in keys]
        missing = [row for row, values in enumerate(found) if values is None]
        if missing:
            rows = type(batch)(*(tensor[missing] for tensor in tensors.values()))
            everything = torch.ones_like(rows.labels, dtype=torch.bool)
            asked = self._ask(rows, everything)
            assert asked.ids is not None
            shape = (len(missing), learned.shape[1], -1)
            for row, ids, logprobs in zip(missing, asked.ids.view(shape), asked.logprobs.view(shape), strict=True):
                self._cache.put(keys[row], ids, logprobs)
                found[row] = (ids.cpu(), logprobs.float().cpu())
        ids, logprobs = (torch.stack([values[part] for values in found if values]) for part in (0, 1))
        return Taught(ids.to(learned.device)[learned], logprobs.to(learned.device)[learned])

    def _ask(self, batch: Batch, learned: Tensor) -> Taught:
        with self._accelerator.autocast(), float32_by_onednn(self._accelerator.device, self._width):
            inputs = {name: tensor for name, tensor in batch.model_inputs().items() if name != "labels"}
            if isinstance(self._model, MiniMoeForCausalLM):
                logits = self._model(**inputs, use_cache=False, logits_to_keep=learned).logits
            else:
                inputs["attention_mask"] = documents_mask(batch.position_ids)
                logits = self._model(**inputs, use_cache=False).logits[learned]
        logprobs = (logits[:, : self._vocabulary].float() / self._distil.temperature).log_softmax(-1)
        if self._distil.top_k is None:
            return Taught(None, logprobs)
        kept, ids = logprobs.topk(min(self._distil.top_k, self._vocabulary), dim=-1)
        return Taught(ids, kept)


def documents_mask(position_ids: Tensor) -> Tensor:
    """What is added to the scores of models that do not tell packed documents by their positions, (B, 1, S, S)."""
    documents = (position_ids == 0).cumsum(1)
    length = position_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    allowed = causal & (documents[:, :, None] == documents[:, None, :])
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)[
        :, None
    ]


def distil_objective(distil: DistilConfig, teacher: Callable[[Batch, Tensor], Taught]) -> Objective:
    """What `minimoe distil` learns: weight * divergence + (1 - weight) * cross-entropy, and the router's terms.

    Logged beside the loss: `lm_loss`, the cross-entropy, and `divergence`, KL(teacher || student) in nats per token.
    """

    def objective(model: Any, batch: Batch, step: Step) -> Losses:
        learned = F.pad(batch.labels[:, 1:] != IGNORE_INDEX, (0, 1))  # (B, S)
        taught = teacher(batch, learned)
        inputs = batch.model_inputs()
        targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1))[learned]
        outputs = model(**inputs, output_router_logits=True, logits_to_keep=learned, use_cache=False)
        lm_loss = next_token_loss(outputs.logits, targets, step.num_items)
        mean = divergence(outputs.logits, taught, distil.temperature).sum() / step.num_items.clamp(min=1)
        # Its gradients are as large as the cross-entropy's when multiplied by the square of the temperature.
        loss = (1 - distil.weight) * lm_loss + distil.weight * distil.temperature**2 * mean
        terms = {"lm_loss": lm_loss, "divergence": mean}
        return add_router_terms(loss, terms, model, outputs, batch, step)

    return objective


def divergence(logits: Tensor, taught: Taught, temperature: float) -> Tensor:
    """KL(teacher || student) of each position, (N,): over all tokens, or over those kept and one for all others.

    Args:
        logits: (N, V) of the student. Those beyond the tokenizer's tokens are left out, or, where the teacher kept few
            tokens, belong to all others.
    """
    if taught.ids is None:
        vocabulary = taught.logprobs.shape[-1]
        student = (logits[:, :vocabulary].float() / temperature).log_softmax(-1)
        return (taught.logprobs.exp() * (taught.logprobs - student)).sum(-1)
    student = (logits.float() / temperature).log_softmax(-1).gather(-1, taught.ids)  # (N, K)
    kept = (taught.logprobs.exp() * (taught.logprobs - student)).sum(-1)
    rest, own_rest = (1 - values.exp().sum(-1) for values in (taught.logprobs, student))
    rest, own_rest = rest.clamp(min=0), own_rest.clamp(min=1e-7)
    return kept + rest * (rest.clamp(min=1e-7).log() - own_rest.log())
