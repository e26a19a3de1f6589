"""The benchmark measures what it says it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scripts.benchmark import turns
from scripts.benchmark.__main__ import as_markdown
from scripts.benchmark.models import either, minimoe_config
from scripts.benchmark.shapes import QUICKSTART
from scripts.circumstances import circumstances


def test_a_slow_moment_of_the_machine_does_not_change_a_ratio():
    ours = [{"seconds": seconds} for seconds in (1.0, 10.0, 2.0)]
    other = [{"seconds": 1.5 * figure["seconds"]} for figure in ours]
    assert turns.ratio(other, ours) == 1.5
    assert turns.spread(other, ours) == "1.500 to 1.500"


@pytest.mark.parametrize("there", [True, False])
def test_a_worker_measures_the_checkout_it_is_told_to_and_no_other(there, tmp_path):
    if there:
        (tmp_path / "minimoe").mkdir()
        (tmp_path / "minimoe" / "__init__.py").touch()
    worker = turns.Worker("shapes.Shape", checkout=tmp_path)  # nothing to measure, it is only prepared
    try:
        if there:
            assert worker.answer() == {}
        else:  # another minimoe may be installed
            with pytest.raises(RuntimeError, match="a worker died"):
                worker.answer()
    finally:
        worker.end()


def test_what_moved_is_found_where_it_is():
    assert either("no.such.module:Path", "json:Path", "pathlib:Path") is Path
    with pytest.raises(ImportError, match="there is none of json:nothing, pathlib:nothing"):
        either("json:nothing", "pathlib:nothing")


def test_the_busy_section_trains_the_model_of_the_quickstart():
    values = yaml.safe_load((turns.ROOT / "configs/quickstart/pretrain.yaml").read_text(encoding="utf-8"))
    config = minimoe_config(QUICKSTART).to_dict()
    assert {key: config[key] for key in values["model"]} == values["model"]
    assert (QUICKSTART.batch, QUICKSTART.sequence) == (values["train"]["batch_size"], values["data"]["sequence_length"])


def test_a_page_says_when_and_how_it_was_made_and_has_a_table_of_each_section():
    page = circumstances("One run", "2026-01-02 03:04 UTC", "python -m scripts.benchmark --beside old")
    assert page.startswith("# One run\n\n- 2026-01-02 03:04 UTC\n")
    assert "`python -m scripts.benchmark --beside old`" in page
    rows = [{"subject": "minimoe", "s": 0.12345}, {"subject": "before", "s": 1234.5}]
    assert as_markdown("A table", rows) == (
        "## A table\n| subject | s |\n| --- | --- |\n| minimoe | 0.123 |\n| before | 1,234 |\n"
    )
