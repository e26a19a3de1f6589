from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from minimoe.errors import UserError
from minimoe.folder import INDEX, check_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models--a--b" / "snapshots" / "0123"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_plain_files_and_links_within_the_folder_are_fine(folder):
    (folder / "tokenizer_config.json").symlink_to("config.json")
    check_folder(folder)
    (folder.parent / "link").symlink_to(folder)
    check_folder(folder.parent / "link")


def test_a_snapshot_of_the_hub_links_to_its_blobs(folder):
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    check_folder(folder)
    elsewhere = folder.parents[1] / "plain"
    folder.rename(elsewhere)
    with pytest.raises(UserError, match=r"tokenizer\.json is a link out of the folder"):
        check_folder(elsewhere)


@pytest.mark.parametrize("target", ["../../../x.json", "/etc/passwd", "../config.json"])
def test_a_link_out_of_the_folder_is_refused(folder, target):
    (folder / "tokenizer.json").symlink_to(target)
    with pytest.raises(UserError, match="link out of the folder"):
        check_folder(folder)


def test_a_loop_and_a_pipe_are_refused(folder):
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(UserError, match="is not a file"):
        check_folder(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(UserError, match="is not a file"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", 5])
def test_an_index_that_names_other_files_is_refused(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "model.safetensors", "v": name}}))
    with pytest.raises(UserError, match=r"only \.safetensors files of the folder itself"):
        check_folder(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, "\udcff"])
def test_a_file_that_holds_no_object_is_refused_by_name(folder, content):
    (folder / "generation_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"generation_config\.json does not hold a JSON object"):
        check_folder(folder)
