"""Instructions about stories: write one, or answer questions about one."""

from __future__ import annotations

import random
import re
from typing import Any

from scripts.quickstart.story import Facts, draw_facts, fill, write_story
from scripts.quickstart.task import HERO_NAMES, Task, contains, position, repeats_itself
from scripts.quickstart.world import COLOURS, OBJECTS, OBSTACLES, PLACES, REASONS

# ---------------------------------------------------------------------------------------------- story

STORY_PROMPTS = (
    "Write a story about {hero} the {species}, a {object} and the {place}.",
    "Tell me a story about {hero} the {species}. It should have a {object} in it and happen {at_place}.",
    "Write a (short|little) story in which {hero} the {species} looks for a {object} {at_place}.",
    "Can you tell me a story with {hero} the {species}, the {place} and a {object}?",
    "I would like a story. Hero: {hero} the {species}. Object: {object}. Place: {place}.",
    "Make up a story: {hero} the {species} finds a {object} {at_place}.",
)


def story_task(rng: random.Random, split: str) -> Task:
    facts = draw_facts(rng, split)
    check = {"hero": facts.hero.name, "object": facts.object, "place": facts.place.name}
    return Task("story", fill(rng, rng.choice(STORY_PROMPTS), facts), write_story(rng, facts).text, check)


def check_story(check: dict[str, Any], answer: str) -> bool:
    """All that was asked for is there, the hero is the protagonist, and the text is a whole story.

    The protagonist is the first of the world's names, and there is room for one other.
    """
    mentioned = [word for word in re.findall(r"\w+", answer) if word in HERO_NAMES]
    return (
        all(contains(answer, wanted) for wanted in check.values())
        and mentioned[0] == check["hero"]
        and 3 * mentioned.count(check["hero"]) >= len(mentioned)
        and len(set(mentioned)) <= 2
        and len(answer.split()) >= 40
        and re.search(r"[.!?]\"?$", answer.strip()) is not None
        and not repeats_itself(answer)
    )


# ------------------------------------------------------------------------------------------- question

# kind of fact -> (question, answer) patterns
QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "hero": (
        ("Who was looking for the {object}?", "{hero} was looking for the {object}."),
        ("Who is the story about?", "The story is about {hero} the {species}."),
        ("Who found the {object}?", "{hero} found the {object}."),
    ),
    "object": (
        ("What was {hero} looking for?", "{hero} was looking for the {object}."),
        ("What did {hero} find {at_place}?", "{hero} found the {object} {at_place}."),
    ),
    "colour": (("What colour was the {object}?", "The {object} was {colour}."),),
    "place": (
        ("Where was the {object}?", "The {object} was {at_place}."),
        ("Where did {hero} find the {object}?", "{hero} found the {object} {at_place}."),
    ),
    "reason": (
        ("Why did {hero} want the {object}?", "{hero} wanted the {object} {reason}."),
        ("What was the {object} for?", "{hero} wanted the {object} {reason}."),
    ),
    "obstacle": (
        ("What was in the way?", "{Obstacle} was in the way."),
        ("What stopped {hero}?", "{Obstacle} stopped {hero}."),
    ),
    "helper": (
        ("Who helped {hero}?", "{helper} the {helper_species} helped {hero}."),
        ("Who came to help?", "{helper} the {helper_species} came to help."),
    ),
    "solution": (
        ("How did {solver} get past {the_obstacle}?", "{solver} {solution}."),
        ("What did {solver} do about {the_obstacle}?", "{solver} {solution}."),
    ),
}

CANDIDATES: dict[str, tuple[str, ...]] = {
    "hero": HERO_NAMES,
    "helper": HERO_NAMES,
    "object": OBJECTS,
    "colour": COLOURS,
    "place": tuple(place.name for place in PLACES),
    "reason": REASONS,
    "obstacle": tuple(obstacle.name.split(" ", 1)[1] for obstacle in OBSTACLES),
    "solution": tuple(solution for obstacle in OBSTACLES for solution in obstacle.solutions),
}

READING_PROMPTS = (
    "{story}\n\nQuestion: {question}",
    "Read the story and answer the question.\n\n{story}\n\n{question}",
    "Here is a story.\n\n{story}\n\nAnswer this: {question}",
)


def fact_of(facts: Facts, kind: str) -> str:
    """The fact as it stands in `CANDIDATES`."""
    helper = facts.helper.name if facts.helper else ""
    return {
        "hero": facts.hero.name,
        "helper": helper,
        "object": facts.object,
        "colour": facts.colour,
        "place": facts.place.name,
        "reason": facts.reason,
        "obstacle": facts.obstacle.name.split(" ", 1)[1],
        "solution": facts.solution,
    }[kind]


def ask(rng: random.Random, facts: Facts, kind: str) -> tuple[str, str]:
    question, answer = rng.choice(QUESTIONS[kind])
    return fill(rng, question, facts), fill(rng, answer, facts)


def question_tasks(rng: random.Random, split: str, number: int = 1) -> list[Task]:
    """Up to `number` questions of different kinds about one story; only the first prompt holds the story."""
    facts = draw_facts(rng, split)
    story = write_story(rng, facts)
    kinds = [kind for kind in QUESTIONS if facts.helper or kind != "helper"]
    tasks = []
    for turn, kind in enumerate(rng.sample(kinds, number)):
        question, answer = ask(rng, facts, kind)
        prompt = rng.choice(READING_PROMPTS).format(story=story.text, question=question) if turn == 0 else question
        check = {"kind": kind, "fact": fact_of(facts, kind), "question": question}
        tasks.append(Task("question", prompt, answer, check))
    return tasks


def check_question(check: dict[str, Any], answer: str) -> bool:
    """Short, names the fact first, and no other fact of its kind but those of the question."""
    allowed = [
        check["fact"],
        *(other for other in CANDIDATES[check["kind"]] if contains(check["question"], other)),
    ]
    found = [candidate for candidate in CANDIDATES[check["kind"]] if contains(answer, candidate)]
    return (
        len(answer.split()) <= 25
        and not repeats_itself(answer)
        and bool(found)
        and set(found) <= set(allowed)
        and min(found, key=lambda candidate: position(answer, candidate)) == check["fact"]
    )
