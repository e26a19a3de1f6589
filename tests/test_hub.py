"""What is said where the hub cannot be asked; a server on loopback stands for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

CODE = "from minimoe import hub; hub.SECONDS = 1.0; from minimoe.cli import program; program()"


@pytest.fixture
def silent():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def ask(endpoint: str, tmp_path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", CODE, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_hub_that_does_not_answer_is_named_once_in_three_lines(silent, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}/out\ntokenizer: somebody/tokens\nmodel: {{hidden_size: 32}}\n"
        "data: {train: a.txt}\ntrain: {max_steps: 1}\n"
    )
    ended = ask(silent, tmp_path, "pretrain", str(tmp_path / "run.yaml"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the hub does not answer for model 'somebody/tokens'")
    assert len(ended.stderr.strip().splitlines()) <= 3
