"""Reports: what a page shows of a run, finished or not, and what it costs the run."""

from __future__ import annotations

import json
import platform
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import run_command, write_yaml

from minimoe.errors import UserError
from minimoe.inspect import report
from minimoe.inspect.charts import run_charts, thinned
from minimoe.inspect.record import MOST_ROWS, read_run
from minimoe.train.reporter import Reporter


def make_run(folder: Path, steps: int = 30, layers: int = 2, experts: int = 4, **status: object) -> Path:
    """A run's folder as training leaves it; expert 3 of layer 0 dies half way."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        load = np.ones((layers, experts))
        if step > steps // 2:
            load[0] = [4 / 3, 4 / 3, 4 / 3, 0, *[1] * (experts - 4)]
        row = {"step": step, "tokens": 100 * step, "lr": 0.01, "loss": 4 / step, "lm_loss": 4 / step, "grad_norm": 1.0}
        row |= {"tokens_per_second": 50.0, "memory_bytes": 10**9, "seconds": 2.0 * step, "batch_hash": "ab"}
        row |= {"load_balancing_loss": 2.0, "router_z_loss": 1.0, "router_confidence": [0.4] * layers}
        lines.append(row | {"expert_load": load.tolist()})
        if step % 10 == 0:
            lines.append({"step": step, "val_loss": 5 / step, "val_bits_per_byte": 2 / step, "seconds": 2.0 * step})
    lines.append({"step": steps, "event": "spike", "loss": 9.0, "grad_norm": 3.0, "skipped": False, "seconds": 60.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "exit_code": 0} | status))
    facts = {"stage": "pretrain", "parameters": {"total": 3_400_000, "active": 1_600_000}, "flops_per_token": 1000}
    facts |= {"moe_layers": [1, 2][:layers], "total_steps": steps, "references": {"unigram_loss": 3.25}}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(f"seed: {steps}\ndata:\n  train: <b>stories</b>.txt\n")
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 20, "prompt": "Once", "text": " <script>x</script>"}) + "\n"
    )
    return folder


def text_of(page: Path) -> str:
    text = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split()).replace("\N{NO-BREAK SPACE}", " ")


def test_a_page_says_what_the_run_reached_and_what_its_experts_do(tmp_path):
    files = report.run([str(make_run(tmp_path / "a"))])
    text = text_of(files[0])
    assert "✓ Finished: step 30 of 30." in text
    assert "3.4 M, 1.6 M active" in text
    assert "best held-out loss 0.1667" in text
    # the last tenth: in the first MoE layer, which is layer 1 of the model, expert 3 has nothing
    assert "1 0.00 (expert 3) 1.33 (expert 0) 0.792 3" in text
    assert "2 1.00 (expert 0) 1.00 (expert 0) 1.000 none" in text
    assert "30 spike" in text
    assert "unigram entropy 3.25" in files[0].read_text()
    assert {file.suffix for file in files[1:]} == {".png"}
    assert tmp_path / "a" / "charts" / "expert_load.png" in files


def test_a_page_needs_nothing_from_outside_and_shows_texts_as_texts(tmp_path):
    page = report.run([str(make_run(tmp_path / "a"))])[0].read_text(encoding="utf-8")
    found: list[tuple[str, dict]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Tags().feed(page)
    assert not {"script", "link", "iframe", "b:script"} & {tag for tag, _ in found}
    links = [value for _, pairs in found for name, value in pairs.items() if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = [pairs["id"] for _, pairs in found if "id" in pairs]
    assert len(ids) == len(set(ids))
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "url(http" not in page


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "failed", "message": "loss is NaN"}, "✗ Failed at step 30 of 30: loss is NaN"),
        ({"state": "preempted", "message": "stopped by SIGTERM"}, "! Preempted at step 30 of 30: stopped by SIGTERM"),
        ({"state": "running", "pid": 2**22 + 1, "host": "elsewhere"}, "! Running: step 30 of 30"),
    ],
)
def test_a_page_says_how_the_run_ended(tmp_path, status, said):
    page = report.run([str(make_run(tmp_path / "a", **status))])[0]
    assert said in text_of(page)
    assert ('http-equiv="refresh"' in page.read_text()) == (status["state"] == "running")


def test_a_killed_run_is_not_called_running(tmp_path):
    folder = make_run(tmp_path / "a", state="running", pid=2**22 + 1, host=platform.node())
    assert "✗ Killed at about step 30" in text_of(report.run([str(folder)])[0])


def test_runs_are_compared_and_what_differs_is_marked(tmp_path):
    folders = [make_run(tmp_path / name / "final", steps) for name, steps in (("a", 30), ("b", 20))]
    page, *charts = report.run([str(folder) for folder in folders], str(tmp_path / "page.html"))
    text = text_of(page)
    assert "a/final b/final" in text
    assert "1 keys differ" in text
    assert '<tr class="differs"><td>seed</td><td>30</td><td>20</td>' in page.read_text()
    assert {f"{kind}_{axis}.png" for kind in ("lm_loss", "val_loss") for axis in ("tokens", "FLOPs", "seconds")} < {
        chart.name for chart in charts
    }


def test_axes_are_tokens_flops_and_seconds(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    steps = np.array([10.0, 20.0])
    assert run.axis("tokens", steps).tolist() == [1000, 2000]
    assert run.axis("FLOPs", steps).tolist() == [1e6, 2e6]
    assert run.axis("seconds", steps).tolist() == [20, 40]


def test_of_very_many_rows_some_are_read_and_the_page_says_so(tmp_path):
    folder = make_run(tmp_path / "a", steps=50_000, layers=1)
    run = read_run(folder)
    assert run.drawn_of == 50_000
    assert len(run.steps) <= MOST_ROWS
    assert run.steps[0] == 1
    assert run.steps[-1] == 50_000
    assert len(run.validation["step"]) == 5000  # none of the rare rows is left out
    page = report.run([str(folder)])[0]
    assert "of 50,000 logged rows are drawn" in text_of(page)
    assert page.stat().st_size < 2_000_000


def test_a_torn_line_and_rows_of_another_version_are_no_obstacle(tmp_path):
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(
            '{"step": 31, "loss": 1.0, "tokens": 3100, "seconds": 62.0, "tokens_per_second": 1}\n{"step": 32, "lo'
        )
    for name in ("run.json", "status.json", "config.yaml"):
        (folder / name).write_text("\x00not: [json")
    assert read_run(folder).steps[-1] == 31
    assert "Unknown at step 31" in text_of(report.run([str(folder)])[0])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        report.run([str(tmp_path)])


def test_a_dense_run_and_one_that_has_just_begun_have_a_page(tmp_path):
    folder = make_run(tmp_path / "a", steps=1)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) | {
        "expert_load": [],
        "router_confidence": [],
    }
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "expert_load" not in {chart.name for chart in run_charts(read_run(folder))}
    assert report.run([str(folder)])[0].is_file()
    (folder / "metrics.jsonl").write_text("")
    assert "step 0" in text_of(report.run([str(folder)])[0])


def test_neighbours_are_averaged_not_picked():
    x = np.arange(10_000.0)
    places, values = thinned(x, np.where(x % 2 == 0, 1.0, 3.0))
    assert len(places) == 1200
    assert np.allclose(values, 2.0, atol=0.25)


def test_training_keeps_a_report(tmp_path, pretrain_config, monkeypatch):
    monkeypatch.setenv("MINIMOE_REPORT", "on")
    folder, config = tmp_path / "run", write_yaml(tmp_path / "run.yaml", pretrain_config())
    assert run_command(monkeypatch, "pretrain", str(config)) == 0
    deadline = time.monotonic() + 120  # a finished run has waited for it already, unless the machine is very busy
    while not (folder / "report.html").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    text = text_of(folder / "report.html")
    assert "Finished" in text
    assert "Experts" in text
    facts = json.loads((folder / "run.json").read_text())
    assert facts["references"]["unigram_loss"] > 0
    assert run_command(monkeypatch, "pretrain", str(config), "logging.report=false", "--overwrite") == 0
    assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_made_is_said_and_a_run_that_fails_waits_for_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMOE_REPORT", "on")
    with Reporter(tmp_path / "no-run") as reporter:
        reporter.begin()
    assert "no report.html" in capsys.readouterr().err
    reporter = Reporter(tmp_path / "no-run")
    reporter.begin()
    reporter.__exit__(ValueError, ValueError("its own"), None)  # what is to be said is the error
    assert capsys.readouterr().err == ""
