from __future__ import annotations

import json
import sys

import pytest

from scripts.benchmark import curves

ROWS = [
    {"step": 10, "tokens": 100, "lr": 0.1, "seconds": 1.0},
    {"step": 10, "seconds": 1.0, "val_bits_per_byte": 3.0},
    {"step": 18, "tokens": 180, "lr": 0.1, "seconds": 1.8},
    {"step": 18, "seconds": 1.8, "val_bits_per_byte": 2.51234},
]


def test_a_curve_is_the_validations_and_the_length_of_a_run():
    assert curves.curve(ROWS) == {
        "steps": 18,
        "tokens": 180,
        "seconds": 1.8,
        "bits_per_byte": 2.51234,
        "points": [[10, 1.0, 3.0], [18, 1.8, 2.5123]],
    }


def test_a_table_and_json_come_out_with_and_without_matplotlib(tmp_path, capsys, monkeypatch):
    entry = {"name": "moe", "overrides": []} | curves.curve(ROWS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curves.write([entry], tmp_path)
    assert json.loads((tmp_path / "curves.json").read_text()) == [entry]
    out = capsys.readouterr().out
    assert "moe      18         180      1.8  2.5123" in out
    assert "matplotlib is not installed" in out


def test_the_picture_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    curves.write([{"name": "moe", "overrides": []} | curves.curve(ROWS)], tmp_path)
    assert 0 < (tmp_path / "curves.svg").stat().st_size < 100_000
