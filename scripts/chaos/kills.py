"""The long run: random kills, every failpoint, polite stops; the figures go to a JSON file."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.chaos.faults import die_at, fill_disk_at, interrupt, save_failpoints, steps_for
from scripts.chaos.lab import Lab, Reference, Run

LONG_SAVE_EVERY = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments, over all runs")
    parser.add_argument("--stops", type=int, default=20, help="SIGTERMs at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    figures: dict[str, Any] = {"seed": options.seed, "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        figures["kills"] = _long_kills(lab, options.kills, rng, figures["failures"])
        figures["kills"] += _later_kills(lab, max(options.kills // 10, 1), rng, figures["failures"])
        figures["failpoints"] = _long_failpoints(lab, figures["failures"])
        figures["stops"] = _long_stops(lab, options.stops, rng, figures["failures"])
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if figures["failures"] else 0


def _long_kills(lab: Lab, kills: int, rng: random.Random, failures: list[str]) -> list[dict[str, Any]]:
    """Pretraining and SFT, of an MoE and a dense model, a quarter of the kills each."""
    figures = []
    shares = [kills // 4 + (part < kills % 4) for part in range(4)]
    for dense in (False, True):
        kind = "dense" if dense else "MoE"
        start: Run | None = None
        for stage in ("pretrain", "sft"):
            share = shares.pop(0)
            train: dict[str, Any] = {"max_steps": steps_for(share, LONG_SAVE_EVERY), "save_every": LONG_SAVE_EVERY}
            name = f"{stage}-{kind}"
            run = lab.pretrain(name, dense=dense, **train) if start is None else lab.sft(name, start, **train)
            reference = Reference.of(run.to(lab.folder / f"{name}-whole"))
            start = reference.run
            with _reported(f"{share} random kills of {stage}, {kind}", failures):
                seen = interrupt(reference, run, share, signal.SIGKILL, rng)
                figures.append(
                    {"run": f"{stage}, {kind}", "steps": train["max_steps"], "save_every": LONG_SAVE_EVERY}
                    | {"kills": seen.count, "in_start_up": seen.in_start_up, "while_saving": seen.while_saving}
                    | {"redone": seen.redone, "final_sha256": reference.result["sha256"]}
                )
    return figures


def _later_kills(lab: Lab, kills: int, rng: random.Random, failures: list[str]) -> list[dict[str, Any]]:
    """The stages after SFT, so many kills each."""
    figures = []
    start = lab.pretrain("start", max_steps=20)
    start.finish()
    train: dict[str, Any] = {"max_steps": steps_for(kills, LONG_SAVE_EVERY), "save_every": LONG_SAVE_EVERY}
    for stage in ("lora", "distil", "dpo", "grpo"):
        run = lab.later(stage, stage, start, **train)
        reference = Reference.of(run.to(lab.folder / f"{stage}-whole"))
        with _reported(f"{kills} random kills of {stage}", failures):
            seen = interrupt(reference, run, kills, signal.SIGKILL, rng)
            figures.append(
                {"run": stage, "steps": train["max_steps"], "save_every": LONG_SAVE_EVERY}
                | {"kills": seen.count, "in_start_up": seen.in_start_up, "while_saving": seen.while_saving}
                | {"redone": seen.redone, "final_sha256": reference.result["sha256"]}
            )
    return figures


def _long_failpoints(lab: Lab, failures: list[str]) -> dict[str, int]:
    """Each failpoint of a save: killed at every passage of a run with three saves, and failing like a full disk."""
    reference = Reference.of(lab.pretrain("failpoints", max_steps=12, save_every=4, keep_last=1))
    figures = {"places": 0, "kills": 0, "full_disks": 0}
    for place in save_failpoints():
        with _reported(f"failpoint {place}", failures):
            passage = 1
            while die_at(reference, reference.run.to(lab.folder / f"{place}-{passage}"), place, passage):
                passage += 1
            fill_disk_at(reference, reference.run.to(lab.folder / f"{place}-full"), place, 2)
            figures["places"] += 1
            figures["kills"] += passage - 1
            figures["full_disks"] += 1
    return figures


def _long_stops(lab: Lab, stops: int, rng: random.Random, failures: list[str]) -> dict[str, Any]:
    run = lab.pretrain("stopped", max_steps=steps_for(stops, LONG_SAVE_EVERY), save_every=LONG_SAVE_EVERY)
    reference = Reference.of(run.to(lab.folder / "stopped-whole"))
    with _reported(f"{stops} SIGTERMs", failures):
        seen = interrupt(reference, run, stops, signal.SIGTERM, rng)
        return {"stops": seen.count, "slowest_seconds": max(seen.seconds, default=0.0), "steps_lost": sum(seen.redone)}
    return {}


@contextmanager
def _reported(stage: str, failures: list[str]) -> Iterator[None]:
    """A line of progress; a failure is noted and the next stage goes on."""
    started = time.monotonic()
    try:
        yield
    except AssertionError as error:
        failures.append(f"{stage}: {error}")
    outcome = f"FAILED: {failures[-1]}" if failures and failures[-1].startswith(f"{stage}: ") else "ok"
    print(f"{stage}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
