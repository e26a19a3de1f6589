"""Sampling against transformers' logits processors, and what seeds promise."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minimoe.config import GenerationSection
from minimoe.generation.sampling import candidates, draw_uniforms, penalize_repetition, row_generator, sample

B, V = 6, 300


@pytest.fixture
def logits() -> torch.Tensor:
    """Rows from nearly flat to sharply peaked."""
    torch.manual_seed(0)
    return torch.randn(B, V) * torch.tensor([0.01, 0.5, 1.0, 3.0, 8.0, 30.0])[:, None]


def dense(logits: torch.Tensor, settings: GenerationSection) -> torch.Tensor:
    """Renormalised probabilities in the order of the vocabulary."""
    ids, probabilities = candidates(logits, settings)
    full = torch.zeros_like(logits).scatter_(1, ids, probabilities)
    return full / full.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, V + 5])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.07, 1.0])
def test_the_filtered_distribution_is_that_of_transformers(logits, temperature, top_k, top_p, min_p):
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.zeros(B, 1, dtype=torch.long), logits.clone()).softmax(-1)
    settings = GenerationSection(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # Same float32 operations in another order: a few roundings apart.
    torch.testing.assert_close(dense(logits, settings), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(logits, penalty):
    ids = torch.randint(V, (B, 20))
    seen = torch.zeros(B, V, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected, atol=0, rtol=0)


def test_temperature_zero_takes_the_likeliest_token(logits):
    settings = GenerationSection(temperature=0, top_k=3, top_p=0.5)
    assert sample(logits, settings, None).tolist() == logits.argmax(-1).tolist()


def test_samples_have_the_frequencies_of_the_distribution():
    torch.manual_seed(0)
    logits, draws = torch.randn(1, 8), 20_000
    settings = GenerationSection(temperature=1.0, top_p=0.9)
    uniforms = torch.rand(draws, 1)
    tokens = sample(logits.expand(draws, 8), settings, uniforms)
    frequencies = torch.bincount(tokens, minlength=8) / draws
    expected = dense(logits, settings)[0]
    # Five standard deviations of a share of 20,000 draws.
    assert (frequencies - expected).abs().max() < 5 * 0.5 / draws**0.5
    assert not frequencies[expected == 0].any()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_random_range_give_tokens_that_were_kept(logits, uniform):
    settings = GenerationSection(temperature=1.0, top_p=0.6)
    tokens = sample(logits, settings, torch.full((B, 1), uniform))
    assert (dense(logits, settings).gather(1, tokens[:, None]) > 0).all()


def test_a_rows_random_numbers_do_not_depend_on_its_neighbours():
    device = torch.device("cpu")
    together = [row_generator(1, [5, 6]), row_generator(1, [7])]
    alone = [row_generator(1, [7])]
    for _ in range(3):
        assert draw_uniforms(together, device)[1].tolist() == draw_uniforms(alone, device)[0].tolist()


def test_seed_prompt_and_occurrence_each_change_the_random_numbers():
    device = torch.device("cpu")
    keys = [(0, [5], 0), (1, [5], 0), (0, [6], 0), (0, [5], 1)]
    generators = [row_generator(*key) for key in keys]
    assert len(set(draw_uniforms(generators, device).flatten().tolist())) == len(keys)
