"""What goes to the hub: the folder, its model card, and the module for those who did not import minimoe."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from minimoe.convert.card import curve, model_card
from minimoe.convert.push import run
from minimoe.errors import UserError
from minimoe.train import pretrain

NOTHING = {"private": False, "license_id": None, "out": None}


@pytest.fixture
def trained(pretrain_config) -> Path:
    """`final/` of a run of a few steps."""
    config = pretrain_config(max_steps=4, log_every=1, eval_every=2)
    pretrain.run(config, resume=False)
    return Path(config.output_dir) / "final"


@pytest.fixture
def hub(monkeypatch) -> list:
    """What is sent to the hub, in place of the network."""
    sent = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            sent.append((name, private))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, folder_path, repo_id, commit_message):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            sent.append((repo_id, files))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return sent


def test_a_folder_goes_to_the_hub_whole_with_a_card(trained, hub, capsys):
    (trained / "notes.docx").write_text("mine")
    run(str(trained.parent), "tiny", **(NOTHING | {"private": True}))
    assert "pushed: https://hub/me/tiny/commit/1" in capsys.readouterr().out
    assert hub[0] == ("tiny", True)
    name, files = hub[1]
    assert name == "me/tiny"
    wanted = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "minimoe_classes.py"}
    assert wanted <= set(files)
    assert "notes.docx" not in files
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()


def test_a_card_says_what_the_run_says(trained):
    card = model_card(trained, "me/tiny", "mit")
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["license"] == "mit"
    rows = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert f"| held-out loss | {held_out:.3f} |" in body
    assert "Data: `stories.jsonl`." in body  # and not where it lay
    assert str(trained.parent.parent) not in card
    load = [row["expert_load"] for row in rows if "expert_load" in row][-1]
    assert f"| 0 | {min(load[0]):.2f} | {max(load[0]):.2f} |" in body
    assert 'from_pretrained("me/tiny")' in body


def test_a_card_is_made_of_what_a_killed_run_left(trained):
    metrics = trained.parent / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    broken = [row | {"lm_loss": None} if row.get("step") == 2 and "lm_loss" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in broken) + '{"step": 5, "lo')
    assert "Training loss, from" in model_card(trained, "me/tiny")


def test_a_curve_is_the_mean_of_its_parts():
    assert curve([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert curve([8, 0, 4, 4, 2, 2], width=3) == "██▁"
    assert curve([1.0]) == "▁"


def test_a_card_of_ones_own_is_kept_and_nothing_is_pushed_to_a_folder(trained, tmp_path, hub, capsys):
    (trained / "README.md").write_text("my card")
    run(str(trained), "me/tiny", **(NOTHING | {"out": str(tmp_path / "out")}))
    assert (tmp_path / "out" / "README.md").read_text() == "my card"
    assert not hub
    assert "nothing pushed" in capsys.readouterr().out


def test_what_the_hub_refuses_is_said(trained, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        run(str(trained), "me/tiny", **NOTHING)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class Hub:
        def create_repo(self, *args, **kwargs):
            raise RuntimeError("401 Unauthorized\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(UserError, match="cannot push to me/tiny: 401 Unauthorized") as refusal:
        run(str(trained), "me/tiny", **NOTHING)
    assert "hf auth login" in refusal.value.fix


def test_a_folder_opens_without_import_minimoe_for_who_trusts_it(trained, tmp_path):
    """It names a module that does nothing but import ours; who does not trust it is told what it asks for."""
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, pipeline\n"
        f"folder = {str(trained)!r}\n"
        "try: AutoModelForCausalLM.from_pretrained(folder)\n"
        "except ValueError as error: assert 'trust_remote_code=True' in str(error), error\n"
        "else: raise AssertionError\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(model).__module__ == 'minimoe.model.language_model'\n"
        "print(pipeline('text-generation', folder, trust_remote_code=True)('The', max_new_tokens=2))"
    )
    environment = {"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert "generated_text" in result.stdout, result.stderr
    assert (trained / "minimoe_classes.py").read_text().count("import") == 1


def test_transformers_serves_a_folder_and_chats_with_it(trained, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    served = [*command, "serve", str(trained), "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(served, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):  # it answers once the model is loaded
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{base}/v1/models") as answer:
                assert json.load(answer)["data"][0]["id"] == str(trained)
                break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        words = {"model": str(trained), "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(words).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 4
        client = [*command, "chat", str(trained), f"{base}/v1", "max_new_tokens=4", "do_sample=False"]
        typed = {"input": "hello\n!exit\n", "capture_output": True, "text": True}
        chat = subprocess.run(client, **typed, env=environment, cwd=tmp_path, check=False, timeout=120)
        assert f"<{trained}>:" in chat.stdout.replace("\n", ""), chat.stderr
    finally:
        server.kill()
        server.wait()
        log.close()
