"""Shuffled words to be put in order."""

from __future__ import annotations

import random
from typing import Any

from scripts.quickstart.story import draw_facts, fill
from scripts.quickstart.task import HERO_NAMES, Task, normalise

# Five to eight words; those that end with the place may as well begin with it.
SENTENCES = (
    "{hero} found the {object} {at_place}.",
    "{hero} hid a {object} {at_place}.",
    "{hero} lost the {object} {at_place}.",
    "{hero} saw a {colour} {object} {at_place}.",
    "{hero} left {his} {object} {at_place}.",
    "{hero} dropped a {object} {at_place}.",
    "{hero} carried the {object} to the {place}.",
    "{hero} took a {object} to the {place}.",
    "{hero} brought the {object} from the {place}.",
    "The {object} {at_place} belongs to {hero}.",
    "{hero} likes the {object} {at_place}.",
    "{hero} has a {object} {at_place}.",
)

REORDER_PROMPTS = (
    "Put these words in order: {words}",
    "Put the words in the right order: {words}",
    "Make a sentence from these words: {words}",
    "Which sentence can you make from these words? {words}",
)


def reorder_task(rng: random.Random, split: str) -> Task:
    facts = draw_facts(rng, split)
    answer = fill(rng, rng.choice(SENTENCES), facts)
    orders = [normalise(answer)]
    phrase = facts.place.phrase
    if orders[0].endswith(phrase):
        orders.append(f"{phrase} {orders[0].removesuffix(phrase).strip()}")
    words = [word if word in HERO_NAMES else word.lower() for word in answer.rstrip(".").split()]
    while normalise(" ".join(words)) in orders:
        rng.shuffle(words)
    prompt = rng.choice(REORDER_PROMPTS).format(words=" ".join(words))
    return Task("reorder", prompt, answer, {"orders": orders})


def check_reorder(check: dict[str, Any], answer: str) -> bool:
    return normalise(answer) in check["orders"]
