"""The quickstart corpus keeps its promises: disjoint splits, exact checks, consistent and varied stories."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from typing import Any

import pytest

from scripts.quickstart import make_data as corpus
from scripts.quickstart import patterns, world
from scripts.quickstart.instructions import CHECKS, check_answer, draw_tasks
from scripts.quickstart.reading import CANDIDATES
from scripts.quickstart.score import count_correct, examples
from scripts.quickstart.story import Story, draw_facts, split_of, write_story
from scripts.quickstart.task import Task, contains, normalise

SCALE = 0.05
TASKS = tuple(CHECKS)
NAMES = [hero.name for hero in world.HEROES]
PLACES = [place.name for place in world.PLACES]
TWO_NUMBERS = re.compile(r"(?<!\d)(?=(\d+)\s*(?:[-+]|plus|minus)\s*(\d+)(?!\d))")


@pytest.fixture(scope="module")
def library() -> list[corpus.Document]:
    return [*corpus.help_topics(), *corpus.library_documents()]


@pytest.fixture(scope="module")
def files(library) -> dict[str, list[dict[str, Any]]]:
    return corpus.make(library, seed=0, scale=SCALE)


@pytest.fixture(scope="module")
def training_texts(files) -> list[str]:
    """Everything a model sees in training, one text a document or conversation."""
    conversations = [row["messages"] for row in files["sft"]]
    return [row["text"] for row in files["pretrain"]] + [
        message["content"] for messages in conversations for message in messages
    ]


def tasks_of(name: str, number: int, split: str = "train", seed: int = 0) -> list[Task]:
    rng = random.Random(seed)
    return [task for _ in range(number) for task in draw_tasks(rng, name, split)]


def as_row(task: Task) -> dict[str, Any]:
    return {"task": task.name, "messages": task.messages[:1], "check": task.check}


def stories(number: int) -> list[Story]:
    rng = random.Random(1)
    return [write_story(rng, draw_facts(rng, "train")) for _ in range(number)]


def mentioned_combinations(text: str) -> set[tuple[str, str, str]]:
    words = set(re.findall(r"\w+", text))
    return set(product(words & set(NAMES), words & set(world.OBJECTS), words & set(PLACES)))


# -------------------------------------------------------------------------------------------- files


def test_the_command_writes_every_file_and_says_so(tmp_path, monkeypatch, capsys, library):
    monkeypatch.setattr(corpus, "help_topics", lambda: library)
    monkeypatch.setattr(corpus, "library_documents", lambda: ())
    corpus.main(["--out", str(tmp_path), "--scale", "0.01"])
    printed = capsys.readouterr().out
    for name in ("pretrain", "valid_stories", "valid_english", "valid_code", "sft", "sft_valid", "test"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines
        assert all(isinstance(json.loads(line), dict) for line in lines)
        assert f"{name}.jsonl" in printed


def test_a_seed_always_gives_the_same_rows_and_another_seed_gives_others(files, library):
    assert corpus.make(library, seed=0, scale=SCALE) == files
    other = corpus.make(library, seed=1, scale=0.001)
    assert other["test"] != files["test"]


def test_parts_and_sizes_are_as_asked(files):
    for part, wanted in corpus.TRAIN_BYTES.items():
        size = sum(len(row["text"].encode()) for row in files["pretrain"] if row["part"] == part)
        assert 0.9 * wanted * SCALE < size < 1.1 * wanted * SCALE, part
        valid = sum(len(row["text"].encode()) for row in files[f"valid_{part}"])
        assert 0.5 * corpus.VALID_BYTES * SCALE < valid < 1.3 * corpus.VALID_BYTES * SCALE, part
    assert len(files["sft"]) == sum(round(count * SCALE) for count in corpus.SFT_ROWS.values())
    counts = {task: sum(row["task"] == task for row in files["test"]) for task in TASKS}
    assert counts == corpus.TEST_ROWS
    assert sum(counts.values()) == 200


def test_conversations_alternate_and_test_rows_hold_the_instruction_alone(files):
    for row in files["sft"] + files["sft_valid"]:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    for row in files["test"]:
        assert [message["role"] for message in row["messages"]] == ["user"]


# -------------------------------------------------------------------------------------- disjointness


def test_no_held_out_combination_occurs_in_training(files, training_texts):
    held_out = set()
    for row in files["test"]:
        combinations = mentioned_combinations(row["messages"][0]["content"])
        held_out |= {one for one in combinations if split_of(one) == "test"}
    assert len(held_out) > 150
    for text in training_texts:
        # The lines of a page of word puzzles have nothing to do with one another.
        for story in text.split("\n") if text.startswith("Word puzzles") else [text]:
            assert not mentioned_combinations(story) & held_out


def test_no_held_out_operand_pair_occurs_in_training_whatever_order_and_operation(files, training_texts):
    held_out = {
        frozenset((row["check"]["a"], row["check"]["b"])) for row in files["test"] if row["task"] == "arithmetic"
    }
    for text in training_texts:
        assert not {frozenset(map(int, pair)) for pair in TWO_NUMBERS.findall(text)} & held_out


def test_no_test_story_sentence_or_prompt_occurs_in_training(files, training_texts):
    normalised = "\n".join(normalise(text) for text in training_texts)
    for row in files["test"]:
        if row["task"] != "arithmetic":  # its digits alone are no prompt; see the test above
            assert normalise(row["messages"][0]["content"]) not in normalised
        for order in row["check"].get("orders", ()):
            assert order not in normalised


def test_validation_documents_are_not_near_any_training_document(files):
    for part in ("english", "code", "stories"):
        valid = [corpus.phrases(row["text"]) for row in files[f"valid_{part}"]]
        for row in files["pretrain"]:
            if row["part"] == part:
                words = corpus.phrases(row["text"])
                assert all(len(words & other) <= 0.5 * max(len(words), 1) for other in valid)


def test_modules_and_topics_are_wholly_on_one_side(library):
    sides: dict[str, set[bool]] = {}
    for document in library:
        sides.setdefault(document.origin, set()).add(corpus.is_held_out(document))
    assert all(len(side) == 1 for side in sides.values())
    assert 0.05 < sum(True in side for side in sides.values()) / len(sides) < 0.15


# ----------------------------------------------------------------------------------------- the world


def test_the_words_of_the_world_stand_for_facts_only():
    """Taken out of its facts, a pattern mentions no name, trait, object, colour or place."""
    facts = [*NAMES, *PLACES, *world.TRAITS, *world.OBJECTS, *world.COLOURS]
    assert len(facts) == len(set(facts))
    beats = [beat for beat in vars(patterns).values() if isinstance(beat, tuple)]
    assert len(beats) == 13
    told = [*world.REASONS, *(pattern for beat in beats for pattern in beat)]
    for obstacle in world.OBSTACLES:
        told += [obstacle.name, *obstacle.attempts, *obstacle.solutions]
    told += [hero.species for hero in world.HEROES]
    for pattern in told:
        words = set(re.findall(r"\w+", re.sub(r"\{\w+\}", "", pattern)))
        assert not words & set(facts), pattern


def test_facts_of_one_kind_cannot_be_taken_for_each_other():
    for candidates in CANDIDATES.values():
        for one, other in product(candidates, candidates):
            assert one == other or not contains(one, other)


def test_the_world_is_large_enough():
    assert len(world.HEROES) >= 40
    assert len(world.OBJECTS) >= 40
    assert len(world.PLACES) >= 30


def test_a_story_mentions_its_facts_and_no_others():
    for story in stories(500):
        facts, words = story.facts, set(re.findall(r"\w+", story.text))
        assert words & set(NAMES) == {hero.name for hero in (facts.hero, facts.helper) if hero}
        assert words & set(world.OBJECTS) == {facts.object}
        assert words & set(world.COLOURS) == {facts.colour}
        assert words & set(world.TRAITS) == {facts.trait}
        assert words & set(PLACES) == {place.name for place in (facts.place, facts.wrong_place) if place}
        assert facts.reason in story.text
        assert facts.obstacle.name in story.text.lower()
        assert f"{facts.solver.name} " in story.text
        assert facts.solution in story.text


def test_stories_are_well_formed():
    for story in stories(500):
        assert 60 <= len(story.text.split()) <= 165
        assert story.text.count('"') % 2 == 0
        assert not re.search(r"[{}()|]|  |\ba [aeiou]|\ban [^aeiou]|[.!?] [a-z]|\.\.", story.text.replace('" ', ""))
        pronoun, wrong = (("he", "she"), ("she", "he"))[story.facts.hero.he == "she"]
        words = re.findall(r"\w+", story.text.lower())
        assert pronoun in words
        assert wrong not in words


def test_stories_differ():
    texts = [story.text for story in stories(500)]
    assert len(set(texts)) == len(texts)
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text)]
    assert len(set(sentences)) / len(sentences) > 0.6
    words = [text.split() for text in texts]
    four_grams = {tuple(story[i : i + 4]) for story in words for i in range(len(story) - 3)}
    assert len(four_grams) > 15_000


# --------------------------------------------------------------------------------------- the checker


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_the_reference_answer_is_accepted_and_others_are_not(name, split):
    tasks = tasks_of(name, 200, split)
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        row = as_row(task)
        assert check_answer(row, task.answer), (task.prompt, task.answer)
        assert not check_answer(row, "")
        assert not check_answer(row, "I do not know.")
        assert not check_answer(row, task.prompt), "the prompt echoed"
        assert not check_answer(row, " ".join([task.answer] * 3)) or name == "arithmetic", "a loop"
        if task.check != other.check and name in ("story", "reorder"):
            assert not check_answer(row, other.answer)


def test_a_story_with_a_wrong_hero_or_an_open_end_is_rejected():
    for task in tasks_of("story", 100):
        row, story, hero = as_row(task), task.answer, task.check["hero"]
        stranger = next(name for name in NAMES if name not in story)
        assert not check_answer(row, story.replace(hero, stranger))
        assert not check_answer(row, f"{stranger} was there. {story}"), "starts with somebody else"
        assert not check_answer(row, story.replace(task.check["object"], "thing"))
        assert not check_answer(row, story.replace(task.check["place"], "somewhere"))
        assert not check_answer(row, story.rstrip('.!?"')), "cut off"
        assert not check_answer(row, f"{hero} had a {task.check['object']} at the {task.check['place']}.")


def test_a_question_needs_the_one_right_fact():
    for task in tasks_of("question", 300):
        row, check = as_row(task), task.check
        fact, kind = check["fact"], check["kind"]
        wrong = next(other for other in CANDIDATES[kind] if other != fact and not contains(check["question"], other))
        flags = 0 if kind in ("hero", "helper") else re.IGNORECASE
        assert not check_answer(row, re.sub(re.escape(fact), wrong, task.answer, flags=flags))
        assert not check_answer(row, f"{task.answer} Or was it {wrong}?"), "a guess at two facts"


def test_who_helped_whom_matters():
    row = {"task": "question", "check": {"kind": "helper", "fact": "Milo", "question": "Who helped Pip?"}}
    assert check_answer(row, "Milo the fox helped Pip.")
    assert not check_answer(row, "Pip helped Milo.")


def test_a_wrong_number_is_rejected():
    for task in tasks_of("arithmetic", 300):
        result = task.check["result"]
        assert not check_answer(as_row(task), task.answer.replace(f"= {result}.", f"= {result + 1}."))
        assert not check_answer(as_row(task), f"1{result}")


def test_every_step_of_a_calculation_is_true():
    for task in tasks_of("arithmetic", 500) + tasks_of("arithmetic", 200, "test"):
        values = [eval(side) for side in task.answer.rstrip(".").split("=")]
        assert set(values) == {task.check["result"]}


def test_words_in_another_order_are_rejected():
    for task in tasks_of("reorder", 200):
        words = task.answer.rstrip(".").split()
        assert 5 <= len(words) <= 8
        assert sorted(word.lower() for word in words) == sorted(
            task.prompt.lower().split(": ")[-1].split("? ")[-1].split()
        )
        swapped = [*words[1:], words[0]]
        assert not check_answer(as_row(task), " ".join(swapped))


# ------------------------------------------------------------------------------------------ the score


def test_the_score_counts_per_task_and_shows_examples(files):
    rng = random.Random(0)
    tasks = [task for name in TASKS for _ in range(5) for task in draw_tasks(rng, name, "test")]
    answered = [
        {**as_row(task), "answer": task.answer if index % 5 else "", "correct": index % 5 > 0}
        for index, task in enumerate(tasks)
    ]
    assert all(row["correct"] == check_answer(row, row["answer"]) for row in answered)
    score = count_correct(answered)
    assert score["share"] == 16 / 20
    assert score["tasks"]["story"] == {"correct": 4, "total": 5}
    story, instructions = examples(answered)
    assert story["correct"]
    assert [row["task"] for row in instructions] == ["question", "arithmetic", "reorder"]
