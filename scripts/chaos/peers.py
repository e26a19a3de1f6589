"""The same three accidents for minimoe, `transformers.Trainer` and `accelerate`: what is lost, and who notices?

1. SIGKILL at a random instant while the second checkpoint is being written, then resume.
2. One flipped bit in one file of the newest checkpoint, for every file, then resume.
3. The disk fills up while the second checkpoint is written; then there is room again, and resume.

A run counts as unharmed when its final weights have the SHA-256 of an undisturbed run's. Prints the table as Markdown.
About 4 minutes on 2 cores; the small disk needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.chaos.faults import small_disk
from scripts.chaos.processes import SERVER, wait
from scripts.chaos.report import peers_table
from scripts.chaos.systems import PRELOADED, SAVE_EVERY, STEPS, System, systems

# Number, in order of saving, of the checkpoint that the accidents happen to; the one before is there to fall back on.
SECOND = 2 * SAVE_EVERY


def kills_while_saving(system: System, root: Path, trials: int, rng: random.Random, sha: str) -> dict[str, Any]:
    """Kill at a random instant of the second save, resume, and see what comes out."""
    window = _save_seconds(system, root / "timed")
    outcomes: list[dict[str, Any]] = []
    while len(outcomes) < trials:
        folder = root / f"kill-{len(outcomes)}"
        process = system.start(folder, False, 0.0)
        _wait_for(folder / system.writing.format(SECOND), process)
        time.sleep(rng.uniform(0, window))
        process.kill()
        wait(process)
        torn = not system.complete(folder, SECOND)
        outcome = system.finish(folder, resume=True) | {"torn": torn}
        outcomes.append(outcome | {"verdict": _verdict(outcome, sha)})
        shutil.rmtree(folder)
    return {"window_seconds": window, "trials": outcomes}


def flipped_bits(system: System, root: Path, whole: Path, flips: int, rng: random.Random, sha: str) -> list[Any]:
    """In every file of the newest of two checkpoints: is the damage seen?"""
    outcomes = []
    newest = STEPS - SAVE_EVERY
    start = _cut_back(system, whole, root / "cut", newest)
    for name in sorted(path.name for path in (start / system.checkpoint.format(newest)).iterdir()):
        for _ in range(flips):
            folder = root / "flipped"
            shutil.copytree(start, folder)
            file = folder / system.checkpoint.format(newest) / name
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
            _touch(file.parent)
            outcome = system.finish(folder, resume=True)
            noticed = outcome["status"] != 0 or outcome["resumed_from"] != newest
            outcomes.append({"file": name, "noticed": noticed, "verdict": _verdict(outcome, sha)} | outcome)
            shutil.rmtree(folder)
    return outcomes


def full_disks(system: System, root: Path, whole: Path, sha: str) -> list[Any]:
    """Room for one checkpoint and a part of the second; later there is room enough. Empty where nobody may mount."""
    outcomes: list[Any] = []
    size = _size(whole / system.checkpoint.format(STEPS))
    for part in (0.1, 0.4, 0.7, 0.95):
        disk = root / f"disk-{part}"
        folder = disk / "run"
        try:
            with small_disk(disk, int((1 + part) * size) + (64 << 10)) as grow:
                full = system.finish(folder)
                torn = [folder / name.format(SECOND) for name in (system.checkpoint, system.writing)]
                left = [str(path.relative_to(folder)) for path in torn if path.exists()]
                grow(12 * size)
                resumed = system.finish(folder, resume=True)
        except PermissionError as error:
            print(error, file=sys.stderr)
            return []
        verdict = _verdict(resumed, sha)
        outcomes.append(resumed | {"room": part, "full": full, "left": left, "verdict": verdict})
    return outcomes


def exactness(system: System, root: Path, whole: Path, sha: str, dropout: float) -> bool:
    """Whether a run resumed in the middle of an epoch ends with an undisturbed run's weights."""
    start = _cut_back(system, whole, root / f"exact-{dropout}", STEPS - SAVE_EVERY)
    return system.finish(start, resume=True, dropout=dropout)["sha256"] == sha


def _verdict(outcome: dict[str, Any], sha: str) -> str:
    if outcome["status"]:
        return "stopped"
    return "unharmed" if outcome["sha256"] == sha else "other weights"


def _cut_back(system: System, whole: Path, folder: Path, step: int) -> Path:
    """A copy of a finished run as it was when it had saved `step`."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / system.checkpoint.format(STEPS))
    for later in range(step + SAVE_EVERY, STEPS, SAVE_EVERY):
        shutil.rmtree(folder / system.checkpoint.format(later), ignore_errors=True)
    _touch(folder / system.checkpoint.format(step))
    return folder


def _touch(checkpoint: Path) -> None:
    """Make it the newest by time, which copying does not keep."""
    os.utime(checkpoint)


def _save_seconds(system: System, folder: Path) -> float:
    """How long a save takes, from its folder to its last file."""
    process = system.start(folder, False, 0.0)
    _wait_for(folder / system.writing.format(SECOND), process)
    started = time.monotonic()
    _wait_for(folder / system.checkpoint.format(SECOND) / system.last_file, process)
    seconds = time.monotonic() - started
    process.kill()
    wait(process)
    return seconds


def _wait_for(path: Path, process: Any) -> None:
    while not path.exists():
        if process.exitcode is not None:
            raise SystemExit(f"{path} did not appear, the process ended with {process.exitcode}")
        time.sleep(0.0005)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def examine(system: System, root: Path, trials: int, flips: int, seed: int) -> dict[str, Any]:
    """All accidents of one system."""
    rng = random.Random(seed)
    whole, with_dropout = root / "whole", root / "whole-dropout"
    system.finish(root / "warm-up")  # tokenised data is cached from here
    sha = system.finish(whole)["sha256"]
    dropped = system.finish(with_dropout, dropout=0.1)["sha256"]
    assert sha, system.log.read_text()
    return {
        "repeatable": system.finish(root / "again")["sha256"] == sha,
        "exact": exactness(system, root, whole, sha, 0.0),
        "exact_with_dropout": exactness(system, root, with_dropout, dropped, 0.1),
        "kills": kills_while_saving(system, root, trials, rng, sha),
        "flips": flipped_bits(system, root, whole, flips, rng, sha),
        "full_disks": full_disks(system, root, whole, sha),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="minimoe, transformers.Trainer and accelerate in the same accidents")
    parser.add_argument("--trials", type=int, default=12, help="kills while saving, for each system")
    parser.add_argument("--flips", type=int, default=3, help="flipped bits for each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for everything seen")
    options = parser.parse_args()
    SERVER.set_forkserver_preload(PRELOADED)
    packages = ("torch", "transformers", "accelerate", "safetensors")
    results: dict[str, Any] = {"versions": {name: version(name) for name in packages}, "systems": {}}
    with tempfile.TemporaryDirectory() as folder:
        for system in systems(Path(folder)):
            started = time.monotonic()
            root = Path(folder) / system.name
            root.mkdir()
            results["systems"][system.name] = examine(system, root, options.trials, options.flips, options.seed)
            print(f"{system.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(root)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(peers_table(results))


if __name__ == "__main__":
    main()
