"""Bits per byte of held-out text against seconds of training, of several settings side by side.

    python -m scripts.benchmark.curves configs/quickstart/pretrain.yaml data.train=speeches.jsonl --seconds 90 \
        --run moe --run dense model.first_k_dense_replace=4 model.intermediate_size=256

The words after the config are overrides of every run, those after a `--run NAME` of that run alone. With --seconds
each run gets the number of steps that fits: the speed of all settings is measured first, in turns (each as often as
--turns says; the fastest counts, since whatever else the machine does only makes it slower), so that the learning
rate decays at the right time. Without it, each run takes the steps of its config. Validation is not training time.

Writes OUT/curves.json and, where matplotlib is installed, OUT/curves.svg, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PROBE_STEPS = 30  # of which the first third warms up


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte against seconds of training.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--run", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--seconds", type=float, help="training time of each run; default: the config's max_steps")
    parser.add_argument("--turns", type=int, default=2, help="times each setting's speed is measured")
    parser.add_argument("--points", type=int, default=8, help="validations in each run")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="folder of runs and results")
    parser.add_argument("--together", action="store_true", help="all at once, each on its share of the cores")
    arguments = parser.parse_args()
    config, out = arguments.config, arguments.out
    runs = {name: [*arguments.overrides, *own] for name, *own in arguments.run or [["default"]]}
    cores, at_once = os.cpu_count() or 1, len(runs) if arguments.together else 1
    if at_once > cores:
        sys.exit(f"--together: {at_once} runs need a core each, and this machine has {cores}; leave the option out")
    threads = cores // at_once if arguments.together else None

    def each(job: Callable[[str, list[str]], Any]) -> list[Any]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(job, runs, runs.values()))

    def speed(name: str, overrides: list[str]) -> float:
        return measure_speed(config, overrides, out / f"probe-{name}", threads)

    def run(name: str, overrides: list[str]) -> dict[str, Any]:
        length = steps.get(name) or max_steps(config, overrides)
        rows = train(config, overrides, out / name, length, -(-length // arguments.points), threads)
        return {"name": name, "overrides": overrides} | curve(rows)

    turns = [each(speed) for _ in range(arguments.turns if arguments.seconds else 0)]
    fastest = map(max, zip(*turns, strict=True))
    steps = {name: max(int(arguments.seconds * best), _PROBE_STEPS) for name, best in zip(runs, fastest, strict=False)}
    write(each(run), out)


def train(
    config: Path, overrides: list[str], folder: Path, steps: int, eval_every: int, threads: int | None
) -> list[dict[str, Any]]:
    """Run `minimoe pretrain` in a process of its own; the rows of its metrics.jsonl.

    With so many threads what it prints goes to a file, else it has all cores and the terminal.
    """
    settings = {"output_dir": folder, "train.max_steps": steps, "train.eval_every": eval_every}
    settings |= {"train.log_every": 10, "train.save_every": steps, "train.sample_every": "null"}
    words = [word for word in overrides if word.partition("=")[0] not in settings]
    words += [f"{key}={value}" for key, value in settings.items()]
    minimoe = Path(sys.executable).with_name("minimoe")  # not `python -m`, which loads torch before the settings for it
    command = [str(minimoe), "pretrain", str(config), *words, "--overwrite"]
    if threads is None:
        subprocess.run(command, check=True)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{folder.name}: {steps} steps, its output goes to {folder}.log", flush=True)
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def measure_speed(config: Path, overrides: list[str], folder: Path, threads: int | None) -> float:
    """Optimizer steps a second, from a short run after its first steps."""
    short = [*overrides, "schedule.warmup_steps=0", "data.max_validation_documents=1"]
    latest = {word.partition("=")[0]: word for word in short}  # a key may be given once
    rows = train(config, list(latest.values()), folder, _PROBE_STEPS, _PROBE_STEPS, threads)
    rows = [row for row in rows if "lr" in row]
    return (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])


def max_steps(config: Path, overrides: list[str]) -> int:
    """The steps that a config asks for."""
    from minimoe.config import PretrainRun
    from minimoe.config.file import load_config

    steps = load_config(PretrainRun, config, overrides).train.max_steps
    if steps is None:
        sys.exit(f"{config}: give train.max_steps or --seconds")
    return steps


def curve(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What one run says: its length, and its validations as [step, seconds, bits per byte]."""
    last = next(row for row in reversed(rows) if "lr" in row)
    validations = [row for row in rows if "val_bits_per_byte" in row]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "bits_per_byte": validations[-1]["val_bits_per_byte"],
        "points": [[row["step"], row["seconds"], round(row["val_bits_per_byte"], 4)] for row in validations],
    }


def write(curves: list[dict[str, Any]], folder: Path) -> None:
    """Table, JSON and, if possible, the picture."""
    width = max(len(entry["name"]) for entry in curves)
    print(f"\n{'run':<{width}}  {'steps':>6}  {'tokens':>10}  {'seconds':>7}  bits per byte")
    for entry in curves:
        numbers = f"{entry['steps']:>6}  {entry['tokens']:>10,}  {entry['seconds']:>7.1f}"
        print(f"{entry['name']:<{width}}  {numbers}  {entry['bits_per_byte']:.4f}")
    lines = ",\n".join(map(json.dumps, curves))
    (folder / "curves.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for entry in curves:
        _, seconds, bits = zip(*entry["points"], strict=True)
        axes.plot(seconds, bits, marker="o", markersize=3, label=f"{entry['name']}: {bits[-1]:.3f}")
    axes.set(xlabel="seconds of training", ylabel="bits per byte of held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "curves.svg")
    print(f"picture: {folder / 'curves.svg'}")


if __name__ == "__main__":
    main()
