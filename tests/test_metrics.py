from __future__ import annotations

import json
from pathlib import Path

from minimoe.config import LoggingConfig
from minimoe.train.metrics import METRICS_FILE, MetricsLogger


def make(folder: Path, start_step: int = 0, enabled: bool = True) -> MetricsLogger:
    return MetricsLogger(
        folder,
        LoggingConfig(),
        total_steps=10,
        start_step=start_step,
        wandb_run_id=None,
        config={},
        enabled=enabled,
    )


def row(step: int, **values) -> dict:
    return {
        "step": step,
        "loss": 1.0,
        "lr": 0.1,
        "grad_norm": 0.5,
        "tokens_per_second": 1e4,
        "expert_load": [[0.5, 1.5]],
    } | values


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_rows_after_the_resumed_step_and_torn_lines_are_dropped(tmp_path):
    with make(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log_training(row(step))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    with make(tmp_path, start_step=2) as logger:
        logger.log_training(row(3))
    assert steps(tmp_path) == [1, 2, 3]


def test_a_value_that_is_not_finite_is_written_as_null_and_stays_valid_json(tmp_path):
    with make(tmp_path) as logger:
        logger.log_training(row(1, loss=float("nan")))
    assert json.loads((tmp_path / METRICS_FILE).read_text())["loss"] is None


def test_other_ranks_write_nothing(tmp_path, capsys):
    with make(tmp_path, enabled=False) as logger:
        logger.log_training(row(1))
        logger.print("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_console_names_loss_speed_and_expert_balance(tmp_path, capsys):
    with make(tmp_path) as logger:
        logger.log_training(row(7, loss=2.345))
    assert "loss 2.345  10.0k tok/s  experts 0.50-1.50" in capsys.readouterr().out
