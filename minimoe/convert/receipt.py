"""What proves that two folders hold one model: the same logits, greedy tokens, ids of a text and text of ids.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minimoe.conversation import Message
from minimoe.errors import MinimoeError
from minimoe.tokenizer import encode_conversation

# Logits are sums of a few thousand float32 products, made in another order by another library.
BAR = 1e-5
NEW_TOKENS = 24
PROMPTS = (
    "Once upon a time there was a fox who could count to three.",
    "def area(width, height):\n    return width * height\n",
    "数学和音乐 - naïve café, 👩‍👧 <|im_end|>, 12.50 €",
    "The",
)
MESSAGES: tuple[Message, ...] = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "And twice that?"},
)


@dataclass(frozen=True)
class Receipt:
    """The comparison of two models with their tokenizers."""

    num_positions: int  # at which logits were compared
    logit_difference: float | None  # the largest; None: the other program computes none that can be read
    largest_logit: float
    greedy_tokens_equal: bool | None
    texts_equal: bool | None  # ids of every prompt, and its text from the ids
    chat_equal: bool | None  # ids of a conversation; None: not compared, or there is no chat template
    rounding: float | None = None  # by how much the logits move if weights are rounded to the dtype of the copy
    num_bytes: int = 0  # of the new folder

    @property
    def passed(self) -> bool:
        """Whether all that could be compared is equal."""
        close = self.logit_difference is None or self.logit_difference <= BAR * max(1.0, self.largest_logit)
        return close and False not in (self.texts_equal, self.chat_equal, self.greedy_tokens_equal)


def token_ids(tokenizer: Any) -> list[list[int]]:
    """Ids of the prompts, of those that have any."""
    return [ids for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS) if ids]


@torch.no_grad()
def all_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits (S, V) of each prompt in float32."""
    return [model(torch.tensor([list(ids)]), use_cache=False).logits[0].float() for ids in prompts]


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that each prompt is continued with."""
    continued = []
    for ids in prompts:
        room = model.config.max_position_embeddings - len(ids)
        out = model.generate(
            torch.tensor([list(ids)]), do_sample=False, max_new_tokens=max(1, min(NEW_TOKENS, room)), num_beams=1
        )
        continued.append(out[0, len(ids) :].tolist())
    return continued


def largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Over all prompts and positions; a vocabulary may be padded in one of them."""
    return max(
        float((a[:, : e.shape[1]] - e[:, : a.shape[1]]).abs().max()) for a, e in zip(actual, expected, strict=True)
    )


def same_text(first: Any, second: Any) -> tuple[bool, bool | None]:
    """Whether two tokenizers agree on texts, and on a conversation (None without a chat template)."""
    texts = all(
        first(text, add_special_tokens=False)["input_ids"] == second(text, add_special_tokens=False)["input_ids"]
        for text in PROMPTS
    ) and all(first.decode(ids) == second.decode(ids) for ids in token_ids(first))
    if not first.chat_template:
        return texts, None
    return texts, bool(second.chat_template) and (
        encode_conversation(first, MESSAGES) == encode_conversation(second, MESSAGES)
    )


def compare(ours: tuple[Any, Any], other: tuple[Any, Any], **more: Any) -> Receipt:
    """Two models with their tokenizers, both in float32 and in eval mode."""
    (model, tokenizer), (second, second_tokenizer) = ours, other
    prompts = token_ids(tokenizer)
    expected = all_logits(model, prompts)
    texts, chat = same_text(tokenizer, second_tokenizer)
    return Receipt(
        num_positions=sum(map(len, prompts)),
        logit_difference=largest_difference(all_logits(second, prompts), expected),
        largest_logit=max(float(logits.abs().max()) for logits in expected),
        greedy_tokens_equal=greedy(model, prompts) == greedy(second, prompts),
        texts_equal=texts,
        chat_equal=chat,
        **more,
    )


def folder_bytes(folder: Path) -> int:
    """Size of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def refuse_unequal(receipt: Receipt, what: str) -> None:
    """Do not hand out a copy that is not equal.

    Raises:
        MinimoeError: a bug of ours or of the other library.
    """
    if not receipt.passed:
        raise MinimoeError(f"{what} is not the same model, and was not kept: {dataclasses.asdict(receipt)}")


def show(receipt: Receipt, title: str, json_output: bool, **facts: Any) -> None:
    """Print it, for a person or a program."""
    if json_output:
        print(json.dumps({**facts, **dataclasses.asdict(receipt), "passed": receipt.passed}))
        return
    table = Table("compared", "result", title=title)
    for name, fact in facts.items():
        table.add_row(name.replace("_", " "), str(fact))
    if receipt.logit_difference is None:
        table.add_row("logits", "not compared: nothing here reads them")
    else:
        place = f"at {receipt.num_positions} positions, logits up to {receipt.largest_logit:.1f}"
        table.add_row("largest logit difference", f"{receipt.logit_difference:.1e} ({place})")
    if receipt.rounding is not None:
        table.add_row("rounding of the weights", f"moves a logit by up to {receipt.rounding:.1e}")
    verdict = {True: "equal", False: "different", None: "not compared"}
    table.add_row("greedy tokens", verdict[receipt.greedy_tokens_equal])
    table.add_row("text to ids and back", verdict[receipt.texts_equal])
    table.add_row("chat template", verdict[receipt.chat_equal])
    table.add_row("size", f"{receipt.num_bytes / 1e6:,.1f} MB")
    Console().print(table)
