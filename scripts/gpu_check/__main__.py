"""Run the parts one after the other, each in a process of its own with a time limit, and write what they find.

`results.jsonl` gets a line for each figure as soon as it is known; `page.md` is made anew after each part, so that a
run that is cut off leaves what it had found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.gpu_check.page import write_page

RESULTS = "results.jsonl"
# Each with its seconds at most; together below 8 minutes. What matters most comes first.
PARTS = {
    "machine": 25,
    "dispatch": 40,
    "documents": 25,
    "curves": 30,
    "synchronisation": 15,
    "graphs": 60,
    "generation": 45,
    "resume": 60,
    "speed": 100,
    "profile": 25,
    "decoding": 40,
    "learning": 215,
}
TOTAL_SECONDS = 470


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/gpu_check"), help="folder [runs/gpu_check]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, to test the script")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _run_part(options.part, options.device, options.out, options.limit)
        return 0
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / RESULTS).write_text("")
    started, failed = time.monotonic(), 0
    for name in options.parts.split(","):
        left = TOTAL_SECONDS - (time.monotonic() - started)
        outcome, seconds = "no time left", 0.0
        if left > 5:
            outcome, seconds = in_a_process(name, options.device, options.out, min(PARTS[name], left))
        wrong = _wrong(options.out, name)
        if wrong:
            outcome += f", {wrong} figures are wrong"
        record(options.out, part=name, outcome=outcome, seconds=round(seconds, 1))
        write_page(options.out, options.out / RESULTS)
        print(f"{name}: {outcome}, {seconds:.0f} s", flush=True)
        failed += outcome not in ("done", "time is up", "no time left")
    print(f"{options.out}/page.md")
    return 1 if failed else 0


def record(out: Path, **values: object) -> None:
    """Add a line to the results."""
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _wrong(out: Path, name: str) -> int:
    """How many of a part's comparisons failed."""
    rows = [json.loads(line) for line in (out / RESULTS).read_text(encoding="utf-8").splitlines()]
    return sum(row["part"] == name and row.get("right") is False for row in rows)


def in_a_process(name: str, device: str, out: Path, limit: float) -> tuple[str, float]:
    """How a part ended, and its seconds."""
    command = [sys.executable, "-m", "scripts.gpu_check", str(out), "--device", device, "--part", name]
    command += ["--limit", str(limit)]
    started = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "time is up", time.monotonic() - started
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return "done" if code == 0 else f"failed: {last[:200]}", time.monotonic() - started


def _run_part(name: str, device: str, out: Path, limit: float) -> None:
    module = "parts" if name not in ("speed", "profile", "decoding", "learning") else "speed"
    part = getattr(importlib.import_module(f"scripts.gpu_check.{module}"), name)
    for values in part(device, limit) if name == "learning" else part(device):
        record(out, part=name, **values)
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main())
