"""Prompts -> completions: one decode loop behind batches, streams and conversations.

Works with any causal language model of `transformers`. Greedy completions equal
`model.generate(do_sample=False)`, and a completion does not depend on what else is in the batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minimoe.config import GenerationSection, WeightsName
from minimoe.conversation import BadConversation, Message, conversation
from minimoe.errors import UserError
from minimoe.generation.cache import PreallocatedCache
from minimoe.generation.compiled import CompiledModel, why_not_compiled
from minimoe.generation.decode import DecodeBatch
from minimoe.generation.packed import PackedModel, weights_version, why_not_packed
from minimoe.generation.sampling import row_generator
from minimoe.generation.text import Detokenizer, StopFilter
from minimoe.loading import check_vocabulary, load_model
from minimoe.tokenizer import boundary_id, encode_prompt, encode_text

Prompt = str | Sequence[Message]

DEFAULT_CONTEXT = 32_768  # tokens, for the few models whose config names no limit


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    `text` ends before a stop string and has no special tokens; `token_ids` are all generated ids, the ending
    one included. `finish_reason` is "stop" (an end token or a stop string) or "length". `seconds` is the time
    from the prompt's prefill to its last token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    seconds: float
    cut: bool = False  # by a stop string: the last ids are not in the text
    logprobs: tuple[float, ...] | None = None  # of the token ids at the settings' temperature, where asked for

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second; neighbours in a batch share the time."""
        return self.new_tokens / max(self.seconds, 1e-9)


class Engine:
    """A model with its tokenizer, ready to generate."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context_length: int = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        try:
            self._boundary: int | None = boundary_id(tokenizer)
        except UserError:  # neither bos nor eos: fine until somebody asks for text out of nothing
            self._boundary = None
        self.end_ids = _end_ids(model, tokenizer, self._boundary)
        self._packed: PackedModel | None = None
        self._packed_version: object = None
        self._compiled: CompiledModel | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "auto", dtype: torch.dtype | str | None = None) -> Engine:
        """Open a model folder; see `load_model`."""
        return cls(*load_model(path, device, dtype))

    def packed(self, weights: WeightsName = "exact") -> PackedModel | None:
        """The model's fast copy, up to date with its weights; None where `why_not_packed` gives a reason.

        Raises:
            UserError: int8 weights, which only a copy has, where there can be none.
        """
        reason = why_not_packed(self.model)
        if reason and weights == "int8":
            fix = "use weights=exact; int8 is for unchanged minimoe models on a CPU (--device cpu)"
            raise UserError(f"int8 weights are impossible here: {reason}", where="generation.weights", fix=fix)
        if reason:
            return None
        version = (weights, weights_version(self.model))
        if self._packed is None or version != self._packed_version:
            self._packed, self._packed_version = PackedModel(self.model, weights), version
        return self._packed

    def compiled(self) -> CompiledModel:
        """The model with a compiled step.

        Raises:
            UserError: `why_not_compiled` gives a reason.
        """
        reason = why_not_compiled(self.model)
        if reason:
            raise UserError(
                f"decoding cannot be compiled: {reason}", where="generation.compile", fix="use compile=false"
            )
        if self._compiled is None:
            self._compiled = CompiledModel(self.model)
        return self._compiled

    @torch.inference_mode()
    def int8_cost(self, token_ids: Sequence[int]) -> float:
        """Nats by which int8 weights predict a token of this text worse, if the exact model is right about the text.

        That is the divergence KL(exact || int8) of the next token's probabilities, a mean over the positions. It
        is expected where the difference of the losses of one text is drawn, so a short text is enough.
        """
        packed = self.packed("int8")
        assert packed is not None
        int8 = packed.logits(token_ids).double().log_softmax(dim=-1)  # (n, V)
        exact = self.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].double().log_softmax(dim=-1)
        return float(F.kl_div(int8, exact, reduction="batchmean", log_target=True))

    def encode(self, prompt: Prompt, chat: bool = False, enable_thinking: bool | None = None) -> list[int]:
        """Token ids of a prompt.

        A text is a document's beginning, behind the document-start token, or with `chat` the user's first
        message; a list of messages goes through the chat template.

        Raises:
            UserError: nothing to start from, or no room in the context for a new token.
        """
        if not isinstance(prompt, str):
            try:
                ids = encode_prompt(self.tokenizer, conversation(prompt, generated=True), enable_thinking)
            except BadConversation as bad:
                raise UserError(str(bad), where="the conversation", fix="see docs/formats.md for its forms") from None
        elif chat:
            if not prompt.strip():
                raise UserError("the prompt is empty", fix="say something, or generate without chat")
            ids = encode_prompt(self.tokenizer, [{"role": "user", "content": prompt}], enable_thinking)
        else:
            ids = [] if self._boundary is None else [self._boundary]
            ids += encode_text(self.tokenizer, prompt)
        if not ids:
            raise UserError("the prompt is empty, and this tokenizer has no document-start token", fix="give a prompt")
        if len(ids) >= self.context_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context is {self.context_length} tokens",
                fix=f"shorten the prompt to at most {self.context_length - 1} tokens",
            )
        return ids

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSection) -> list[Completion]:
        """Complete all prompts, `settings.batch_size` at a time; results are in the order of the prompts."""
        thinking = settings.enable_thinking
        return self.complete([self.encode(prompt, settings.chat, thinking) for prompt in prompts], settings)

    def complete(
        self,
        prompts: Sequence[list[int]],
        settings: GenerationSection,
        occurrences: Sequence[int] | None = None,
        with_logprobs: bool = False,
    ) -> list[Completion]:
        """`generate` for prompts that are token ids already, each with room in the context for a new token.

        Args:
            occurrences: numbers that make equal prompts differ; None counts them.
            with_logprobs: completions say how likely their tokens were.
        """
        seen: Counter[tuple[int, ...]] = Counter()
        rows = []
        for number, ids in enumerate(prompts):
            occurrence = seen[tuple(ids)] if occurrences is None else occurrences[number]
            rows.append(self._row(ids, settings, occurrence))
            seen[tuple(ids)] += 1
        # Neighbours of similar length need little padding.
        by_length = sorted(rows, key=lambda row: len(row.prompt))
        for start in range(0, len(rows), settings.batch_size):
            chunk = by_length[start : start + settings.batch_size]
            for _ in self._decode(chunk, settings, with_logprobs=with_logprobs):
                pass
        return [row.completion() for row in rows]

    def stream(self, prompt: Prompt, settings: GenerationSection) -> Generator[str, None, None]:
        """Yield the completion's text piece by piece, as soon as it is certain."""
        return self.session().stream(prompt, settings)

    def session(self) -> Session:
        """A conversation that keeps its cache between turns."""
        return Session(self)

    def fast(self, settings: GenerationSection) -> PackedModel | CompiledModel | None:
        """The form of the model that the settings ask for; None decodes with its own forward.

        Raises:
            UserError: int8 weights or a compiled step, where there can be none.
        """
        packed = self.packed(settings.weights)
        return self.compiled() if settings.compile else packed

    def _row(self, ids: list[int], settings: GenerationSection, occurrence: int = 0) -> _Row:
        limit = min(settings.max_new_tokens, self.context_length - len(ids))
        generator = row_generator(settings.seed, ids, occurrence)
        # A control token given as a stop string never shows up in the text: it ends the row by its id.
        control = self.tokenizer.get_added_vocab()
        end_ids = self.end_ids | {control[stop] for stop in settings.stop if stop in control}
        detokenizer = Detokenizer(self.tokenizer, after=ids[-1:])
        return _Row(ids, limit, generator, end_ids, detokenizer, StopFilter(settings.stop))

    def _decode(
        self,
        rows: Sequence[_Row],
        settings: GenerationSection,
        cache: PreallocatedCache | None = None,
        with_logprobs: bool = False,
    ) -> Generator[str, None, None]:
        """Run rows to their ends and yield their pieces of text, of use where there is one row."""
        started = time.perf_counter()
        live = list(rows)  # live[i] is row i of the batch
        batch = DecodeBatch(
            self.model,
            [row.prompt for row in rows],
            max(row.limit for row in rows),
            settings,
            [row.generator for row in rows],
            cache,
            self.fast(settings),
            with_logprobs,
        )
        while True:
            for place, (row, token_id) in enumerate(zip(live, batch.step(), strict=True)):
                if row.finish_reason is None:
                    if with_logprobs:
                        row.logprobs.append(batch.logprobs[place])
                    piece = row.push(token_id)
                    row.seconds = time.perf_counter() - started
                    if piece:
                        yield piece
            unfinished = [index for index, row in enumerate(live) if row.finish_reason is None]
            if not unfinished:
                return
            # Copying the cache pays off when half of it goes, but not compiling for another number of rows.
            if len(unfinished) <= len(live) // 2 and not settings.compile:
                batch.keep(unfinished)
                live = [live[index] for index in unfinished]


class Session:
    """One conversation with its cache: a turn computes only what the cache does not hold yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache: PreallocatedCache | None = None
        self._row: _Row | None = None
        self.reused_tokens = 0  # tokens of the last prompt that were in the cache already

    @property
    def completion(self) -> Completion | None:
        """The last turn so far, also after it was interrupted."""
        return None if self._row is None else self._row.completion()

    def stream(self, prompt: Prompt, settings: GenerationSection) -> Generator[str, None, None]:
        """Answer a conversation, or complete a text; yields text piece by piece.

        The conversation is rendered anew each turn. Where that differs from what the cache holds (the
        template rewrote the past, turns were dropped, the last answer was interrupted), the cache is cut back
        to the common beginning.
        """
        engine = self._engine
        ids = engine.encode(prompt, settings.chat, settings.enable_thinking)
        if self._cache is None:
            self._cache = PreallocatedCache(engine.model.config, min(2 * len(ids) + 256, engine.context_length))
        cached = [] if self._row is None else [*self._row.prompt, *self._row.new_ids]
        common = next((i for i, pair in enumerate(zip(ids, cached, strict=False)) if pair[0] != pair[1]), len(cached))
        # The last token is always fed again: its logits are what the answer starts from.
        self.reused_tokens = self._cache.truncate(min(common, len(ids) - 1))
        self._row = engine._row(ids, settings)
        return engine._decode([self._row], settings, self._cache)

    def reset(self) -> None:
        """Forget the conversation."""
        self._cache = self._row = None


@dataclass
class _Row:
    """One prompt on its way to a completion."""

    prompt: list[int]
    limit: int  # new tokens at most
    generator: torch.Generator
    end_ids: frozenset[int]
    detokenizer: Detokenizer
    stops: StopFilter

    def __post_init__(self) -> None:
        self.new_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.seconds = 0.0

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain and sets `finish_reason` at the end."""
        self.new_ids.append(token_id)
        piece = self.stops.push(self.detokenizer.push(token_id))
        if self.stops.stopped or token_id in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.new_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason:
            # The rest of an unfinished character may still complete a stop string, hence through the filter.
            piece += self.stops.push(self.detokenizer.flush()) + self.stops.flush()
            self.finish_reason = "stop" if self.stops.stopped else self.finish_reason
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion(
            "".join(self.pieces),
            tuple(self.new_ids),
            self.finish_reason or "stop",
            len(self.prompt),
            self.seconds,
            self.stops.stopped,
            tuple(self.logprobs) or None,
        )


def _end_ids(model: Any, tokenizer: Any, boundary: int | None) -> frozenset[int]:
    """Ids that end a completion: those of generation_config and tokenizer, and the document boundary."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    ids = listed if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(int(token_id) for token_id in (*ids, tokenizer.eos_token_id, boundary) if token_id is not None)
