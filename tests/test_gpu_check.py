"""The script that checks a GPU, on a CPU: it must not fail there for a reason that shows here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gpu_check.__main__ import PARTS, TOTAL_SECONDS, in_a_process

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_parts_run_in_time_and_leave_figures_and_a_page(tmp_path):
    parts = "documents,synchronisation,profile"
    command = ["bash", "scripts/gpu_check.sh", str(tmp_path / "out"), "--device", "cpu", "--parts", parts]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows if row.get("outcome") == "done"] == parts.split(",")
    assert sum(row.get("right", False) for row in rows) == 4
    shares = [row["share"] for row in rows if "kind" in row]
    assert abs(sum(shares) - 1) < 1e-6
    page = (tmp_path / "out" / "page.md").read_text()
    assert "| dtype | training | largest error | right |" in page
    assert "only CUDA says when the host waits" in page


@pytest.mark.long
def test_a_part_that_fails_or_takes_too_long_is_said_and_the_others_run(tmp_path):
    """Without CUDA each part fails."""
    command = [sys.executable, "-m", "scripts.gpu_check", str(tmp_path), "--parts", "synchronisation,graphs"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 1
    assert result.stdout.count("failed: ") == 2
    outcome, _ = in_a_process("curves", "cpu", tmp_path, limit=0.5)
    assert outcome == "time is up"
    assert max(PARTS.values()) < TOTAL_SECONDS < 480
