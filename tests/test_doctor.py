"""What `minimoe doctor` finds: nothing on a sound machine, and each defect that is put there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_report import make_run
from tiny_runs import run_command

from minimoe import ops
from minimoe.inspect import doctor
from minimoe.inspect.record import read_run
from minimoe.train import pretrain


def found(findings) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.state, finding.text) for finding in findings}


def test_both_paths_and_every_form_agree_here():
    findings = list(doctor.dispatch_paths())
    assert findings
    assert all(finding.state == "good" for finding in findings)


def test_a_form_that_computes_something_else_is_found(monkeypatch):
    def wrong(tokens, ids, weights, experts):
        return 1.01 * experts.train_dispatch(tokens, ids, weights, experts)

    monkeypatch.setitem(doctor.DISPATCHES, "wrong", wrong)
    assert {finding.state for finding in doctor.dispatch_paths()} >= {"bad"}


def test_plain_torch_is_a_warning():
    with ops.using():
        assert found(doctor.operators())["operators"][0] == "warning"


def test_a_sound_run_is_good_and_a_flipped_byte_is_found(pretrain_config, monkeypatch, capsys):
    config = pretrain_config()
    folder = Path(config.output_dir)
    pretrain.run(config)
    capsys.readouterr()
    run_command(monkeypatch, "doctor", str(folder), "--json")
    lines = {line["name"]: line["state"] for line in json.loads(capsys.readouterr().out)}
    assert lines["run"] == lines["checkpoints"] == lines["metrics"] == "good"
    weights = sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run_command(monkeypatch, "doctor", str(folder)) == 2
    out = capsys.readouterr().out
    assert "✗" in out
    assert "--resume takes the newest good one" in " ".join(out.split())


def test_rows_that_make_no_sense_are_found(tmp_path):
    state, text = found(doctor.metrics(read_run(make_run(tmp_path / "a"))))["metrics"]
    assert (state, text) == ("warning", "1 x spike")
    assert found(doctor.metrics(read_run(tmp_path / "a")))["experts"] == (
        "warning",
        "the least used has 0.00 of a fair share",
    )
    file = tmp_path / "a" / "metrics.jsonl"
    rising = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"loss": float(row["step"])} for row in rising if "tokens" in row]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    text = found(doctor.metrics(read_run(tmp_path / "a")))["metrics"][1]
    assert "steps are not in order" in text
    assert "the loss does not fall" in text


def test_a_check_that_fails_itself_is_a_finding():
    def check():
        raise ValueError("no such thing")
        yield

    assert doctor.guarded(check)[0].state == "bad"


def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, "doctor", str(tmp_path)) == 2
    assert "no run in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["versions", "device", "disk"])
def test_this_machine_is_sound(name):
    assert {finding.state for finding in getattr(doctor, name)()} <= {"good", "warning"}
