"""Compiled decoding, traced on a CPU: a GPU's kernels are not generated, but the graph and its cache are the same."""

import pytest
import torch
from tiny import tiny_model
from torch._dynamo.testing import CompileCounter

from minimoe import MiniMoeForCausalLM
from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.generation.compiled import CompiledModel, why_not_compiled
from minimoe.generation.engine import Engine

PROMPTS = ["The cat", "Once upon a time there was a small boat", "What is 3 + 4?"]
GREEDY = GenerationSection(temperature=0, max_new_tokens=12, batch_size=3)
COMPILED = GREEDY.model_copy(update={"compile": True})


class CompilingEngine(Engine):
    """Compiles on a CPU too; `counter` counts the graphs."""

    counter = CompileCounter()

    def fast(self, settings):
        if not settings.compile:
            return super().fast(settings)
        if self._compiled is None:
            self._compiled = CompiledModel(self.model, backend=self.counter)
        return self._compiled


@pytest.fixture
def engine(tiny_tokenizer) -> CompilingEngine:
    torch._dynamo.reset()
    engine = CompilingEngine(tiny_model(vocab_size=448, num_hidden_layers=1, initializer_range=0.5), tiny_tokenizer)
    engine.end_ids = frozenset()  # random weights would often end after a few tokens
    engine.counter.clear()
    return engine


@pytest.fixture
def graphs(engine) -> CompileCounter:
    return engine.counter


def test_prompts_of_unlike_lengths_decode_as_without(engine, graphs):
    expected = [completion.text for completion in engine.generate(PROMPTS, GREEDY)]
    assert [completion.text for completion in engine.generate(PROMPTS, COMPILED)] == expected
    assert graphs.frame_count == 1  # for 11 steps


def test_batches_share_graphs(engine, graphs):
    prompts = ["", *PROMPTS, "A", "The dog and the cat and the boat and the bird", "Grüße aus", "Once", "The"]
    pairs = [settings.model_copy(update={"batch_size": 2}) for settings in (GREEDY, COMPILED)]
    expected, texts = ([completion.text for completion in engine.generate(prompts, each)] for each in pairs)
    assert texts == expected
    assert graphs.frame_count <= 3  # two rows with padding and without, and the last row alone


def test_a_conversation_keeps_its_cache_and_its_graph(engine, graphs):
    sessions = engine.session(), engine.session()
    for prompt in ("The cat", "The cat sat on", "The dog"):  # the last cuts the cache back
        texts = ["".join(s.stream(prompt, g)) for s, g in zip(sessions, (GREEDY, COMPILED), strict=True)]
        assert texts[0] == texts[1]
        assert sessions[0].reused_tokens == sessions[1].reused_tokens
    assert graphs.frame_count == 1


def test_a_cache_that_is_outrun_grows(engine, graphs):
    settings = {"max_new_tokens": 450}
    engine.context_length = 500
    long = GREEDY.model_copy(update=settings), COMPILED.model_copy(update=settings)
    assert len({"".join(engine.stream("The cat", each)) for each in long}) == 1
    assert graphs.frame_count == 2


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(engine):
    session = engine.session()
    "".join(session.stream("The cat", COMPILED))
    pieces = session.stream("The dog", COMPILED)
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert "".join(session.stream("The dog", COMPILED)) == "".join(engine.stream("The dog", GREEDY))


def test_widths_that_no_grouped_product_takes_are_refused(monkeypatch):
    monkeypatch.setattr(MiniMoeForCausalLM, "device", torch.device("cuda"))
    assert why_not_compiled(tiny_model(moe_intermediate_size=24).bfloat16()) is None
    assert "moe_intermediate_size 20 are not both multiples of 8" in str(
        why_not_compiled(tiny_model(moe_intermediate_size=20).bfloat16())
    )


def test_where_it_cannot_be_compiled_an_error_says_why(tiny_tokenizer):
    engine = Engine(tiny_model(vocab_size=448, num_hidden_layers=1), tiny_tokenizer)
    with pytest.raises(UserError, match="the model is on cpu"):
        engine.generate(["The cat"], COMPILED)
    assert "is not MiniMoeForCausalLM" in str(why_not_compiled(torch.nn.Linear(2, 2)))
    with torch.device("meta"):
        assert "on meta" in str(why_not_compiled(tiny_model()))
