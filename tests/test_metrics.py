from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from minimoe.config import LoggingConfig
from minimoe.errors import StorageError
from minimoe.train.files import METRICS_FILE, SAMPLES_FILE
from minimoe.train.metrics import MetricsLogger


def make(folder: Path, start_step: int = 0, enabled: bool = True, wandb: str = "off") -> MetricsLogger:
    return MetricsLogger(
        folder,
        LoggingConfig(wandb=wandb),
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


def test_seconds_of_training_count_on_from_the_last_row_that_is_kept(tmp_path):
    with make(tmp_path) as logger:
        assert logger.seconds == 0
        for step in (1, 2, 3):
            logger.seconds += 1.5
            logger.log_training(row(step))
    with make(tmp_path, start_step=2) as logger:
        assert logger.seconds == 3.0


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


def test_wandb_failing_in_the_middle_is_reported_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    import wandb

    def log(*_, **__):
        raise ConnectionError("broken pipe")

    monkeypatch.setattr(wandb, "init", lambda **_: SimpleNamespace(id="abc", log=log, finish=lambda **_: None))
    with make(tmp_path, wandb="offline") as logger:
        for step in (1, 2):
            logger.log_training(row(step))
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().out.count("wandb failed (broken pipe)") == 1


def test_wandb_online_without_key_or_network_goes_offline(tmp_path, monkeypatch, capsys):
    import wandb

    started = []

    def init(**settings):
        started.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.UsageError("No API key configured")
        return SimpleNamespace(id="abc", log=lambda *_, **__: None, finish=lambda **_: None)

    monkeypatch.setattr(wandb, "init", init)
    with make(tmp_path, wandb="online") as logger:
        logger.log_training(row(1))
    assert started == ["online", "offline"]
    assert logger.wandb_run_id == "abc"
    assert "wandb cannot log online: No API key configured" in capsys.readouterr().out


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *_, **__: open("/dev/full", "a"))  # noqa: SIM115 (the logger closes it)
    with make(tmp_path) as logger, pytest.raises(StorageError, match="No space left") as caught:
        logger.log_training(row(1))
    assert caught.value.exit_code == 74


def test_samples_of_an_interrupted_run_that_will_be_made_again_are_dropped(tmp_path):
    with make(tmp_path) as logger:
        for step in (2, 4):
            logger.log_sample(step, "Once", " more", 0.1)
    with make(tmp_path, start_step=3) as logger:
        logger.log_sample(4, "Once", " again", 0.1)
    found = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [(row["step"], row["text"]) for row in found] == [(2, " more"), (4, " again")]
