"""The decode loop's tensors: rows that are decoded together, one token a step.

The first step is the prefill: it feeds whole prompts, left-padded to one length; every later step feeds the
token sampled before. Where nothing is padded there is no attention mask at all, so attention takes its
fastest path.

Shapes: B rows, n tokens fed in this step, L positions in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.generation.cache import PreallocatedCache
from minimoe.generation.compiled import CompiledModel
from minimoe.generation.packed import PackedModel
from minimoe.generation.sampling import draw_uniforms, penalize_repetition, sample


class DecodeBatch:
    """Rows that advance in step on one cache.

    Args:
        model: any causal language model of `transformers`, in eval mode.
        prompts: token ids of every row.
        max_new_tokens: steps that will be asked for at most.
        settings: how to sample.
        generators: one a row.
        cache: holds the first positions of the only prompt already, or None.
        fast: another form of the model; None decodes with its own forward.
        with_logprobs: keep in `logprobs` how likely each of the newest tokens was, at this temperature.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        settings: GenerationSection,
        generators: Sequence[torch.Generator],
        cache: PreallocatedCache | None = None,
        fast: PackedModel | CompiledModel | None = None,
        with_logprobs: bool = False,
    ) -> None:
        assert cache is None or len(prompts) == 1, "a warm cache belongs to one conversation"
        self._model, self._fast, self._settings, self._generators = model, fast, settings, list(generators)
        device = model.device
        longest = max(len(prompt) for prompt in prompts)
        capacity = longest + max_new_tokens
        self._cache = cache if cache is not None else PreallocatedCache(model.config, capacity)
        self._length, self._prefilling = self._cache.get_seq_length(), True
        self._with_logprobs = with_logprobs
        self.logprobs: list[float] = []

        pads = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)  # (B, 1)
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._next = torch.tensor(padded, device=device)[:, self._length :]  # (B, n)
        # Positions and mask of every step to come are laid out once; a step takes slices. Padding counts up
        # like a document of its own: 2 pads before 3 tokens have positions [0, 1, 0, 1, 2].
        columns = torch.arange(capacity, device=device)
        self._positions = torch.where(columns >= pads, columns - pads, columns)  # (B, capacity)
        self._mask = (columns >= pads).long() if bool(pads.any()) else None  # (B, capacity)
        self._seen: torch.Tensor | None = None  # (B, V) tokens that the repetition penalty counts
        if settings.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[list(prompt)] = True

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Feed what is due and return one new token a row."""
        end = self._length + self._next.shape[1]
        logits = self._forward(
            self._positions[:, self._length : end], None if self._mask is None else self._mask[:, :end]
        )
        if self._prefilling and bool(logits.isnan().any()):
            raise UserError("the model's outputs are NaN", fix="its weights are broken, use others")
        self._prefilling, self._length = False, end
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, self._settings.repetition_penalty)
        greedy = self._settings.temperature == 0
        uniforms = None if greedy else draw_uniforms(self._generators, logits.device)
        self._next = sample(logits, self._settings, uniforms).unsqueeze(1)  # (B, 1)
        if self._with_logprobs:
            scaled = logits.float() / (self._settings.temperature or 1.0)
            self.logprobs = scaled.log_softmax(-1).gather(1, self._next).squeeze(1).tolist()
        if self._seen is not None:
            self._seen.scatter_(1, self._next, True)
        return self._next.squeeze(1).tolist()

    def _forward(self, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """positions (B, n), mask (B, L + n) -> logits of the last tokens (B, V)."""
        if self._fast is not None:
            return self._fast(self._next, positions, self._cache, mask)
        return self._model(
            input_ids=self._next,
            attention_mask=mask,
            # Without padding they are the model's own, and it need not look for documents in them.
            position_ids=None if mask is None else positions,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows: finished ones would cost as much as live ones."""
        index = torch.tensor(list(rows), device=self._next.device)
        self._cache.batch_select_indices(index)
        self._next, self._positions = self._next[index], self._positions[index]
        self._mask = None if self._mask is None else self._mask[index]
        self._seen = None if self._seen is None else self._seen[index]
        self._generators = [self._generators[row] for row in rows]
