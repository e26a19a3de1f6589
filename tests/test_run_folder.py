"""Who owns a run's folder, and what its status says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import run_command, write_yaml

from minimoe.errors import UserError
from minimoe.train import pretrain
from minimoe.train.run_folder import run_folder


def test_a_used_folder_needs_resume_or_overwrite(pretrain_config, monkeypatch, tmp_path, capsys):
    path = write_yaml(tmp_path / "config.yaml", pretrain_config(max_steps=2))
    assert run_command(monkeypatch, "pretrain", path) == 0
    assert run_command(monkeypatch, "pretrain", path) == 2
    error = capsys.readouterr().err
    assert "--resume continues it" in error
    assert "--overwrite deletes it" in error
    assert run_command(monkeypatch, "pretrain", path, "--resume") == 0
    assert run_command(monkeypatch, "pretrain", path, "--overwrite") == 0


def test_a_run_that_is_refused_leaves_the_folder_as_it_was(pretrain_config, monkeypatch, tmp_path):
    config = pretrain_config(max_steps=2)
    path = write_yaml(tmp_path / "config.yaml", config)
    assert run_command(monkeypatch, "pretrain", path) == 0
    folder = Path(config.output_dir)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "status.json"}
    assert run_command(monkeypatch, "pretrain", path, "--resume", "seed=7") == 2
    assert run_command(monkeypatch, "pretrain", path, "--overwrite", "data.train=nowhere.txt") == 2
    assert {file: file.read_bytes() for file in before} == before


def test_a_tilde_in_output_dir_is_the_home(pretrain_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write_yaml(tmp_path / "config.yaml", pretrain_config(max_steps=1))
    assert run_command(monkeypatch, "pretrain", path, "output_dir=~/runs/x") == 0
    assert (tmp_path / "home" / "runs" / "x" / "final" / "config.json").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_names_the_first(pretrain_config):
    config = pretrain_config(max_steps=1)
    with (
        run_folder(config, resume=False, overwrite=False),
        pytest.raises(UserError, match=f"in use by process {os.getpid()} on") as refused,
    ):
        pretrain.run(config, resume=True)
    assert refused.value.exit_code == 2
    pretrain.run(config, resume=True)  # the lock went with its owner


def status(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "status.json").read_text())


def test_the_status_of_a_finished_run_names_its_newest_checkpoint(pretrain_config):
    config = pretrain_config(max_steps=2)
    with run_folder(config, resume=False, overwrite=False):
        assert status(config.output_dir)["state"] == "running"
        assert status(config.output_dir)["pid"] == os.getpid()
    pretrain.run(config)
    found = status(config.output_dir)
    assert (found["state"], found["exit_code"], found["newest_checkpoint"]) == ("finished", 0, "step-00000002")


def test_a_failed_run_says_why_and_a_folder_without_any_progress_can_be_used_again(
    tmp_path, pretrain_config, monkeypatch, capsys
):
    config = pretrain_config(max_steps=1)
    path = write_yaml(tmp_path / "config.yaml", config)
    assert run_command(monkeypatch, "pretrain", path, "data.train=nowhere.txt") == 2
    found = status(config.output_dir)
    assert (found["state"], found["exit_code"]) == ("failed", 2)
    assert "nowhere.txt" in found["message"]
    assert run_command(monkeypatch, "pretrain", path) == 0


def test_a_killed_run_leaves_a_lock_that_hinders_nobody(tmp_path, pretrain_config):
    config = pretrain_config(max_steps=1)
    code = (
        "import os, sys; from minimoe.config import PretrainRun; from minimoe.config.file import load_config\n"
        "from minimoe.train.run_folder import run_folder\n"
        "with run_folder(load_config(PretrainRun, sys.argv[1]), resume=False, overwrite=False): os.kill(os.getpid(), 9)"
    )
    path = write_yaml(tmp_path / "config.yaml", config)
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert status(config.output_dir)["state"] == "running"
    pretrain.run(config)
    assert status(config.output_dir)["state"] == "finished"
