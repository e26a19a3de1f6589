from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
from tiny_runs import run_command, write_yaml

from minimoe import __version__
from minimoe.cli.app import large_imports


def settings_of(monkeypatch, *words: str):
    """What `minimoe generate` would decode with."""
    seen = {}
    monkeypatch.setattr("minimoe.generation.generate.run", lambda *args, **options: seen.update(args=args))
    assert run_command(monkeypatch, "generate", *words) == 0
    return seen["args"]


def test_decoding_settings_are_options_or_overrides_in_any_order(tmp_path, monkeypatch):
    path = tmp_path / "generate.yaml"
    path.write_text("generation: {top_k: 3, seed: 5}\n")
    words = ["--temperature", "0", "--max_new_tokens=7", "--compile", "some/model", "top_p=0.5", "--top-k", "9"]
    words += ["--config", str(path), "--prompt", "p", "generation.min_p=0.1"]
    model, prompts, settings = settings_of(monkeypatch, *words)
    assert (model, prompts) == ("some/model", ["p"])
    assert (settings.temperature, settings.max_new_tokens, settings.top_p) == (0, 7, 0.5)
    assert (settings.top_k, settings.seed, settings.min_p, settings.compile) == (9, 5, 0.1, True)
    assert settings.chat is False


@pytest.mark.parametrize(
    ("words", "stop"),
    [
        ([], ()),
        (["--stop", "wanted"], ("wanted",)),
        (["--stop", "User:", "--stop", "[a, b]"], ("User:", "[a, b]")),
        (["stop=[a, b]"], ("a", "b")),
    ],
)
def test_texts_that_stop_are_taken_as_they_are(words, stop, monkeypatch):
    assert settings_of(monkeypatch, "m", "--prompt", "p", *words)[2].stop == stop


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temprature", "1"], "--temperature"),
        (["--top-p", "0"], "greater than 0, got 0"),
        (["--temperature", "-1"], "greater than or equal to 0"),
        (["--top-k", "x"], "valid integer"),
        (["--temperature"], "temperature"),
        (["hello"], "is not key=value"),
        (["--top-k", "1", "top_k=2"], "top_k is given twice"),
        (["temperature=1e-320"], "at least 0.001"),
        (["--stop", ""], "an empty text ends nothing"),
    ],
)
def test_a_wrong_option_is_named(words, message, monkeypatch, capsys):
    assert run_command(monkeypatch, "generate", "m", "--prompt", "p", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--max_steps", "10"], ["--train.max_steps=10"], ["--resum"]])
def test_values_of_a_config_as_options_are_told_how_they_are_written(option, monkeypatch, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("train: {}\n")
    assert run_command(monkeypatch, "pretrain", str(tmp_path / "run.yaml"), *option) == 2
    shown = capsys.readouterr().err
    assert f"unknown option '{option[0]}'" in shown
    assert "key.sub=value, like train.max_steps=100" in shown


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)  # as in a process that has just started
    try:
        with large_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_command_ends_with_its_status_and_whole_output_without_taking_the_interpreter_down(tmp_path):
    code = (
        "import sys; sys.argv[0] = 'minimoe'\n"
        "class Loud:\n"
        "    def __del__(self): print('taken down')\n"
        "from minimoe import cli\n"
        "cli.loud = Loud()\n"
        "cli.program()"
    )
    for words, status, text in ((["--help"], 0, "Start with"), (["pretrain", "no.yaml"], 2, "no.yaml")):
        command = [sys.executable, "-c", code, *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert ended.returncode == status
        assert text in ended.stdout + ended.stderr
        assert "taken down" not in ended.stdout


def test_the_version_is_told():
    words = [sys.executable, "-m", "minimoe.cli", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == f"minimoe {__version__}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_the_terminal_cannot_print_ends_no_run(encoding, pretrain_config, write_jsonl, tmp_path):
    config = pretrain_config(max_steps=1, sample_every=1, sample_prompts=("Grüße, 日本語 😀 ไทย",))
    path = write_yaml(tmp_path / "run.yaml", config)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    prompt = "Grüße, 日本語 😀 ไทย"
    for words in (
        ["pretrain", str(path)],
        ["generate", f"{config.output_dir}/final", "--prompt", prompt, "--max-new-tokens", "4"],
        ["preview", str(path)],
    ):
        command = [sys.executable, "-m", "minimoe.cli", *words]
        result = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr.decode(encoding)
