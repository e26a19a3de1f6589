"""A model for `lm-eval` (github.com/EleutherAI/lm-evaluation-harness): it asks for log-likelihoods and for text.

Requests are scored in packed rows, each a document of its own, so that nothing is computed for padding, and logits only
where a continuation is. Continuations of one token after the same context are computed once: the token is no input.

n tokens of a row, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from minimoe.config import GenerationSection
from minimoe.conversation import conversation
from minimoe.generation.engine import Engine
from minimoe.tokenizer import boundary_id, encode_conversation, encode_prompt, encode_text

# Tokens scored together: rows of small models then have matmuls of a good size, and logits stay small.
ROW = 2048
Request = tuple[tuple[str, str], list[int], list[int]]  # its texts, and the ids of context and continuation


class HarnessModel(TemplateLM):
    """A model folder's model behind lm-eval's interface.

    Args:
        engine: model and tokenizer.
        batch_size: texts that are generated together.
    """

    def __init__(self, engine: Engine, batch_size: int = 16) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, engine.tokenizer
        self._boundary, self._batch_size = boundary_id(engine.tokenizer), batch_size
        # lm-eval hands contexts on as text, where a conversation's control tokens look like typed ones.
        self._conversations: dict[str, list[int]] = {}  # ids by that text

    @property
    def eot_token_id(self) -> int:
        """What a text with no context begins after."""
        return self._boundary

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, whose ids are remembered."""
        messages = conversation(chat_history)
        ids = (encode_prompt if add_generation_prompt else encode_conversation)(self.tokenizer, messages)
        text = self.tokenizer.decode(ids)
        self._conversations[text] = ids
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; a control token that a task spells out is text."""
        return encode_text(self.tokenizer, string)

    def context_ids(self, context: str) -> list[int]:
        """Ids of a conversation, with what a task may put behind it, or of a text, which begins as documents do."""
        text = self._conversation_in(context)
        if text is None:
            return [self._boundary, *self.tok_encode(context)]
        return self._conversations[text] + self.tok_encode(context[len(text) :])

    def _conversation_in(self, context: str) -> str | None:
        """The conversation that a context begins with."""
        if context in self._conversations:
            return context
        return max((text for text in self._conversations if context.startswith(text)), key=len, default=None)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's for a text. After a conversation the model speaks, and no token reaches over that border."""
        if self._conversation_in(context) is not None:
            return self.context_ids(context), self.tok_encode(continuation)
        before, after = super()._encode_pair(context, continuation)
        return [self._boundary, *before], after

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation."""
        wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # by what the model reads
        for number, (_, context, continuation) in enumerate(requests):
            ids = [*context, *continuation][-self.engine.context_length - 1 :]
            wanted.setdefault(tuple(ids[:-1]), []).append((number, continuation))
        results: dict[int, tuple[float, bool]] = {}
        rows = list(_rows(sorted(wanted, key=len)))
        for row in _shown(rows, "scoring", disable_tqdm):
            results |= self._score([(ids, wanted[ids]) for ids in row])
        return [results[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _score(self, texts: list[tuple[tuple[int, ...], list[tuple[int, list[int]]]]]) -> dict[int, tuple[float, bool]]:
        """The requests of one row of texts."""
        kept: list[int] = []  # positions whose logits are asked for
        places: list[tuple[int, list[int], slice]] = []  # a request, its continuation, and its logits among these
        start = 0
        for ids, requests in texts:
            longest = min(max(len(continuation) for _, continuation in requests), len(ids))
            start += len(ids)
            kept += range(start - longest, start)
            for number, continuation in requests:
                scored = continuation[-longest:]
                places.append((number, scored, slice(len(kept) - len(scored), len(kept))))
        device = self.engine.model.device
        input_ids = torch.tensor([[token for ids, _ in texts for token in ids]], device=device)
        position_ids = torch.tensor([[place for ids, _ in texts for place in range(len(ids))]], device=device)
        index = torch.tensor(kept, device=device)
        logits = self.engine.model(
            input_ids=input_ids, position_ids=position_ids, logits_to_keep=index, use_cache=False
        ).logits[0]
        scores = logits.float().log_softmax(dim=-1)  # (len(kept), V)
        results = {}
        for number, continuation, place in places:
            rows, targets = scores[place], torch.tensor(continuation, dtype=torch.long, device=device)
            chosen = rows.gather(1, targets[:, None]).sum()
            results[number] = (chosen.item(), bool((rows.argmax(dim=-1) == targets).all()))
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token predicted once from as much context as there is room for."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pieces = get_rolling_token_windows(
                self.tok_encode(text), self._boundary, max_seq_len=self.engine.context_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((("", text), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the stop strings that each request gives."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        batches = [
            numbers[start : start + self._batch_size]
            for numbers in alike.values()
            for start in range(0, len(numbers), self._batch_size)
        ]
        for numbers in _shown(batches, "generating", disable_tqdm):
            settings = _settings(requests[numbers[0]].args[1], self._batch_size)
            # Of a context that is too long its end, with room for an answer.
            length = self.engine.context_length
            room = max(1, length - min(settings.max_new_tokens, length // 2))
            prompts = [self.context_ids(requests[number].args[0])[-room:] for number in numbers]
            for number, completion in zip(numbers, self.engine.complete(prompts, settings), strict=True):
                texts[number] = completion.text
        return [texts[number] for number in range(len(requests))]


def _settings(asked: dict[str, Any], batch_size: int) -> GenerationSection:
    """lm-eval's words for how to generate; nothing random unless a task asks for it."""
    until = asked.get("until") or ()
    return GenerationSection(
        max_new_tokens=asked.get("max_gen_toks", 256),
        temperature=asked.get("temperature", 0.0) if asked.get("do_sample") else 0.0,
        top_p=asked.get("top_p", 1.0),
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
        batch_size=batch_size,
    )


def _rows(texts: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Texts, shortest first, in rows of `ROW` tokens; a longer text is a row of its own."""
    row: list[tuple[int, ...]] = []
    size = 0
    for ids in texts:
        if row and size + len(ids) > ROW:
            yield row
            row, size = [], 0
        row.append(ids)
        size += len(ids)
    if row:
        yield row


def _shown(parts: Sequence[Any], what: str, silent: bool) -> Iterable[Any]:
    console = Console(file=sys.__stderr__)
    return parts if silent or not console.is_terminal else track(parts, what, console=console, transient=True)
