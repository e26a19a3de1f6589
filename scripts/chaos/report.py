"""What `python -m scripts.chaos` saw, as a page of Markdown tables: docs/results/chaos.md."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.circumstances import circumstances


def kills_table(figures: dict[str, Any]) -> str:
    """Random kills, failpoints and polite stops."""
    lines = [
        f"Seed {figures['seed']}.",
        "",
        "| run | steps, saved every | SIGKILLs | in start-up | while saving | steps redone: mean, most | end |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in figures["kills"]:
        redone = f"{sum(run['redone']) / max(run['kills'], 1):.1f}, {max(run['redone'], default=0)}"
        lines.append(
            f"| {run['run']} | {run['steps']}, {run['save_every']} | {run['kills']} | {run['in_start_up']} "
            f"| {run['while_saving']} | {redone} | same curve, same weights |"
        )
    places, stops = figures["failpoints"], figures["stops"]
    lines += [
        f"| **all** | | **{sum(run['kills'] for run in figures['kills'])}** | | | | |",
        "",
        f"- {places['kills']} kills at {places['places']} places in saving, at every passage: same curve and weights.",
        f"- {places['full_disks']} full disks at the same places: exit 74 each time, nothing lost.",
    ]
    if stops:
        lines.append(
            f"- {stops['stops']} SIGTERMs: exit 75 each time, the slowest after {stops['slowest_seconds']:.2f} s, "
            f"{stops['steps_lost']} steps lost."
        )
    return "\n".join(lines + [f"- **FAILED** {failure}" for failure in figures["failures"]])


def malformed_table(figures: dict[str, Any]) -> str:
    """Malformed configs, rows and command lines."""
    facts = {name.replace("_", " "): value for name, value in figures.items() if isinstance(value, (int, float, str))}
    lines = ["| " + " | ".join(facts) + " |", "|---" * len(facts) + "|", f"| {' | '.join(map(str, facts.values()))} |"]
    return "\n".join(lines)


def peers_table(results: dict[str, Any]) -> str:
    """minimoe, transformers.Trainer and accelerate side by side."""
    systems, versions = results["systems"], results["versions"]
    titles = [f"{name} {versions.get(name.split('.')[0], '')}".strip() for name in systems]
    yes = {True: "yes", False: "**no**"}

    def row(case: str, cell: Callable[[dict[str, Any]], str]) -> str:
        return f"| {case} | " + " | ".join(cell(system) for system in systems.values()) + " |"

    return "\n".join(
        [
            "| case | " + " | ".join(titles) + " |",
            "|---" * (len(systems) + 1) + "|",
            row("resumed in mid-epoch: same bits", lambda found: yes[found["exact"]]),
            row("the same with dropout", lambda found: yes[found["exact_with_dropout"]]),
            row("SIGKILL while saving", lambda found: _torn(found["kills"]["trials"])),
            row("then resumed", lambda found: _verdicts(found["kills"]["trials"])),
            row("disk full while saving", _full_disks),
            row("then resumed, with room", lambda found: _verdicts(found["full_disks"])),
            *(
                row(f"bit flipped in {what}", lambda found, kind=kind: _noticed(found["flips"], kind))  # type: ignore[misc]
                for kind, what in KINDS.items()
            ),
            row("of those noticed, resumed by itself from the one before", lambda found: _recovered(found["flips"])),
        ]
    )


NOT_RUN = "not run"
KINDS = {
    "weights": "the weights",
    "optimizer": "the optimizer's state",
    "rng": "the random generators' file",
    "state": "scheduler, step or manifest",
    "other": "config, tokenizer or others",
}


def _kind(file: str) -> str:
    """What a file of a checkpoint holds."""
    patterns = {
        "weights": r"model.*\.safetensors$",
        "optimizer": r"optimizer\.",
        "rng": r"(rng_state|random_states)",
        "state": r"(scheduler|trainer_state|trainer\.json|manifest)",
    }
    return next((kind for kind, pattern in patterns.items() if re.match(pattern, file)), "other")


def _verdicts(outcomes: list[dict[str, Any]]) -> str:
    words = {"unharmed": "same weights", "stopped": "stop with an error", "other weights": "**other weights, no word**"}
    counts = Counter(outcome["verdict"] for outcome in outcomes)
    return ", ".join(f"{counts[key]} {words[key]}" for key in words if counts[key]) or NOT_RUN


def _torn(trials: list[dict[str, Any]]) -> str:
    return f"{sum(trial['torn'] for trial in trials)} of {len(trials)} hit before it was complete"


def _full_disks(found: dict[str, Any]) -> str:
    disks = found["full_disks"]
    if not disks:
        return NOT_RUN
    codes = ", ".join(str(code) for code in sorted({disk["full"]["status"] for disk in disks}))
    torn = sum(bool(disk["left"]) for disk in disks)
    return f"exit {codes}; {torn} of {len(disks)} leave a torn checkpoint"


def _noticed(flips: list[dict[str, Any]], kind: str) -> str:
    flips = [flip for flip in flips if _kind(flip["file"]) == kind]
    if not flips:
        return "no such file"
    missed = [flip for flip in flips if not flip["noticed"]]
    harmed = sum(flip["verdict"] == "other weights" for flip in missed)
    return f"{len(flips) - len(missed)} of {len(flips)} noticed" + (
        f", **{harmed} end with other weights**" * (harmed > 0)
    )


def _recovered(flips: list[dict[str, Any]]) -> str:
    noticed = [flip for flip in flips if flip["noticed"]]
    return f"{sum(flip['verdict'] == 'unharmed' for flip in noticed)} of {len(noticed)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="folder with kills.json, malformed.json and peers.json")
    parser.add_argument("document", type=Path, help="the page to write")
    parser.add_argument("--command", required=True, help="what made the figures")
    options = parser.parse_args()
    blocks = [circumstances("One run of the accidents", time.strftime("%Y-%m-%d %H:%M %Z"), options.command)]
    sections: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "kills": ("Kills, full disks and polite stops", kills_table),
        "malformed": ("Malformed input", malformed_table),
        "peers": ("Beside transformers.Trainer and accelerate", peers_table),
    }
    for name, (title, render) in sections.items():
        file = options.figures / f"{name}.json"
        body = render(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else NOT_RUN
        blocks.append(f"## {title}\n{body}\n")
    text = "\n".join(blocks)
    print(f"\n{text}")
    options.document.parent.mkdir(parents=True, exist_ok=True)
    options.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
