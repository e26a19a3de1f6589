"""Logits -> next token: pure functions, vectorised over the batch.

The order is that of `transformers`: repetition penalty (CTRL, arXiv:1909.05858), temperature, top-k, top-p
(nucleus, arXiv:1904.09751), min-p (arXiv:2407.01082). Everything after the temperature works on candidates
sorted by probability, where each filter keeps a prefix. Randomness enters as one uniform number per row and
token, drawn by a generator of that row alone, so a prompt's sample does not depend on the batch it is in.

Shapes: B batch, V vocabulary, C candidates kept for sampling (C <= V).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from minimoe.config import GenerationSection


def row_generator(seed: int, prompt_ids: Sequence[int], occurrence: int = 0) -> torch.Generator:
    """A CPU generator that follows from the seed, the prompt and how many equal prompts came before it.

    Mixing in the prompt keeps different prompts independent; the occurrence makes repeated prompts differ.
    """
    digest = hashlib.blake2b(repr((seed, occurrence, list(prompt_ids))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_uniforms(generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
    """One number in [0, 1) from every generator: (B, 1)."""
    return torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(device)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens of the prompt and of the answer so far less likely (penalty > 1) or more (< 1).

    Args:
        logits: (B, V).
        seen: (B, V) boolean, True for tokens that occurred.
        penalty: positive logits are divided by it, negative ones multiplied.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: torch.Tensor, settings: GenerationSection) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: (B, V); the temperature must be positive.

    Returns:
        Token ids (B, C) and their probabilities (B, C), not renormalised. Dropped candidates have probability
        0 and come after the kept ones.
    """
    vocabulary = logits.shape[-1]
    logits = logits.float() / settings.temperature
    if settings.top_k:
        logits, ids = logits.topk(min(settings.top_k, vocabulary))  # (B, C)
        probabilities = logits.softmax(-1)
    else:
        probabilities = logits.softmax(-1)
        if settings.top_p == 1 and settings.min_p == 0:
            return torch.arange(vocabulary, device=logits.device).expand_as(logits), probabilities
        # A full sort would cost more than a small model's step. All tokens below (1 - top_p) / V together
        # weigh less than 1 - top_p, so top-p drops every one of them: sorting the others gives the same
        # result.
        floor = (1 - settings.top_p) / vocabulary
        width = int((probabilities >= floor).sum(-1).amax())
        probabilities, ids = probabilities.topk(width)  # (B, C)
    mass_before = probabilities.cumsum(-1) - probabilities
    keep = (mass_before < settings.top_p) & (probabilities >= settings.min_p * probabilities[:, :1])
    keep[:, 0] = True  # the likeliest token stays, whatever the rounding
    return ids, probabilities.where(keep, 0.0)


def sample(logits: torch.Tensor, settings: GenerationSection, uniforms: torch.Tensor | None) -> torch.Tensor:
    """The next token of every row: logits (B, V), uniforms (B, 1) -> (B,).

    Temperature 0 is greedy and needs no uniforms.
    """
    if settings.temperature == 0 or uniforms is None:
        return logits.argmax(-1)
    ids, probabilities = candidates(logits, settings)
    cumulative = probabilities.cumsum(-1)
    choice = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)  # (B, 1)
    # Rounding may put the threshold on the last sum; the last possible candidate is then the one meant.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1, keepdim=True)
    return ids.gather(-1, choice.minimum(last)).squeeze(-1)
