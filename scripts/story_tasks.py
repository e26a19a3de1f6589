"""Instructions about the story world, and the program that marks the answers.

Four tasks: write a `story`, answer a `question` about a given story, do some `arithmetic`, `reorder` shuffled
words. Each comes with a reference answer and with a `check`, the data that `check_answer` needs to judge any
answer without the reference.

What is held out never occurs in training: combinations of hero, object and place (`story_writer.split_of`),
and operand pairs (`is_held_out_pair`), whatever the operation and the order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from story_world import (
    COLOURS,
    HEROES,
    OBJECTS,
    OBSTACLES,
    PLACES,
    REASONS,
)
from story_writer import Facts, Story, draw_facts, fill, stable_hash, write_story


@dataclass(frozen=True)
class Task:
    name: str
    prompt: str
    answer: str
    check: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


HERO_NAMES = tuple(hero.name for hero in HEROES)

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


# ----------------------------------------------------------------------------------------- arithmetic

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
}
WORDS = {"+": "plus", "-": "minus"}
# The look-ahead finds overlapping pairs: "43 - 10 - 7" holds (43, 10) and (10, 7).
PAIR = re.compile(r"(?<!\d)(?=(\d+)\s*(?:\+|-|plus|minus)\s*(\d+)(?!\d))")

ARITHMETIC_PROMPTS = (
    "What is {a} {sign} {b}?",
    "{a} {sign} {b} = ?",
    "Calculate {a} {sign} {b}.",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
)

Problem = tuple[int, str, int]


def is_held_out_pair(a: int, b: int) -> bool:
    """About one pair in eight; small numbers and whole tens are the tables one counts with."""
    low, high = sorted((a, b))
    if high <= 10 or high > 49 or low < 2 or low % 10 == 0 or high % 10 == 0:
        return False
    return stable_hash(f"{low},{high}") % 8 == 0


def held_out_pairs_in(text: str) -> list[tuple[int, int]]:
    pairs = [(int(a), int(b)) for a, b in PAIR.findall(text)]
    return [pair for pair in pairs if is_held_out_pair(*pair)]


def worked(problem: Problem) -> str:
    """The calculation, tens and ones apart: "17 + 26 = 30 + 13 = 43."

    A small model cannot carry in its head, as the first digit it writes depends on the last ones it reads;
    each part of this chain needs one digit of each operand only.
    """
    a, sign, b = problem
    result = OPERATIONS[sign](a, b)
    if sign == "+" and max(a, b) > 9 and a % 10 and b % 10:
        return f"{a} + {b} = {a - a % 10 + b - b % 10} + {a % 10 + b % 10} = {result}."
    if sign == "-" and b > 9 and b % 10:
        return f"{a} - {b} = {a - b + b % 10} - {b % 10} = {result}."
    return f"{a} {sign} {b} = {result}."


def draw_problem(rng: random.Random, held_out: bool) -> Problem:
    """A problem with a held-out pair of operands, or one without such a pair, in its steps too."""
    while True:
        sign = rng.choice("+-")
        if rng.random() < 0.2:  # tables: whole tens and small numbers, as they occur in the steps
            a, b = rng.choice(((10 * rng.randint(1, 9), rng.randint(1, 72)), (rng.randint(1, 49), rng.randint(1, 9))))
        else:
            a, b = rng.randint(2, 49), rng.randint(2, 49)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        problem = (a, sign, b)
        if OPERATIONS[sign](a, b) in (a, b):
            continue  # the answer must not stand in the question
        held_out_pairs = set(held_out_pairs_in(worked(problem)))
        if held_out_pairs == ({(a, b)} if held_out else set()):
            return problem


def arithmetic_task(rng: random.Random, split: str) -> Task:
    problem = draw_problem(rng, held_out=split == "test")
    a, sign, b = problem
    prompt = rng.choice(ARITHMETIC_PROMPTS).format(a=a, b=b, sign=sign, word=WORDS[sign])
    check = {"a": a, "operation": sign, "b": b, "result": OPERATIONS[sign](a, b)}
    return Task("arithmetic", prompt, worked(problem), check)


def check_arithmetic(check: dict[str, Any], answer: str) -> bool:
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and int(numbers[-1]) == check["result"]


# -------------------------------------------------------------------------------------------- reorder

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


# ------------------------------------------------------------------------------------------- together

CHECKS = {
    "story": check_story,
    "question": check_question,
    "arithmetic": check_arithmetic,
    "reorder": check_reorder,
}


def check_answer(row: dict[str, Any], answer: str) -> bool:
    """Whether `answer` follows the instruction of a `{"task", "messages", "check"}` row."""
    return CHECKS[row["task"]](row["check"], answer)


def draw_tasks(rng: random.Random, name: str, split: str, turns: int = 1) -> list[Task]:
    """One conversation of `turns` instructions; a story is always one."""
    if name == "story":
        return [story_task(rng, split)]
    if name == "question":
        return question_tasks(rng, split, turns)
    draw = {"arithmetic": arithmetic_task, "reorder": reorder_task}[name]
    return [draw(rng, split) for _ in range(turns)]


def story_page(rng: random.Random, story: Story) -> str:
    """A story for pretraining: often under a title that names what comes, sometimes with questions below."""
    facts, page = story.facts, story.text
    if rng.random() < 0.4:
        page = f"{facts.hero.name}, the {facts.object} and the {facts.place.name}\n\n{page}"
    if rng.random() < 0.3:
        kinds = [kind for kind in QUESTIONS if facts.helper or kind != "helper"]
        asked = [ask(rng, facts, kind) for kind in rng.sample(kinds, 2)]
        page += "\n\n" + "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in asked)
    return page


def exercise_page(rng: random.Random, split: str) -> str:
    """A page of sums or of word puzzles for pretraining."""
    if rng.random() < 0.5:
        return "Sums\n\n" + "\n".join(arithmetic_task(rng, split).answer for _ in range(12))
    puzzles = [reorder_task(rng, split) for _ in range(5)]
    return "Word puzzles\n\n" + "\n".join(f"{puzzle.prompt}\n{puzzle.answer}" for puzzle in puzzles)


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


def row_of(tasks: Sequence[Task]) -> dict[str, Any]:
    """The conversation as a training row."""
    return {"messages": [message for task in tasks for message in task.messages]}
