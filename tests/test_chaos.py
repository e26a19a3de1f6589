"""Runs that are killed, told to stop, or run out of disk: they resume and end as if nothing had happened.

The quick part of what `python -m scripts.chaos` does at length, with the same code.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors import safe_open

from minimoe.errors import EXIT_PREEMPTED
from minimoe.failpoints import VARIABLE
from scripts.chaos.faults import (
    check_stopped_by_full_disk,
    die_at,
    fill_disk_at,
    interrupt,
    resume_and_check,
    save_failpoints,
    small_disk,
    steps_for,
)
from scripts.chaos.lab import Lab, Reference, Run
from scripts.chaos.processes import PATIENCE, wait

KILLS = 5  # of each of the two runs
SAVE_EVERY = 4


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def reference(lab: Lab) -> Reference:
    """Three saves, each of which deletes the one before."""
    return Reference.of(lab.pretrain("undisturbed", max_steps=12, save_every=4, keep_last=1))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_run_killed_at_random_moments_ends_with_the_same_curve_and_weights(stage, lab, reference):
    steps = steps_for(KILLS, SAVE_EVERY)
    if stage == "pretrain":
        run = lab.pretrain("often-killed", max_steps=steps, save_every=SAVE_EVERY)
    else:
        run = lab.sft("often-killed-sft", reference.run, max_steps=steps, save_every=SAVE_EVERY)
    undisturbed = Reference.of(run.to(lab.folder / f"{stage}-whole"))
    seen = interrupt(undisturbed, run, KILLS, signal.SIGKILL, random.Random(0))
    assert seen.count == KILLS
    # A checkpoint is written while training goes on, at most until the next is due.
    assert max(seen.redone) <= 2 * SAVE_EVERY


@pytest.mark.parametrize("stage", ["lora", "distil", "dpo", pytest.param("grpo", marks=pytest.mark.long)])
def test_a_later_stage_killed_while_it_saves_ends_as_if_nothing_had_happened(stage, lab, reference):
    run = lab.later(stage, f"killed-{stage}", reference.run, max_steps=8, save_every=2)
    undisturbed = Reference.of(run.to(lab.folder / f"{stage}-whole"))
    assert die_at(undisturbed, run, "save.state", 2)


@pytest.mark.parametrize("place", save_failpoints())
def test_killed_anywhere_in_a_save_it_resumes_from_the_checkpoint_before(place, lab, reference):
    assert die_at(reference, reference.run.to(lab.folder / f"kill-{place}"), place, 2)


@pytest.mark.parametrize("place", save_failpoints())
def test_a_disk_that_fills_up_anywhere_in_a_save_costs_nothing_that_was_saved(place, lab, reference):
    fill_disk_at(reference, reference.run.to(lab.folder / f"full-{place}"), place, 2)


def test_killed_while_it_writes_the_final_model_it_writes_it_again(lab, reference):
    # The export publishes as a save does: its rename comes after those of the three saves.
    run = reference.run.to(lab.folder / "kill-export")
    assert die_at(reference, run, "save.rename", 4)
    assert "resuming from" in run.log()


def test_a_file_that_cannot_grow_ends_the_run_with_74_and_it_resumes_when_there_is_room(lab, reference):
    run = reference.run.to(lab.folder / "file-limit")
    # A second save begins only after the first is written: the checkpoint of step 4 is surely there.
    assert run.finish(env={VARIABLE: "save.begin@2=kill"}) == -signal.SIGKILL
    saved = run.saved_step()
    weights = reference.run.folder / "final" / "model.safetensors"
    check_stopped_by_full_disk(run, run.finish("--resume", file_bytes=weights.stat().st_size // 2))
    assert run.saved_step() == saved == 4
    resume_and_check(reference, run)


def test_a_real_full_disk_ends_the_run_with_74_and_it_resumes_when_there_is_room(lab, reference):
    (checkpoint,) = (reference.run.folder / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    with ExitStack() as stack:
        try:  # room for one checkpoint, not for the next
            grow = stack.enter_context(small_disk(lab.folder / "disk", int(1.6 * size)))
        except PermissionError as error:
            pytest.skip(str(error))
        run = reference.run.to(lab.folder / "disk" / "small")
        check_stopped_by_full_disk(run, run.finish())
        assert run.saved_step() == 4
        grow(10 * size)
        resume_and_check(reference, run)


def test_an_evaluation_that_a_signal_cuts_short_is_done_when_the_run_resumes(lab, reference):
    run = reference.run.to(lab.folder / "cut-evaluation")
    assert run.finish(env={VARIABLE: "evaluate.batch@1=signal:SIGTERM"}) == EXIT_PREEMPTED  # step 5 is evaluated
    assert run.saved_step() == 5
    resume_and_check(reference, run)


def start_ranks(run: Run, *flags: str) -> list[BaseProcess]:
    """Two processes as a launcher starts them, without one that steps in when one of them ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [run.start(*flags, env=world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


def wait_for_step(run: Run, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while run.step() < step:
        assert time.monotonic() < deadline, run.log()[-3000:]
        time.sleep(0.01)


@pytest.fixture
def endless(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Run]:
    yield lab.pretrain(request.node.name, max_steps=100_000, save_every=100_000, eval_every=100_000)
    for process in multiprocessing.active_children():  # of a test that failed
        process.kill()


@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(asked, endless):
    processes = start_ranks(endless)
    wait_for_step(endless, 3)
    os.kill(processes[asked].pid, signal.SIGTERM)
    assert [wait(process) for process in processes] == [EXIT_PREEMPTED] * 2, endless.log()[-3000:]
    step = endless.saved_step()
    assert step == endless.step() >= 3
    (saved,) = (endless.folder / "checkpoints").iterdir()
    with safe_open(saved / "optimizer.safetensors", "pt") as tensors:
        assert {"rng.0.cpu", "rng.1.cpu"} <= set(tensors.keys())
    # Both pick the run up again, at that step.
    ended = start_ranks(endless, "--resume", f"train.max_steps={step + 2}")
    assert [wait(process) for process in ended] == [0, 0], endless.log()[-3000:]
    assert [row["step"] for row in endless.rows() if "loss" in row] == list(range(1, step + 3))


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_of_two_processes_is_killed_the_other_ends_within_a_minute(killed, endless):
    processes = start_ranks(endless)
    wait_for_step(endless, 3)
    processes[killed].kill()
    assert wait(processes[1 - killed], 60) > 0
    assert wait(processes[killed]) == -signal.SIGKILL


@pytest.mark.long
def test_when_a_process_is_killed_the_launcher_ends_with_an_error_and_nobody_is_left(endless):
    launcher = "torch.distributed.run --nproc_per_node 2 --standalone -m minimoe.cli".split()
    command = [sys.executable, "-m", *launcher, endless.command, str(endless.config)]
    with (endless.config.parent / "launcher.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for_step(endless, 3)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(60) > 0
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
