"""Which experts a model's tokens use, and what an expert is for.

N tokens, L MoE layers, E experts, k experts per token, C classes, G documents.

An expert that is special to something tells of it: the mutual information between the experts of a token and a property
of it, in bits. Finite samples have some by chance, so beside it stands what remains when the property is shuffled among
the tokens; the interval is a bootstrap over whole documents, as the tokens of one are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minimoe.errors import UserError
from minimoe.evaluate.perplexity import documents_of, open_documents
from minimoe.generation.engine import Engine

POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # first positions of the classes
_FREQUENT = 200  # tokens that are a class of their own; the rest are one
_SHUFFLES, _RESAMPLES = 20, 200
_BATCH = 16


@dataclass
class Routing:
    """What the routers decided of every token."""

    tokens: np.ndarray  # (N,) ids
    texts: dict[int, str]  # of each id that occurs
    documents: np.ndarray  # (N,)
    positions: np.ndarray  # (N,) in its document, or in the piece of it that was in a row
    sources: np.ndarray  # (N,)
    source_names: list[str]
    experts: np.ndarray  # (N, L, k)
    weights: np.ndarray  # (N, L, k)
    layers: list[int]  # the model's numbers of the MoE layers
    num_experts: int  # choices of a router; one more, the last, for slots left open, if the model has such
    computing: int  # experts among them; later numbers compute nothing

    @property
    def note(self) -> str:
        """What a reader of expert numbers must know; empty for most models."""
        if self.computing == self.num_experts:
            return ""
        return f"numbers from {self.computing} on compute nothing: zero-computation experts, or slots left open"

    def load(self) -> np.ndarray:
        """(L, E): each expert's tokens over a fair share."""
        counts = np.stack([np.bincount(self.experts[:, n].ravel(), minlength=self.num_experts) for n in self._all])
        return counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)

    def coactivation(self, layer: int) -> np.ndarray:
        """(E, E): how often two experts are chosen together, over what chance alone gives; 1 = as by chance."""
        chosen = np.zeros((len(self.tokens), self.num_experts))
        np.put_along_axis(chosen, self.experts[:, layer].astype(np.int64), 1.0, axis=1)
        share = chosen.mean(0)
        k = self.experts.shape[2]
        if k < 2:
            return np.ones((self.num_experts, self.num_experts))
        together = chosen.T @ chosen / len(self.tokens)
        expected = np.outer(share, share) * (k - 1) / k  # a token's k experts are k different ones
        np.fill_diagonal(together, 0.0)
        return together / np.maximum(expected, 1e-12)

    def top_tokens(self, layer: int, expert: int, count: int = 8, least: int = 5) -> list[tuple[str, float, int]]:
        """The tokens that an expert takes most often: text, share of the token's occurrences, and how many."""
        mine = (self.experts[:, layer] == expert).any(1)
        total, taken = Counter(self.tokens.tolist()), Counter(self.tokens[mine].tolist())
        found = [(taken[token] / total[token], taken[token], token) for token in taken if total[token] >= least]
        found.sort(reverse=True)
        return [(self.texts[token], share, occurrences) for share, occurrences, token in found[:count]]

    def contexts(self, layer: int, expert: int, count: int = 3, width: int = 5) -> list[tuple[str, str, str]]:
        """Where an expert has the largest weights: text before, the token, text after."""
        weight = np.where(self.experts[:, layer] == expert, self.weights[:, layer], 0.0).max(1)
        found = []
        for place in np.argsort(-weight, kind="stable")[:count].tolist():
            if weight[place] > 0:
                parts = (range(place - width, place), (place,), range(place + 1, place + 1 + width))
                found.append(tuple(self._text(part, int(self.documents[place])) for part in parts))
        return found  # type: ignore[return-value]

    def _text(self, places: Sequence[int], document: int) -> str:
        here = [n for n in places if 0 <= n < len(self.tokens) and self.documents[n] == document]
        return "".join(self.texts[int(self.tokens[n])] for n in here)

    @property
    def _all(self) -> range:
        return range(self.experts.shape[1])


@dataclass
class Specialisation:
    """How much a layer's experts tell of a property of the tokens, in bits."""

    layer: int
    about: str  # which property
    bits: float
    shuffled: float  # what chance gives
    low: float  # of the 95 % interval
    high: float
    entropy: float  # of the property: the most that could be

    @property
    def excess(self) -> float:
        """Beyond chance."""
        return self.bits - self.shuffled


def route_prompt(model: Any, tokenizer: Any, prompt: str, *, chat: bool = False) -> Routing:
    """One text as generation sees it: behind the document-start token, or with `chat` as the user's message.

    Raises:
        UserError: it has no tokens, or more than the model has positions.
    """
    ids = Engine(model, tokenizer).encode(prompt, chat=chat)
    return _collect(model, tokenizer, [("prompt", [{"input_ids": torch.tensor([ids])}])], len(ids))


def route_files(
    model: Any, tokenizer: Any, paths: Sequence[str], *, most_tokens: int, overrides: Sequence[str] = ()
) -> Routing:
    """The documents of files; each file, folder or glob is a source.

    Args:
        most_tokens: in all, an equal share of each source.
    """
    sources = []
    for path in paths:
        validation = open_documents(documents_of(path, overrides), model, tokenizer)
        batches = (batch.to(model.device).model_inputs() for batch in validation.batches(_BATCH))
        sources.append((path, batches))
    return _collect(model, tokenizer, sources, most_tokens)


@torch.no_grad()
def _collect(model: Any, tokenizer: Any, sources: Sequence[tuple[str, Any]], most_tokens: int) -> Routing:
    config = model.config
    layers = list(range(config.first_k_dense_replace, config.num_hidden_layers))
    if not layers:
        raise UserError("the model has no experts: all of its layers are dense", fix="give a mixture of experts")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    documents = 0
    for source, (_, batches) in enumerate(sources):
        left = max(1, most_tokens // len(sources))
        for inputs in batches:
            inputs = {name: value for name, value in inputs.items() if name in _INPUTS}
            ids = inputs["input_ids"]
            routings = model.model(**inputs, use_cache=False).routings
            mask = inputs.get("attention_mask", torch.ones_like(ids)).bool().flatten().cpu().numpy()
            places = inputs.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids)).flatten().cpu().numpy()
            starts = (places == 0) | (np.arange(len(places)) % ids.shape[1] == 0)
            found = {
                "tokens": ids.flatten().cpu().numpy(),
                "documents": np.cumsum(starts) + documents,
                "positions": places,
                "sources": np.full(len(places), source),
                "experts": torch.stack([r.expert_ids for r in routings], 1).cpu().numpy().astype(np.int16),
                "weights": torch.stack([r.weights for r in routings], 1).float().cpu().numpy(),
            }
            documents += int(starts.sum())
            kept = np.flatnonzero(mask)[:left]
            for name, column in columns.items():
                column.append(found[name][kept])
            left -= len(kept)
            if left <= 0:
                break
    choices = max(config.num_router_outputs, 1 + max(int(part.max()) for part in columns["experts"]))
    joined = {name: np.concatenate(column) for name, column in columns.items()}
    ids_here = np.unique(joined["tokens"]).tolist()
    texts = dict(zip(ids_here, tokenizer.batch_decode([[token] for token in ids_here]), strict=True))
    names = [name for name, _ in sources]
    return Routing(
        **joined, texts=texts, source_names=names, layers=layers, num_experts=choices, computing=config.num_experts
    )


_COLUMNS = ("tokens", "documents", "positions", "sources", "experts", "weights")
_INPUTS = ("input_ids", "attention_mask", "position_ids")


def token_class(text: str) -> str:
    """What kind of text a token is."""
    bare = text.strip()
    if not bare:
        return "space"
    if text.startswith("<|") or (text.startswith("<") and text.endswith(">") and len(text) > 2):
        return "control"
    if bare.isdigit():
        return "digit"
    if bare.isalpha():
        return "word" if text[0].isspace() else "word, continued"
    return "sign" if not any(map(str.isalnum, bare)) else "mixed"


def properties(routing: Routing) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Of each token: a class (N,) and the classes' names, for each property."""
    kinds = {token: token_class(text) for token, text in routing.texts.items()}
    names = sorted(set(kinds.values()))
    common = [token for token, _ in Counter(routing.tokens.tolist()).most_common(_FREQUENT)]
    place = {token: number for number, token in enumerate(common)}
    found = {
        "token class": (np.array([names.index(kinds[token]) for token in routing.tokens.tolist()]), names),
        "token": (
            np.array([place.get(token, len(common)) for token in routing.tokens.tolist()]),
            [routing.texts[token] for token in common] + ["other"],
        ),
        "position": (np.digitize(routing.positions, POSITIONS) - 1, [f"from {first}" for first in POSITIONS]),
    }
    if len(routing.source_names) > 1:
        found["source"] = (routing.sources.astype(np.int64), routing.source_names)
    return found


def specialisation(routing: Routing, seed: int = 0) -> list[Specialisation]:
    """Of every layer and property."""
    rng = np.random.default_rng(seed)
    _, documents = np.unique(routing.documents, return_inverse=True)
    found = []
    for name, (classes, names) in properties(routing).items():
        for n, layer in enumerate(routing.layers):
            experts = routing.experts[:, n].astype(np.int64)
            table = tables(experts, classes, routing.num_experts, len(names))
            shuffled = np.mean(
                [
                    mutual_information(tables(experts, rng.permutation(classes), routing.num_experts, len(names)))
                    for _ in range(_SHUFFLES)
                ]
            )
            low, high = _interval(experts, classes, documents, (routing.num_experts, len(names)), rng)
            share = np.bincount(classes) / len(classes)
            entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum())
            bits = mutual_information(table)
            found.append(Specialisation(layer, name, bits, float(shuffled), low, high, entropy))
    return found


def tables(experts: np.ndarray, classes: np.ndarray, num_experts: int, num_classes: int) -> np.ndarray:
    """(E, C): how many choices of an expert were by tokens of a class; experts (N, k), classes (N,)."""
    cells = experts * num_classes + classes[:, None]
    return np.bincount(cells.ravel(), minlength=num_experts * num_classes).reshape(num_experts, num_classes)


def mutual_information(table: np.ndarray) -> float:
    """Bits that rows and columns of a table of counts (E, C) tell of each other."""
    joint = table / max(table.sum(), 1)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())


def _interval(
    experts: np.ndarray, classes: np.ndarray, documents: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % of the mutual information over documents drawn with replacement, around the estimate (basic bootstrap).

    A resample repeats documents, and what they have by chance with them: the percentiles would lie too high.
    """
    count = int(documents.max()) + 1
    estimate = mutual_information(tables(experts, classes, *shape))
    cells = (experts * shape[1] + classes[:, None]).ravel()
    owners = np.repeat(documents, experts.shape[1])
    values = []
    for _ in range(_RESAMPLES):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        table = np.bincount(cells, weights=times[owners], minlength=shape[0] * shape[1])
        values.append(mutual_information(table.reshape(shape)))
    low, high = np.percentile(values, [2.5, 97.5])
    return max(0.0, float(2 * estimate - high)), max(0.0, float(2 * estimate - low))
