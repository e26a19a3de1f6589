"""Makes the quickstart corpus on this machine, in seconds, from two sources that cost no download.

1. The story world (`world.py`, `story.py`, `instructions.py`): stories for pretraining, instructions with checkable
   answers for fine-tuning.
2. What every Python carries: the documentation topics of `help()`, and the docstrings (English) and sources
   (code) of the standard library.

The files, one JSON object a line:

    pretrain.jsonl                         {"text", "part"}, part is stories, english or code
    valid_{stories,english,code}.jsonl     {"text", "part"}, documents kept out of pretrain.jsonl
    sft.jsonl, sft_valid.jsonl             {"messages"}
    test.jsonl                             {"task", "messages", "check"}: 200 held-out instructions

Held out from training: whole library modules and help topics; for the stories and tasks every combination of
hero, object and place of a held-out split, and the operand pairs of the test. The same Python version and
seed give the same files, byte for byte.

    python -m scripts.quickstart.make_data --out data/quickstart --seed 0
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import re
import sysconfig
import textwrap
import time
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.quickstart.arithmetic import held_out_pairs_in
from scripts.quickstart.instructions import draw_tasks, exercise_page, row_of, story_page
from scripts.quickstart.story import draw_facts, stable_hash, write_story
from scripts.quickstart.task import Task

TRAIN_BYTES = {"stories": 7_000_000, "english": 1_200_000, "code": 800_000}  # at most, with --scale 1
VALID_BYTES = 130_000  # of each part
SFT_ROWS = {"story": 4600, "question": 5200, "arithmetic": 3900, "reorder": 2300}
SFT_VALID_ROWS = {"story": 90, "question": 90, "arithmetic": 60, "reorder": 60}
TEST_ROWS = {"story": 60, "question": 60, "arithmetic": 40, "reorder": 40}
MAX_TURNS = {"story": 1, "question": 5, "arithmetic": 8, "reorder": 6}  # instructions in one conversation

# Tests, vendored wheels, code tables, and the file that holds the build paths of this machine.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "_bundled",
    "encodings",
    "pydoc_data",
}
SKIPPED_PREFIX = "_sysconfigdata"

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    text: str
    part: str
    origin: str  # "json/decoder.py" or "topic for"; all of one origin goes to the same side


# ------------------------------------------------------------------------------------ Python's own text


def library_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # Sorted as text: the order of a folder differs between machines, and that of paths between systems.
    for module in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not SKIPPED & set(module.split("/")) and SKIPPED_PREFIX not in module:
            yield from module_documents(root / module, module)


def help_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; docstrings are English enough
        return
    for name, text in sorted(topics.items()):
        yield Document(inspect.cleandoc(text), "english", f"topic {name}")


def module_documents(path: Path, origin: str) -> Iterator[Document]:
    """The docstrings of one module, and its functions and classes of a size worth reading."""
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            source = file.read()
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return  # a sample of broken code, or the template of a module
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield Document(ast.get_docstring(node) or "", "english", origin)
    if len(source) <= 4000:
        yield Document(source.strip(), "code", origin)
    else:
        for text in definitions(tree.body, source.splitlines()):
            yield Document(text, "code", origin)


def definitions(body: Iterable[ast.stmt], lines: list[str]) -> Iterator[str]:
    """Sources of functions and classes, decorators included; a class too long is taken method by method."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
        if 200 <= len(text) <= 4000:
            yield text
        elif isinstance(node, ast.ClassDef):
            yield from definitions(node.body, lines)


def real_text(part: str, rng: random.Random, documents: list[Document], scale: float) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of one part: no paragraph twice, nothing near to a validation document."""
    documents = [document for document in documents if document.part == part]
    rng.shuffle(documents)
    sides: dict[bool, list[str]] = {False: [], True: []}
    seen: set[str] = set()
    for document in documents:
        text = without_repeats(document.text, seen)
        if len(text) >= 80 and not held_out_pairs_in(text):
            sides[is_held_out(document)].append(text)
    valid = up_to(VALID_BYTES * scale, sides[True])
    validation_phrases = {phrase for text in valid for phrase in phrases(text)}
    train = [text for text in sides[False] if shared_share(text, validation_phrases) < 0.2]
    return rows(up_to(TRAIN_BYTES[part] * scale, train), part), rows(valid, part)


def is_held_out(document: Document) -> bool:
    """About one origin in ten."""
    return stable_hash(document.origin) % 10 == 0


def without_repeats(text: str, seen: set[str]) -> str:
    """The paragraphs that were not `seen` before: help topics share whole sections."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.expandtabs()):
        key = " ".join(paragraph.split())
        if key and (len(key) < 40 or key not in seen):
            seen.add(key)
            kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines()))
    return "\n\n".join(kept)


def phrases(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """All runs of `length` words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def shared_share(text: str, others: set[tuple[str, ...]]) -> float:
    own = phrases(text)
    return len(own & others) / len(own) if own else 0.0


# ------------------------------------------------------------------------------------- the story world


def story_pages(rng: random.Random, num_bytes: float) -> Iterator[str]:
    """Training stories, with a page of sums or word puzzles now and then."""
    while num_bytes > 0:
        if rng.random() < 0.15:
            page = exercise_page(rng, "train")
        else:
            page = story_page(rng, write_story(rng, draw_facts(rng, "train")))
        num_bytes -= len(page)
        yield page


def validation_stories(rng: random.Random, num_bytes: float) -> list[str]:
    stories: list[str] = []
    while sum(map(len, stories)) < num_bytes:
        stories.append(write_story(rng, draw_facts(rng, "valid")).text)
    return stories


def conversations(rng: random.Random, split: str, counts: dict[str, int], scale: float = 1.0) -> list[Row]:
    """Rows for fine-tuning, the tasks mixed."""
    wanted = [name for name, count in counts.items() for _ in range(max(1, round(count * scale)))]
    rng.shuffle(wanted)
    return [row_of(draw_tasks(rng, name, split, rng.randint(1, MAX_TURNS[name]))) for name in wanted]


def test_tasks(rng: random.Random) -> list[Task]:
    """The held-out instructions, no prompt twice; operand pairs, of which there are few, not twice either."""
    tasks: dict[str, Task] = {}
    for name, count in TEST_ROWS.items():
        drawn: dict[str, Task] = {}
        while len(drawn) < count:
            (task,) = draw_tasks(rng, name, "test")
            drawn.setdefault(task.answer if name == "arithmetic" else task.prompt, task)
        tasks.update(drawn)
    return list(tasks.values())


# ------------------------------------------------------------------------------------------------ main


def rows(texts: Iterable[str], part: str) -> list[Row]:
    return [{"text": text, "part": part} for text in texts]


def up_to(num_bytes: float, texts: list[str]) -> list[str]:
    """The first texts that fit."""
    kept = []
    for text in texts:
        num_bytes -= len(text.encode())
        if num_bytes < 0:
            break
        kept.append(text)
    return kept


def make(library: list[Document], seed: int, scale: float = 1.0) -> dict[str, list[Row]]:
    """The rows of every file. `scale` shrinks all but the test and the validation of the fine-tuning."""
    # A generator for each file, so that a change of one leaves the others as they were.
    rng = {name: random.Random(f"{seed} {name}") for name in ("english", "code", "stories", "valid", "sft", "test")}
    english, valid_english = real_text("english", rng["english"], library, scale)
    code, valid_code = real_text("code", rng["code"], library, scale)
    pretrain = english + code + rows(story_pages(rng["stories"], TRAIN_BYTES["stories"] * scale), "stories")
    rng["stories"].shuffle(pretrain)
    return {
        "pretrain": pretrain,
        "valid_stories": rows(validation_stories(rng["valid"], VALID_BYTES * scale), "stories"),
        "valid_english": valid_english,
        "valid_code": valid_code,
        "sft": conversations(rng["sft"], "train", SFT_ROWS, scale),
        "sft_valid": conversations(rng["valid"], "valid", SFT_VALID_ROWS),
        "test": [
            {"task": task.name, "messages": task.messages[:1], "check": task.check} for task in test_tasks(rng["test"])
        ],
    }


def write(out: Path, files: dict[str, list[Row]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, file_rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in file_rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main(arguments_given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart corpus from what this Python carries.")
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus (default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the training files (default 1.0)")
    arguments = parser.parse_args(arguments_given)
    started = time.perf_counter()
    files = make([*help_topics(), *library_documents()], arguments.seed, arguments.scale)
    write(arguments.out, files)
    print(f"{'file':<22}{'rows':>8}{'MB':>8}")
    for name, file_rows in files.items():
        size = (arguments.out / f"{name}.jsonl").stat().st_size / 1e6
        print(f"{name + '.jsonl':<22}{len(file_rows):>8}{size:>8.2f}")
    for part in TRAIN_BYTES:
        texts = [row["text"] for row in files["pretrain"] if row["part"] == part]
        print(f"  pretrain {part:<11}{len(texts):>8}{sum(len(text.encode()) for text in texts) / 1e6:>8.2f}")
    print(f"written to {arguments.out} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
