"""Weights that are drawn module by module are those of the whole model, whatever its parts."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from minimoe.train.new_weights import draw, has_none, without_weights

VARIANTS = [
    {},
    {"tie_word_embeddings": False, "n_shared_experts": 1, "first_k_dense_replace": 1},
    {"scoring_func": "sigmoid"},
    {"router_type": "noisy_top_k"},
    {"router_type": "hash", "router_aux_loss_coef": 0.0},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_every_weight_and_buffer_is_given_its_value(overrides):
    config = tiny_model(**overrides).config
    model = without_weights(config)
    assert has_none(model)
    torch.manual_seed(5)
    draw(model)
    assert not has_none(model)
    twin = without_weights(config).to_empty(device="cpu")
    twin.tie_weights()
    torch.manual_seed(5)
    twin.initialize_weights()  # as `transformers` does, in the same order
    ends = {"lm_head.weight", "model.embed_tokens.weight"} if config.tie_word_embeddings else set()
    for (name, tensor), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        # Tied weights keep what was drawn for them first, there what was drawn last.
        assert torch.equal(tensor, expected) != (name in ends), name
    for (name, buffer), expected in zip(model.named_buffers(), dict(twin.named_buffers()).values(), strict=True):
        assert torch.equal(buffer, expected), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    ids = torch.randint(0, 97, (2, 9))
    assert torch.isfinite(model(ids, labels=ids).loss)


def test_two_draws_of_a_seed_are_the_same():
    config = tiny_model().config
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(without_weights(config))
        draw(models[-1])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
