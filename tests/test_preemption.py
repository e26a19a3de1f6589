"""SIGTERM and Ctrl-C at every stage of a run: save once, exit 75, resume to the end; the second Ctrl-C ends at once."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import training_rows, write_yaml

from minimoe import failpoints
from minimoe.train import pretrain
from scripts.chaos.processes import PATIENCE, minimoe_command, start, wait


class Run:
    """`minimoe pretrain` as a process, with failpoints switched on."""

    def __init__(self, path: Path, spec: str) -> None:
        self.log = path.with_suffix(".log")
        env = {failpoints.VARIABLE: spec}
        self.process = start(minimoe_command, ["pretrain", str(path)], log=self.log, env=env, daemon=False)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def listens(self) -> bool:
        """Whether SIGTERM has a handler, by proc(5)."""
        caught = re.search("SigCgt:(.*)", Path(f"/proc/{self.process.pid}/status").read_text())
        return caught is not None and bool(int(caught[1], 16) >> signal.SIGTERM - 1 & 1)

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, number: int) -> tuple[int, str, float]:
        """Send the signal; returns exit code, the output and seconds until the end."""
        started = time.monotonic()
        self.send(number)
        return wait(self.process), self.log.read_text(), time.monotonic() - started


def lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


# stage: failpoints, and how to see from outside that the run is in it
STAGES = {
    "training": ("", lambda folder: lines(folder) >= 2),
    "evaluating": ("evaluate.batch=sleep:0.4", lambda folder: lines(folder) >= 3),
    "saving": ("save.weights=sleep:1.5", lambda folder: any((folder / "checkpoints").glob(".writing-*"))),
    "tokenising": ("tokenise.chunk=sleep:30", lambda folder: (folder / "status.json").exists()),
    "tokenising in processes": ("tokenise.chunk=sleep:30", lambda folder: (folder / "status.json").exists()),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_once_and_exits_75_in_under_20_seconds_and_resume_completes(
    stage, number, tmp_path, pretrain_config
):
    spec, reached = STAGES[stage]
    config = pretrain_config(max_steps=100_000, save_every=4 if stage == "saving" else 100_000, micro_batch_size=1)
    folder = Path(config.output_dir)
    if stage == "tokenising in processes":  # where there is more than 6 MB of text
        path = Path(config.data.train[0].path)
        small, rows = tmp_path / "validation.jsonl", path.read_text()
        small.write_text(rows)
        path.write_text(rows * (8_000_000 // len(rows)))
        values = config.model_dump(mode="json")
        values["data"] |= {"num_processes": 2, "validation": str(small)}
        config = type(config).model_validate(values)
    run = Run(write_yaml(tmp_path / "config.yaml", config), spec)
    run.wait_for(lambda: reached(folder))
    if stage.startswith("tokenising"):
        run.wait_for(run.listens)
        time.sleep(1)  # so that it is probably in the first chunk, where it sleeps for 30 s
    code, output, seconds = run.end(number)
    assert code == 75, output
    assert seconds < 20
    assert f"stopped by {number.name}" in output
    assert "Traceback" not in output
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    step = 0
    if stage.startswith("tokenising"):
        assert "before the first step" in output
        assert not (folder / "checkpoints").exists()
    else:
        saved = sorted((folder / "checkpoints").iterdir())
        assert not [path for path in saved if path.name.startswith(".")]
        assert stage == "saving" or len(saved) == 1
        step = int(saved[-1].name.removeprefix("step-"))
        assert training_rows(folder)[-1]["step"] == step
    ended = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": step + 1})})
    pretrain.run(ended, resume=True)
    assert training_rows(folder)[-1]["step"] == step + 1


def test_the_second_ctrl_c_ends_at_once_with_130_and_the_run_can_be_resumed(tmp_path, pretrain_config):
    config = pretrain_config(max_steps=100_000, save_every=100_000, eval_every=100_000)
    folder = Path(config.output_dir)
    run = Run(write_yaml(tmp_path / "config.yaml", config), "save.weights=sleep:60")
    run.wait_for(lambda: lines(folder) >= 1)
    run.send(signal.SIGINT)
    run.wait_for(lambda: any((folder / "checkpoints").glob(".writing-*")))
    code, output, seconds = run.end(signal.SIGINT)
    assert code == 130, output
    assert seconds < 5
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 130
    ended = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1})})
    pretrain.run(ended, resume=True)
    assert not list((folder / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_run_that_is_done_after_this_step_ends_as_finished(number, tmp_path, pretrain_config):
    config = pretrain_config(max_steps=2)
    folder = Path(config.output_dir)
    run = Run(write_yaml(tmp_path / "config.yaml", config), f"save.begin=signal:{number.name}")  # of the last step
    assert wait(run.process) == 0, run.log.read_text()
    assert (folder / "final").is_dir()
