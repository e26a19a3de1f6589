"""An instruction with its reference answer, and what the checks of all answers need: whole words, loops, spelling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from scripts.quickstart.world import HEROES

HERO_NAMES = tuple(hero.name for hero in HEROES)


@dataclass(frozen=True)
class Task:
    name: str
    prompt: str
    answer: str
    check: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def contains(text: str, wanted: str) -> bool:
    return position(text, wanted) >= 0


def position(text: str, wanted: str) -> int:
    """Where `wanted` stands in `text` as whole words, -1 if nowhere; case counts in names only."""
    flags = 0 if wanted in HERO_NAMES else re.IGNORECASE
    match = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, flags)
    return match.start() if match else -1


def repeats_itself(text: str) -> bool:
    """Whether a sentence stands there twice: a model caught in a loop."""
    sentences = [normalise(sentence) for sentence in re.split(r"[.!?]", text)]
    long = [sentence for sentence in sentences if sentence.count(" ") >= 2]  # "Oh dear" may come twice
    return len(set(long)) < len(long)


def normalise(text: str) -> str:
    """Lower case, words only, single spaces."""
    return " ".join(re.findall(r"[\w']+", text.lower()))
