"""What `minimoe inspect` says of experts: the statistics beside slow obvious ones, and what a user gets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny_runs import MODEL, run_command

from minimoe.errors import UserError
from minimoe.generation.engine import Engine
from minimoe.inspect import routing_page
from minimoe.inspect.routing import (
    Routing,
    mutual_information,
    properties,
    route_files,
    route_prompt,
    specialisation,
    tables,
    token_class,
)
from minimoe.train.pretrain import new_model


def make_routing(experts: np.ndarray, tokens: np.ndarray, num_experts: int, length: int = 10, **values) -> Routing:
    """One layer; documents of so many tokens; equal weights."""
    count = len(tokens)
    return Routing(
        tokens=tokens,
        texts={int(token): f" w{token}" for token in np.unique(tokens)},
        documents=np.arange(count) // length,
        positions=np.arange(count) % length,
        sources=values.get("sources", np.zeros(count, np.int64)),
        source_names=values.get("source_names", ["a"]),
        experts=experts[:, None, :],
        weights=np.full((count, 1, experts.shape[1]), 0.5),
        layers=[0],
        num_experts=num_experts,
        computing=num_experts,
    )


@pytest.fixture
def model_dir(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    model = new_model(MODEL | {"first_k_dense_replace": 1, "num_hidden_layers": 3}, tiny_tokenizer, 64, "")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_mutual_information_is_that_of_the_definition():
    table = np.random.default_rng(0).integers(0, 9, (3, 4))
    total, slow = table.sum(), 0.0
    for e in range(3):
        for c in range(4):
            if table[e, c]:
                slow += table[e, c] / total * math.log2(table[e, c] * total / (table[e].sum() * table[:, c].sum()))
    assert mutual_information(table) == pytest.approx(slow, abs=1e-12)
    assert mutual_information(np.eye(4)) == pytest.approx(2.0)  # each expert has one of four classes
    assert mutual_information(np.ones((4, 3))) == pytest.approx(0.0, abs=1e-12)


def test_tables_count_every_choice_of_every_token():
    experts, classes = np.array([[0, 2], [1, 2], [0, 1]]), np.array([0, 1, 1])
    assert tables(experts, classes, 3, 2).tolist() == [[1, 1], [0, 2], [1, 1]]


def test_experts_of_one_token_each_are_found_and_random_ones_are_not():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, 4000)
    sources = rng.integers(0, 2, 4000)
    both = {"sources": sources, "source_names": ["a", "b"]}
    special = {one.about: one for one in specialisation(make_routing(tokens[:, None], tokens, 4, **both))}
    assert special["token"].bits == pytest.approx(2.0, abs=0.01)
    assert special["token"].low > 1.9
    assert special["token"].bits == pytest.approx(special["token"].entropy)
    for about in ("source", "position"):  # which the experts know nothing of
        assert special[about].bits < special[about].shuffled + 0.005
        assert special[about].low == 0.0


def test_the_interval_holds_what_a_larger_sample_gives():
    """Experts follow the document for 60 % of its tokens: tokens are not independent, documents are."""

    def sample(documents: int, seed: int) -> Routing:
        rng = np.random.default_rng(seed)
        source = rng.integers(0, 2, documents).repeat(20)
        experts = np.where(rng.random(len(source)) < 0.6, source, rng.integers(0, 2, len(source)))
        tokens = rng.integers(0, 9, len(source))
        return make_routing(experts[:, None], tokens, 2, 20, sources=source, source_names=["a", "b"])

    def of_source(routing: Routing):
        return next(one for one in specialisation(routing) if one.about == "source")

    truth = of_source(sample(20_000, 99)).bits
    hits = [found.low <= truth <= found.high for found in (of_source(sample(200, seed)) for seed in range(20))]
    assert sum(hits) >= 16  # 19 expected; under 16 of 20 happens once in 500 times


def test_experts_chosen_together_stand_out_against_chance():
    rng = np.random.default_rng(0)
    paired = np.array([[0, 1], [2, 3]])[rng.integers(0, 2, 1000)]
    together = make_routing(paired, np.zeros(1000, np.int64), 4).coactivation(0)
    # each has half of the tokens; two at random would be expected in a quarter, halved as they differ: 1/8
    assert together[0, 1] == pytest.approx(4.0, rel=0.1)
    assert together[0, 2] == 0
    assert together[0, 0] == 0


def test_top_tokens_are_those_that_an_expert_has_the_largest_share_of():
    tokens = np.array([5] * 10 + [6] * 10 + [7] * 3)
    experts = np.array([0] * 10 + [0] * 4 + [1] * 6 + [0] * 3)[:, None]
    routing = make_routing(experts, tokens, 2)
    assert routing.top_tokens(0, 0) == [(" w5", 1.0, 10), (" w6", 0.4, 4)]  # 7 is too rare to say anything
    assert routing.load().tolist() == [[17 / 11.5, 6 / 11.5]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word"),
        ("ing", "word, continued"),
        ("12", "digit"),
        (".", "sign"),
        ("\n\n", "space"),
        ("<|endoftext|>", "control"),
        ("a1", "mixed"),
    ],
)
def test_classes_of_tokens(text, kind):
    assert token_class(text) == kind


def test_what_is_collected_is_what_the_routers_decided(model_dir):
    from minimoe.loading import load_minimoe

    model, tokenizer = load_minimoe(model_dir, "cpu")
    prompt = "The cat sat on the mat"
    routing = route_prompt(model, tokenizer, prompt)
    ids = torch.tensor([Engine(model, tokenizer).encode(prompt)])
    decided = model.model(input_ids=ids).routings
    assert routing.layers == [1, 2]
    for n, one in enumerate(decided):
        assert np.array_equal(routing.experts[:, n], one.expert_ids.numpy())
        assert np.allclose(routing.weights[:, n], one.weights.detach().numpy())
    assert "".join(routing.texts[token] for token in routing.tokens.tolist()) == "<|endoftext|>" + prompt


def test_documents_do_not_depend_on_their_neighbours_and_sources_share_the_tokens(model_dir, write_jsonl):
    from minimoe.loading import load_minimoe

    model, tokenizer = load_minimoe(model_dir, "cpu")
    texts = ["The cat sat on the mat.", "The boat said hello."]
    files = [str(write_jsonl([{"text": text}] * 30, f"{n}.jsonl")) for n, text in enumerate(texts)]
    routing = route_files(model, tokenizer, files, most_tokens=200)
    assert len(routing.tokens) <= 200
    assert set(np.bincount(routing.sources)) == {100}
    assert "source" in properties(routing)
    for source, text in enumerate(texts):
        alone = route_prompt(model, tokenizer, text)
        first = np.flatnonzero(routing.sources == source)[: len(alone.tokens)]
        assert np.array_equal(routing.experts[first], alone.experts)


@pytest.mark.parametrize("overrides", [{"router_type": "top_p"}, {"num_zero_computation_experts": 2}], ids=str)
def test_choices_that_compute_nothing_are_named(overrides, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = MODEL | {"initializer_range": 0.5} | overrides  # so sure that some slots are open
    new_model(sizes, tiny_tokenizer, 64, "").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = ["inspect", str(tmp_path / "model"), "--prompt", "The cat sat on the mat and looked at the moon."]
    assert run_command(monkeypatch, *words, "--html", str(tmp_path / "page.html"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["note"].startswith("numbers from 4 on compute nothing")
    assert "numbers from 4 on compute nothing" in (tmp_path / "page.html").read_text()


def test_a_page_and_json(model_dir, write_jsonl, tmp_path, monkeypatch, capsys):
    data = write_jsonl([{"text": "The </script> cat sat on the mat."}] * 20)
    page = tmp_path / "page.html"
    assert run_command(monkeypatch, "inspect", str(model_dir), "--data", str(data), "--html", str(page), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    assert len(found["layers"][0]["experts"]) == 4
    assert sum(expert["load"] for expert in found["layers"][0]["experts"]) == pytest.approx(4, abs=1e-3)
    assert {one["about"] for one in found["specialisation"]} == {"token class", "token", "position"}
    text = page.read_text()
    assert text.count("</script>") == 2  # the data's and the code's; a text cannot end either
    start = text.index('id="data">') + len('id="data">')
    tokens = json.loads(text[start : text.index("</script>", start)])["tokens"]
    assert "</script>" in "".join(token["t"] for token in tokens)
    assert len(tokens[0]["e"]) == 2


def test_a_terminal_shows_the_expert_of_each_token_without_colour_too(model_dir, monkeypatch, capsys):
    assert run_command(monkeypatch, "inspect", str(model_dir), "--prompt", "The cat", "--layer", "2") == 0
    out = capsys.readouterr().out
    assert "The" in out
    assert set(out) & set("₀₁₂₃")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --prompt and --data"),
        (["--prompt", "x", "--data", "y"], "give one of --prompt and --data"),
        (["--prompt", "The cat", "--layer", "0"], "layer 0 has no experts"),
        (["--chat", "--prompt", ""], "the prompt is empty"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_inspected_is_refused(model_dir, monkeypatch, capsys, words, message):
    assert run_command(monkeypatch, "inspect", str(model_dir), *words) == 2
    assert message in capsys.readouterr().err


def test_a_dense_model_has_nothing_to_inspect(tmp_path, tiny_tokenizer):
    model = new_model(MODEL | {"first_k_dense_replace": 2}, tiny_tokenizer, 64, "")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="no experts"):
        routing_page.run(str(tmp_path / "dense"), prompt="The cat", data=())
