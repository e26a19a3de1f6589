"""What a GPU runs, checked without one.

Tensors of the meta device have shapes and no values: whatever makes the host wait for a device to read a value (a
group's size, a count, a mask) is an error there. It has no autocast, so the model is bfloat16 as a whole.
"""

import pytest
import torch
from tiny import relative_error, tiny_config, tiny_experts, tiny_model
from transformers.cache_utils import StaticCache

from minimoe.data.loader import Batch
from minimoe.model.documents import Documents
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.losses import IGNORE_INDEX
from minimoe.ops import FORMS
from minimoe.train.objectives import Step, next_token

BATCHES = {
    "plain": (),
    "packed documents": ("position_ids",),
    "padding": ("position_ids", "attention_mask"),
}


def step(model, names: tuple[str, ...]) -> None:
    """Forward and, in training, backward of 2 rows of 16 tokens."""
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    inputs = dict.fromkeys(("input_ids", "labels", *names), ids)
    loss = model(**inputs, skip_logits=True, use_cache=False).loss
    if model.training:
        loss.backward()


@pytest.fixture
def make_model():
    def make(**overrides) -> MiniMoeForCausalLM:
        with torch.device("meta"):
            model = MiniMoeForCausalLM(tiny_config(attn_implementation="sdpa", **overrides))
        return model.to(torch.bfloat16)

    return make


@pytest.mark.parametrize(
    ("width", "dtype", "fits"), [(24, torch.bfloat16, True), (20, torch.bfloat16, False), (24, torch.float32, False)]
)
def test_grouped_matmuls_are_used_where_they_fit(width, dtype, fits):
    experts = tiny_experts(4, 32, width).to("meta", dtype)
    tokens, ids = torch.empty(6, 32, dtype=dtype, device="meta"), torch.zeros(6, 2, dtype=torch.long, device="meta")
    arguments = tokens, ids, torch.empty(6, 2, device="meta"), experts
    assert [form.suits(*arguments) for form in FORMS["replicated"] if form.backend == "cuda"] == [fits]


def test_the_meta_device_notices_a_host_that_waits():
    with pytest.raises(NotImplementedError, match="Meta tensors"):
        _ = Documents(torch.zeros(2, 16, device="meta"), None, (2, 16)).lengths


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_the_host_never_waits_for_the_device(make_model, names, scoring_func, training):
    step(make_model(scoring_func=scoring_func).train(training), names)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_the_whole_model_is_one_graph(make_model, training):
    model = make_model(num_hidden_layers=1, n_shared_experts=1).train(training)
    step(torch.compile(model, fullgraph=True, backend="eager"), BATCHES["padding"])


def test_compiled_training_compiles_no_more_however_documents_and_learned_tokens_change():
    torch.compiler.reset()
    model = torch.compile(tiny_model(num_hidden_layers=1).train(), backend="eager")
    graphs = []
    for step_index in range(4):
        ids = torch.randint(0, 97, (2, 32))
        positions = torch.arange(32).remainder(32 // (step_index + 1)).expand(2, 32).contiguous()
        labels = ids.clone()
        labels[:, : 3 * step_index] = IGNORE_INDEX
        batch = Batch(ids, labels, positions, torch.ones_like(ids))
        next_token(model, batch, Step.of(batch)).loss.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * 3


def test_a_static_cache_of_transformers_is_longer_than_the_prompt():
    model = tiny_model(attn_implementation="eager").eval()
    ids, mask = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = model(**inputs, cache=StaticCache(model.config, max_cache_len=24)).logits
    assert relative_error(logits[1], expected[1]) < 1e-6
    assert relative_error(logits[0, 4:], expected[0, 4:]) < 1e-6
