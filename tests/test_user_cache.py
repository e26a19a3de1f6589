"""Where what can be made again is kept, and that no home is no obstacle."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minimoe.config import DataConfig
from minimoe.data.shards import prepare
from minimoe.user_cache import user_cache


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "home"


@pytest.fixture
def no_home(home):
    home.write_text("a file, in which there can be no folder")
    return home


def test_the_cache_is_in_the_home_or_where_xdg_cache_home_says(home, monkeypatch, tmp_path):
    assert user_cache() == home / ".cache" / "minimoe"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "minimoe"
    assert user_cache().is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    assert user_cache() == home / ".cache" / "minimoe"


def test_without_a_home_the_cache_is_in_the_temporary_folder_which_is_said_once(no_home, tmp_path, capsys):
    folder = user_cache()
    assert folder == user_cache() == tmp_path / "tmp" / f"minimoe-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{no_home}/.cache/minimoe cannot be had (Not a directory)" in said


@pytest.mark.parametrize("kind", ["writable", "link", "file"])
def test_a_temporary_folder_that_somebody_else_can_write_to_is_not_used(no_home, tmp_path, kind):
    """Code is loaded from it."""
    taken = tmp_path / "tmp" / f"minimoe-{os.getuid()}"
    if kind == "writable":
        taken.mkdir()
        taken.chmod(0o777)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        taken.symlink_to(tmp_path / "elsewhere")
    else:
        taken.write_text("")
    folder = user_cache()
    assert folder.parent == taken.parent
    assert folder != taken
    assert folder.stat().st_mode & 0o777 == 0o700


def test_tokenised_data_goes_there_unless_the_config_names_a_folder(home, tmp_path, tiny_tokenizer, write_jsonl):
    data = DataConfig(train=str(write_jsonl([{"text": "a"}])))
    corpus = prepare(data.train[0], data, tiny_tokenizer, "pretrain")
    assert (home / ".cache" / "minimoe" / corpus.fingerprint / "tokens.bin").exists()
    prepare(data.train[0], data.model_copy(update={"cache_dir": str(tmp_path / "own")}), tiny_tokenizer, "pretrain")
    assert (tmp_path / "own" / corpus.fingerprint / "tokens.bin").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the C++ is for Linux")
def test_the_compiled_operators_go_there(tmp_path):
    """A compiler that makes an empty library stands in for the real one, which takes seconds."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\ncc -shared -o "$last" -xc /dev/null\n')
    compiler.chmod(0o755)
    code = "from minimoe.ops.c.library import why_not; print(why_not())"
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "None\n", result.stderr
    (made,) = (tmp_path / "xdg" / "minimoe").iterdir()
    assert made.suffix == ".so"
