"""`python -m scripts.chaos`: every stage in a process of its own, then the report."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import scripts.chaos


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.chaos",
        description=scripts.chaos.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments, over all runs")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and inputs")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of the figures as JSON")
    parser.add_argument("--document", type=Path, default=Path("docs/results/chaos.md"), help="page of the tables")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("*.json"):
        old.unlink()
    python = [sys.executable, "-W", "ignore:resource_tracker"]  # a killed Trainer leaves its progress bar's semaphore
    counts = {"kills": ["--kills", options.kills], "malformed": ["--count", 200], "peers": []}
    stages = {
        name: [f"scripts.chaos.{name}", *count, "--seed", options.seed, "--json", options.out / f"{name}.json"]
        for name, count in counts.items()
    }
    made_by = f"python -m scripts.chaos --kills {options.kills} --seed {options.seed}"
    stages["report"] = ["scripts.chaos.report", options.out, options.document, "--command", made_by]
    failed = []
    for name, words in stages.items():
        command = [*python, "-m", *map(str, words)]
        print(f"\n== {name}: {shlex.join(command)}", flush=True)
        started = time.monotonic()
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"== {name} took {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        print(f"not as promised: {' '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
