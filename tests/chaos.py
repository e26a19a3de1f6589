"""Training commands as real processes that get killed: used by test_chaos.py, and by scripts/chaos.sh for the long run.

Importing torch and transformers takes seconds and a hundred kills need a hundred starts, so processes are forked from
a server (multiprocessing's) that has imported everything and done nothing else. It has run no tensor operation, so
OpenMP, whose threads would not survive a fork, has started none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from conftest import SENTENCES
from tiny_runs import CHATS, MODEL, STORIES

from minimoe import cli
from minimoe.config import PretrainRun, SftRun, TrainingRun
from minimoe.config_file import dump_config, load_config
from minimoe.errors import EXIT_IO, EXIT_PREEMPTED
from minimoe.failpoints import VARIABLE
from minimoe.tokenizer import train_bpe
from minimoe.train import checkpoint
from minimoe.train.metrics import CLOCK_FIELDS

PATIENCE = 120.0  # seconds after which a process counts as hanging

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "minimoe.train.pretrain", "minimoe.train.sft"])


def save_failpoints() -> list[str]:
    """The names of all failpoints of saving, in the order of the source: a new one is killed without being listed."""
    source = Path(checkpoint.__file__).read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r'failpoint\("([^"]+)"', source)))


@dataclass(frozen=True)
class Run:
    """A training command and the folder it writes to."""

    command: str  # pretrain or sft
    config: Path
    folder: Path

    def to(self, folder: Path) -> Run:
        """The same training in another folder."""
        return replace(self, folder=folder)

    def start(self, *flags: str, env: Mapping[str, str] | None = None, file_bytes: int | None = None) -> BaseProcess:
        """Start it; what it prints goes to `log()`.

        Args:
            flags: e.g. `--resume`, or `key=value`.
            file_bytes: no file may grow beyond this, as on a disk that is full.
        """
        words = [self.command, str(self.config), f"output_dir={self.folder}", *flags]
        return start(minimoe_command, words, log=self._log, env=env, file_bytes=file_bytes)

    def finish(self, *flags: str, **how: Any) -> int:
        """Start it and wait for its exit status; negative is the signal that ended it."""
        return wait(self.start(*flags, **how))

    def log(self) -> str:
        """What its processes printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl without what depends on the clock; a torn last one is left out."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [{key: value for key, value in row.items() if key not in CLOCK_FIELDS} for row in rows]

    def step(self) -> int:
        """The last step it logged."""
        return max((row["step"] for row in self.rows()), default=0)

    def last_logged(self) -> int:
        """When the metrics changed last."""
        file = self.folder / "metrics.jsonl"
        return file.stat().st_mtime_ns if file.exists() else 0

    def saved_step(self) -> int:
        """The step it would resume from; a checkpoint that is there and cannot be trusted is a failure."""
        found, refused = checkpoint.latest(self.folder / "checkpoints")
        assert not refused, refused
        return checkpoint.load_state(found).step if found else 0

    def result(self) -> dict[str, Any]:
        """Everything that must not depend on how often it was interrupted."""
        weights = (self.folder / "final" / "model.safetensors").read_bytes()
        return {"sha256": hashlib.sha256(weights).hexdigest(), "rows": self.rows()}

    def leftovers(self) -> list[str]:
        """Temporary files and folders that a run should have removed."""
        patterns = (".writing*", "*.tmp")
        return [str(path) for pattern in patterns for path in self.folder.rglob(pattern)]

    def damaged(self) -> dict[str, str]:
        """Checkpoints that are there and cannot be trusted."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return {folder.name: reason for folder in folders if (reason := checkpoint.verify(folder))}

    @property
    def _log(self) -> Path:
        return self.config.parent / f"{self.folder.name}.log"


def wait(process: BaseProcess, seconds: float = PATIENCE) -> int:
    """Exit status of a process; one that hangs is killed and is a failure."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"process {process.pid} did not end within {seconds:.0f} s")
    return process.exitcode


def start(
    body: Callable[..., None],
    *arguments: Any,
    log: Path,
    env: Mapping[str, str] | None = None,
    file_bytes: int | None = None,
    daemon: bool = True,
) -> BaseProcess:
    """Run a function in a forked process, on one thread, with its output appended to `log`.

    Args:
        daemon: it ends with the harness, should that fail, and may start no processes of its own.
    """
    arguments = (body, arguments, log, dict(env or {}), file_bytes)
    process = SERVER.Process(target=_forked, args=arguments, daemon=daemon)
    process.start()
    return process


def _forked(
    body: Callable[..., None], arguments: tuple[Any, ...], log: Path, env: dict[str, str], file_bytes: int | None
) -> None:
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(env)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    torch.set_num_threads(1)
    body(*arguments)


def minimoe_command(words: list[str]) -> None:
    """The `minimoe` command itself."""
    sys.argv = ["minimoe", *words]
    cli.main()


class Lab:
    """A folder with a tokenizer, data, and configs of runs that take a few seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        train_bpe(iter(SENTENCES * 4), vocab_size=400).save_pretrained(folder / "tokenizer")
        for name, rows in {"stories": [{"text": text} for text in STORIES], "chats": CHATS}.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def pretrain(self, name: str, *, dense: bool = False, model: Mapping[str, Any] | None = None, **train: Any) -> Run:
        """A pretraining run, by default with a sigmoid router whose selection bias moves."""
        model = MODEL | dict(model or {})
        model |= {"attention_dropout": 0.1, "scoring_func": "sigmoid", "router_bias_update_rate": 0.01}
        model |= {"first_k_dense_replace": MODEL["num_hidden_layers"]} if dense else {}
        values = {"tokenizer": str(self.folder / "tokenizer"), "model": model}
        return self._run("pretrain", PretrainRun, name, values, "stories", train)

    def sft(self, name: str, start: Run, **train: Any) -> Run:
        """A fine-tuning run of the final model of another."""
        return self._run("sft", SftRun, name, {"init_from": str(start.folder / "final")}, "chats", train)

    def _run(
        self, command: str, kind: type[Any], name: str, values: dict[str, Any], data: str, train: dict[str, Any]
    ) -> Run:
        folder = self.folder / name
        values |= {
            "output_dir": str(folder),
            "data": {
                "train": str(self.folder / f"{data}.jsonl"),
                "validation_fraction": 0.2,
                "sequence_length": 32,
                "num_processes": 1,
                "cache_dir": str(self.folder / "cache"),
            },
            "train": {"max_steps": 8, "batch_size": 4, "precision": "fp32", "device": "cpu"}
            | {"log_every": 1, "eval_every": 5, "save_every": 4}
            | train,
        }
        config = self.folder / f"{name}.yaml"
        config.write_text(dump_config(kind.model_validate(values)), encoding="utf-8")
        return Run(command, config, folder)


@dataclass(frozen=True)
class Reference:
    """What a run comes to when nothing disturbs it."""

    run: Run
    result: dict[str, Any]
    start_up: float  # seconds until the first step is logged
    interval: float  # seconds from a save to the next

    @classmethod
    def of(cls, run: Run) -> Reference:
        run.finish("train.max_steps=1", f"output_dir={run.folder}-first")  # tokenises; the shards are cached from here
        started = time.monotonic()
        process = run.start()
        while process.is_alive() and not run.step():
            time.sleep(0.002)
        start_up = time.monotonic() - started
        assert wait(process) == 0, run.log()
        saves = run.step() / _save_every(run)
        return cls(run, run.result(), start_up, (time.monotonic() - started - start_up) / saves)

    def moment(self, rng: random.Random) -> float:
        """Seconds after a start at which to strike: in start-up, or up to three saves later."""
        return rng.uniform(0, self.start_up + 3 * self.interval)

    def check(self, run: Run) -> None:
        """`run`, however often it was interrupted, came to the same."""
        result = run.result()
        missing = [row for row in self.result["rows"] if row not in result["rows"]]
        surplus = [row for row in result["rows"] if row not in self.result["rows"]]
        assert result["rows"] == self.result["rows"], f"metrics.jsonl: {missing=}, {surplus=}"
        assert result["sha256"] == self.result["sha256"], "the final weights differ"
        assert not run.leftovers(), run.leftovers()
        assert not run.damaged(), run.damaged()


def steps_for(interruptions: int, save_every: int) -> int:
    """Steps enough that a run cannot end before it was interrupted so often, at `Reference.moment`."""
    return 4 * save_every * max(interruptions, 1)


@dataclass
class Interruptions:
    """What happened to a run that was interrupted again and again."""

    count: int = 0
    in_start_up: int = 0  # before it had done a step
    while_saving: int = 0  # a checkpoint was being written
    redone: list[int] = field(default_factory=list)  # steps lost by each
    seconds: list[float] = field(default_factory=list)  # from the signal to the exit


def interrupt(reference: Reference, run: Run, times: int, number: int, rng: random.Random) -> Interruptions:
    """Send `run` a signal at random moments and resume it, `times` times; then let it end and compare.

    With SIGKILL the moment may be any; a polite signal waits for the first step, before which nobody listens.
    """
    seen = Interruptions()
    expected = -signal.SIGKILL if number == signal.SIGKILL else EXIT_PREEMPTED
    for _ in range(times):
        before, stamp = run.saved_step(), run.last_logged()
        process = run.start("--resume")
        if number != signal.SIGKILL:
            while process.is_alive() and run.step() <= before:
                time.sleep(0.002)
        process.join(reference.moment(rng))
        os.kill(process.pid, number)
        sent = time.monotonic()
        status = wait(process)
        assert status == expected, f"exit status {status}\n{run.log()[-3000:]}"
        seen.seconds.append(time.monotonic() - sent)
        # Killed in start-up, it may have left the rows of the process before it, whose lost steps are counted already.
        trained = run.step() > before and run.last_logged() != stamp
        seen.count += 1
        seen.in_start_up += not trained
        seen.while_saving += any((run.folder / "checkpoints").glob(".writing*"))
        seen.redone.append(max(run.step() - run.saved_step(), 0) if trained else 0)
    status = run.finish("--resume")
    assert status == 0, f"exit status {status}\n{run.log()[-3000:]}"
    reference.check(run)
    return seen


def die_at(reference: Reference, run: Run, place: str, passage: int) -> bool:
    """Kill `run` at a failpoint, resume it and compare; False when it never came by."""
    status = run.finish(env={VARIABLE: f"{place}@{passage}=kill"})
    if status == 0:
        return False
    assert status == -signal.SIGKILL, f"exit status {status}\n{run.log()[-3000:]}"
    resume_and_check(reference, run)
    return True


def fill_disk_at(reference: Reference, run: Run, place: str, passage: int) -> None:
    """Fail at a failpoint as a full disk does, resume the run and compare."""
    check_stopped_by_full_disk(run, run.finish(env={VARIABLE: f"{place}@{passage}=full"}))
    resume_and_check(reference, run)


def check_stopped_by_full_disk(run: Run, status: int) -> None:
    """It said so, kept the older checkpoint and took its temporary files away."""
    assert status == EXIT_IO, f"exit status {status}\n{run.log()[-3000:]}"
    assert "Traceback" not in run.log(), run.log()[-3000:]
    assert run.saved_step() > 0
    assert not run.leftovers(), run.leftovers()


def resume_and_check(reference: Reference, run: Run) -> None:
    status = run.finish("--resume")
    assert status == 0, f"exit status {status}\n{run.log()[-3000:]}"
    reference.check(run)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of `size` bytes at `folder`; yields a function that gives it another size.

    Raises:
        PermissionError: only root may do that, or not even root in this container.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise PermissionError(f"cannot mount a small file system: {result.stderr.strip()}")

    if shutil.which("mount") is None:
        raise PermissionError("cannot mount a small file system: no mount command")
    mount(f"size={size}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _save_every(run: Run) -> int:
    return load_config(TrainingRun, run.config).train.save_every


def main() -> int:
    """The long run: random kills, every failpoint, polite stops; the figures go to a JSON file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
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
        figures["failpoints"] = _long_failpoints(lab, figures["failures"])
        figures["stops"] = _long_stops(lab, options.stops, rng, figures["failures"])
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if figures["failures"] else 0


LONG_SAVE_EVERY = 5


def _long_kills(lab: Lab, kills: int, rng: random.Random, failures: list[str]) -> list[dict[str, Any]]:
    """Pretraining and SFT, of an MoE and a dense model, a quarter of the kills each."""
    figures = []
    shares = [kills // 4 + (part < kills % 4) for part in range(4)]
    for dense in (False, True):
        kind = "dense" if dense else "MoE"
        start: Run | None = None
        for stage in ("pretrain", "sft"):
            share = shares.pop(0)
            train = {"max_steps": steps_for(share, LONG_SAVE_EVERY), "save_every": LONG_SAVE_EVERY}
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
