"""Weights that are drawn module by module are those of the whole model, whatever its parts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from minimoe.errors import UserError
from minimoe.train.new_weights import draw, has_none, open_without_weights, read, without_weights
from minimoe.train.sharding import Layout

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


def test_parameters_may_stay_elsewhere_than_the_model_computes():
    model = without_weights(tiny_model().config)
    draw(model, "meta", kept_on="cpu")  # meta as the other device
    assert model.device.type == "meta"
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_folder_is_opened_without_its_weights_and_read_after(tmp_path, tiny_tokenizer):
    saved = tiny_model(vocab_size=len(tiny_tokenizer))
    saved.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = open_without_weights(str(tmp_path))
    assert has_none(model)
    read(model, str(tmp_path), Layout(1, 1, 1), torch.device("cpu"))
    ids = torch.randint(0, 97, (1, 7))
    assert torch.equal(model.eval()(ids).logits, saved.eval()(ids).logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model_type": "llama"}, "a llama model; a minimoe model is needed"), ({"num_experts": 0}, "num_experts")],
)
def test_a_folder_of_something_else_is_refused(values, message, tmp_path, tiny_tokenizer):
    tiny_model(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UserError, match=message):
        open_without_weights(str(tmp_path))


def test_weights_that_are_missing_are_an_error_when_they_are_read(tmp_path, tiny_tokenizer):
    tiny_model(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = open_without_weights(str(tmp_path))
    with pytest.raises(UserError, match="weights missing"):
        read(model, str(tmp_path), Layout(1, 1, 1), torch.device("cpu"))
