from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
from tiny_runs import write_yaml

from minimoe import __version__
from minimoe.cli import _generation_settings, _large_imports
from minimoe.errors import UserError


def test_decoding_settings_are_flags_or_overrides(tmp_path):
    path = tmp_path / "generate.yaml"
    path.write_text("generation: {top_k: 3, seed: 5}\n")
    words = ["--temperature", "0", "--max-new-tokens=7", "top_p=0.5", "--stop", "[a, b]", "--top-k", "9"]
    words.append("generation.min_p=0.1")
    settings = _generation_settings(path, words)
    assert (settings.temperature, settings.max_new_tokens, settings.top_p) == (0, 7, 0.5)
    assert (settings.top_k, settings.seed, settings.stop, settings.min_p) == (9, 5, ("a", "b"), 0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temprature", "1"], "did you mean 'temperature'"),
        (["--top-p", "0"], "greater than 0, got 0"),
        (["--temperature", "-1"], "greater than or equal to 0"),
        (["--temperature"], "temperature"),
        (["hello"], "is not key=value"),
        (["--top-k", "1", "top_k=2"], "top_k is given twice"),
        (["temperature=1e-320"], "at least 0.001"),
    ],
)
def test_a_wrong_flag_is_named(words, message):
    with pytest.raises(UserError, match=message):
        _generation_settings(None, words)


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)  # as in a process that has just started
    try:
        with _large_imports():
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
