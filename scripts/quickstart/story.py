"""Draws the facts of a story, and writes the story.

A hero looks for an object at a place, for a reason; something is in the way, and somebody gets past it. The
text is put together beat by beat, and every sentence is true of the same facts, so that questions about it
have exact answers.

A hash puts each combination of hero, object and place in one split, once and for all: no story of the
training split mentions a combination that is held out.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from itertools import product

from scripts.quickstart.patterns import (
    CLUES,
    ENDINGS,
    FEELINGS,
    FINDS,
    HABITS,
    HELPS,
    IDEAS,
    MORALS,
    OBSTACLE_SCENES,
    OPENINGS,
    THANKS,
    WANTS,
    WRONG_TURNS,
)
from scripts.quickstart.world import (
    COLOURS,
    HEROES,
    OBJECTS,
    OBSTACLES,
    PLACES,
    REASONS,
    TRAITS,
    Hero,
    Obstacle,
    Place,
)

Combination = tuple[str, str, str]  # names of hero, object, place


@dataclass(frozen=True)
class Facts:
    hero: Hero
    trait: str
    object: str
    colour: str
    place: Place
    wrong_place: Place | None  # where the hero looks first, in vain
    reason: str
    obstacle: Obstacle
    solution: str
    helper: Hero | None  # None: the hero solves it alone

    @property
    def solver(self) -> Hero:
        return self.helper or self.hero

    @property
    def combination(self) -> Combination:
        return self.hero.name, self.object, self.place.name

    @property
    def mentioned_combinations(self) -> list[Combination]:
        """All combinations in the story, those with the helper and the wrong place included."""
        names = [hero.name for hero in (self.hero, self.helper) if hero]
        places = [place.name for place in (self.place, self.wrong_place) if place]
        return list(product(names, [self.object], places))


@dataclass(frozen=True)
class Story:
    facts: Facts
    text: str


def split_of(combination: Combination) -> str:
    """'train' (96 %), 'valid' (2 %) or 'test' (2 %), whatever the seed."""
    bucket = stable_hash("|".join(combination)) % 100
    return "test" if bucket < 2 else "valid" if bucket < 4 else "train"


def stable_hash(text: str) -> int:
    """The same number in every process; Python's `hash` of a text is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def draw_facts(rng: random.Random, split: str) -> Facts:
    """Facts whose combination is in `split`; a training story does not even mention another one."""
    while True:
        hero, helper = rng.sample(HEROES, 2)
        place, wrong_place = rng.sample(PLACES, 2)
        obstacle = rng.choice(OBSTACLES)
        facts = Facts(
            hero=hero,
            trait=rng.choice(TRAITS),
            object=rng.choice(OBJECTS),
            colour=rng.choice(COLOURS),
            place=place,
            wrong_place=wrong_place if rng.random() < 0.25 else None,
            reason=rng.choice(REASONS),
            obstacle=obstacle,
            solution=rng.choice(obstacle.solutions),
            helper=helper if rng.random() < 0.75 else None,
        )
        if split_of(facts.combination) != split:
            continue
        if split == "train" and any(split_of(other) != "train" for other in facts.mentioned_combinations):
            continue
        return facts


def write_story(rng: random.Random, facts: Facts) -> Story:
    """Three paragraphs: who wants what and why; what goes wrong; how it ends."""

    def say(patterns: tuple[str, ...]) -> str:
        return fill(rng, rng.choice(patterns), facts)

    beginning = [say(OPENINGS)]
    if rng.random() < 0.15:
        beginning.append(say(HABITS))
    beginning.append(say(WANTS))
    if facts.wrong_place:
        beginning.append(say(WRONG_TURNS))
    beginning.append(say(CLUES))
    middle = [say(OBSTACLE_SCENES), say(facts.obstacle.attempts)]
    if rng.random() < 0.3:
        middle.append(say(FEELINGS))
    end = [say(HELPS if facts.helper else IDEAS), say(FINDS)]
    if facts.helper:
        end.append(say(THANKS))
    if not facts.helper or rng.random() < 0.5:
        end.append(say(ENDINGS))
    if rng.random() < 0.15:
        end.append(say(MORALS))
    return Story(facts, "\n\n".join(" ".join(sentences) for sentences in (beginning, middle, end)))


def fill(rng: random.Random, pattern: str, facts: Facts) -> str:
    """The pattern with its choices made, its names filled in and its sentences capitalised."""
    chosen = re.sub(r"\(([^()]*\|[^()]*)\)", lambda match: rng.choice(match[1].split("|")), pattern)
    hero, helper = facts.hero, facts.helper
    him, his = {"he": ("him", "his"), "she": ("her", "her")}[hero.he]
    text = chosen.format(
        hero=hero.name,
        species=hero.species,
        he=hero.he,
        He=hero.he.capitalize(),
        him=him,
        his=his,
        His=his.capitalize(),
        trait=facts.trait,
        object=facts.object,
        colour=facts.colour,
        place=facts.place.name,
        at_place=facts.place.phrase,
        at_wrong_place=facts.wrong_place.phrase if facts.wrong_place else "",
        reason=facts.reason,
        obstacle=facts.obstacle.name,
        Obstacle=capitalise(facts.obstacle.name),
        the_obstacle=facts.obstacle.the,
        solution=facts.solution,
        helper=helper.name if helper else "",
        helper_species=helper.species if helper else "",
        solver=facts.solver.name,
    )
    return with_articles(text)


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_articles(text: str) -> str:
    """'a orange' -> 'an orange'; the world has no word where spelling and sound disagree."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
