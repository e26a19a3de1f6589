from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from tiny_runs import write_yaml

from minimoe.config import LoggingConfig
from minimoe.errors import StorageError, UserError
from minimoe.train import pretrain
from minimoe.train.files import METRICS_FILE, SAMPLES_FILE
from minimoe.train.metrics import MetricsLogger, read_metrics
from minimoe.train.trackers import heatmap


def make(folder: Path, start_step: int = 0, enabled: bool = True, **logging: Any) -> MetricsLogger:
    return MetricsLogger(
        folder,
        LoggingConfig(**logging),
        total_steps=10,
        start_step=start_step,
        wandb_run_id=None,
        config={},
        enabled=enabled,
    )


@pytest.fixture(autouse=True)
def accelerate_state():
    """accelerate's trackers ask it which process this is."""
    PartialState(cpu=True)


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
    with make(tmp_path, trackers=("wandb",)) as logger:
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
    with make(tmp_path, trackers=("wandb",), online=True) as logger:
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


def tracked_run(pretrain_config, *trackers: str, **train: Any) -> Path:
    config = pretrain_config(max_steps=2, sample_every=1, sample_prompts=["The cat"], sample_tokens=3, **train)
    config = config.model_copy(update={"logging": LoggingConfig(trackers=trackers)})
    pretrain.run(config)
    return Path(config.output_dir)


def test_tensorboard_gets_scalars_loads_samples_and_config(pretrain_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tracked_run(pretrain_config, "tensorboard")
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    found.Reload()
    losses = [round(event.value, 4) for event in found.Scalars("loss")]
    assert losses == [round(row["loss"], 4) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert "val_loss" in found.Tags()["scalars"]
    image = found.Images("expert_load")[0]
    assert (image.width, image.height) == (4 * 8, 2 * 8)  # 4 experts, 2 layers
    texts = " ".join(str(found.Tensors(tag)) for tag in found.Tags()["tensors"])
    assert "The cat" in texts
    assert "output_dir" in texts


def test_trackio_keeps_the_run_in_its_local_database(pretrain_config, tmp_path):
    """In a process of its own: where the database is, trackio reads once from its environment."""
    config = pretrain_config(max_steps=2, sample_every=1, sample_prompts=["The cat"], sample_tokens=3)
    config = config.model_copy(update={"logging": LoggingConfig(trackers=("trackio",), project="tracked")})
    file = write_yaml(tmp_path / "run.yaml", config)
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "minimoe.cli", "pretrain", str(file)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    with closing(sqlite3.connect(tmp_path / "trackio" / "tracked.db")) as database:
        logged = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert [round(row["loss"], 3) for row in logged if "loss" in row] == [
        round(row["loss"], 3) for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row
    ]
    assert any("The cat" in str(row.get("sample")) for row in logged)
    assert any("expert_load" in row for row in logged)


def test_wandb_gets_scalars_loads_samples_and_the_report_at_the_end(tmp_path, monkeypatch):
    import wandb

    logged: list[Any] = []
    artifacts: list[Any] = []
    run = SimpleNamespace(
        id="abc",
        log=lambda values, step: logged.append((step, values)),
        log_artifact=artifacts.append,
        finish=lambda exit_code: logged.append(("finish", exit_code)),
    )
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "Image", lambda image: ("image", image.shape))
    monkeypatch.setattr(wandb, "Table", lambda **columns: ("table", columns["data"]))
    (tmp_path / "report.html").write_text("report")
    (tmp_path / "config.yaml").write_text("seed: 0")
    with make(tmp_path, trackers=("wandb",)) as logger:
        logger.log_training(row(1, loss=2.0))
        logger.log_sample(1, "a", "b", 0.1)
    logger.finish_trackers(tmp_path / "report.html", failed=False)
    assert logged[0][1]["loss"] == 2.0
    assert logged[1][1]["expert_load"][0][0] == "image"
    assert logged[2] == (1, {"samples": ("table", [[1, "a", "b"]])})
    assert logged[-1] == ("finish", 0)
    assert {entry.path for entry in artifacts[0].manifest.entries.values()} == {"report.html", "config.yaml"}


def test_a_heatmap_is_dark_where_an_expert_is_idle_and_light_where_it_is_busy():
    image = heatmap([[0.0, 1.0, 9.0]])
    assert image.shape == (8, 24, 3)
    grey = image[0].mean(-1)
    assert grey[0] < grey[8] < grey[16]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(pretrain_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = pretrain_config()
    config = config.model_copy(update={"logging": LoggingConfig(trackers=("trackio",))})
    with pytest.raises(UserError, match="trackio is not installed"):
        pretrain.run(config)
