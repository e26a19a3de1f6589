"""What a GPU runs, checked without one.

Tensors of the meta device have shapes and no values: whatever makes the host wait for a device to read a value (a
group's size, a count, a mask) is an error there. It has no autocast, so the model is bfloat16 as a whole.
"""

import contextlib

import pytest
import torch
from tiny import tiny_config

from minimoe.model import precision
from minimoe.model.attention import document_lengths
from minimoe.model.decoder import MiniMoeForCausalLM

BATCHES = {
    "plain": (),
    "packed documents": ("position_ids",),
    "padding": ("position_ids", "attention_mask"),
}


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(precision, "compute_dtype", lambda _, default: default)


def step(model, names: tuple[str, ...]) -> None:
    """Forward and, in training, backward of 2 rows of 16 tokens."""
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    inputs = dict.fromkeys(("input_ids", "labels", *names), ids)
    loss = model(**inputs, skip_logits=True, use_cache=False).loss
    if model.training:
        loss.backward()


@pytest.fixture
def make_model(no_autocast):
    def make(**overrides) -> MiniMoeForCausalLM:
        with torch.device("meta"):
            model = MiniMoeForCausalLM(tiny_config(attn_implementation="sdpa", **overrides))
        return model.to(torch.bfloat16)

    return make


def test_the_meta_device_notices_a_host_that_waits():
    with pytest.raises(NotImplementedError, match="Meta tensors"):
        document_lengths(torch.zeros(2, 16, device="meta"), None, (2, 16))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_the_host_never_waits_for_the_device(make_model, names, scoring_func, training):
    step(make_model(scoring_func=scoring_func).train(training), names)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_the_whole_model_is_one_graph(make_model, training):
    model = make_model(num_hidden_layers=1, n_shared_experts=1).train(training)
    step(torch.compile(model, fullgraph=True, backend="eager"), BATCHES["padding"])
