from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny_model

from minimoe.config import OptimizerConfig
from minimoe.errors import CheckpointError, StorageError
from minimoe.train import checkpoint
from minimoe.train import saver as saver_module
from minimoe.train.optim import build_optimizers
from minimoe.train.saver import BackgroundSaver
from minimoe.train.snapshot import TrainerState, get_rng, restore, take_snapshot


@pytest.fixture
def trained(tiny_tokenizer):
    """A model with optimizer moments, one step old."""
    model = tiny_model(scoring_func="sigmoid")
    optimizers = build_optimizers(model, OptimizerConfig())
    ids = torch.randint(1, 97, (2, 8))
    model(ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers, tiny_tokenizer


def save(root, trained, step: int, **state):
    model, optimizers, tokenizer = trained
    snapshot = take_snapshot(model, optimizers, TrainerState(step=step, **state), [get_rng()])
    return checkpoint.save(root, snapshot, model, tokenizer)


def test_a_restored_run_has_the_same_weights_moments_state_and_random_numbers(tmp_path, trained):
    model, optimizers, _ = trained
    folder = save(tmp_path, trained, 7, tokens=123, best_val_loss=1.5, best_step=3, wandb_run_id="abc")
    expected_draw = torch.rand(3)
    other = tiny_model(seed=1, scoring_func="sigmoid")
    other_optimizers = build_optimizers(other, OptimizerConfig(lr=0.5))
    state = restore(folder, other, other_optimizers, rank=0)
    assert state == TrainerState(step=7, tokens=123, best_val_loss=1.5, best_step=3, wandb_run_id="abc")
    assert torch.equal(torch.rand(3), expected_draw)
    for (name, tensor), loaded in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, loaded), name
    for optimizer, loaded_optimizer in zip(optimizers, other_optimizers, strict=True):
        expected, actual = optimizer.state_dict()["state"], loaded_optimizer.state_dict()["state"]
        assert expected.keys() == actual.keys()
        for index, moments in expected.items():
            for moment, tensor in moments.items():
                assert torch.equal(tensor, actual[index][moment]), (index, moment)
    assert other_optimizers[1].param_groups[0]["peak_lr"] == 0.5  # today's config, not the checkpoint's


def test_a_checkpoint_is_a_model_folder_of_transformers_without_any_pickle(tmp_path, trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save(tmp_path, trained, 1)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".py"}
    assert [path.name for path in folder.glob("*.py")] == ["minimoe_classes.py"]  # of one line, an import
    ids = torch.randint(1, 97, (1, 5))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, trained[0].eval()(ids).logits)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(trained[2])


def test_a_fresh_checkpoint_is_verified_and_the_newest_one_is_found(tmp_path, trained):
    save(tmp_path, trained, 9)
    newest = save(tmp_path, trained, 10)
    assert checkpoint.verify(newest) is None
    assert checkpoint.latest(tmp_path) == (newest, {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_truncating_flipping_a_bit_of_or_deleting_any_file_is_found_and_the_older_checkpoint_used(tmp_path, trained):
    older = save(tmp_path, trained, 1)
    newer = save(tmp_path, trained, 2)
    for name in names(newer):
        file = newer / name
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        damages = [content[: len(content) * share // 100] for share in (0, 50, 99)] + [bytes(flipped), None]
        for damage in damages:
            file.unlink() if damage is None else file.write_bytes(damage)
            found, refused = checkpoint.latest(tmp_path)
            assert found == older, (name, damage and len(damage))
            assert list(refused) == [newer.name]
            file.write_bytes(content)
    assert checkpoint.latest(tmp_path) == (newer, {})


def test_only_damaged_checkpoints_are_an_error_that_says_why_for_each(tmp_path, trained):
    for step in (1, 2):
        (save(tmp_path, trained, step) / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000002: model.safetensors has 1 bytes.*step-00000001") as caught:
        checkpoint.latest_or_fail(tmp_path)
    assert caught.value.exit_code == 3
    assert checkpoint.latest_or_fail(tmp_path / "empty") == (None, {})


def test_a_manifest_cannot_point_outside_its_folder(tmp_path, trained):
    folder = save(tmp_path, trained, 1)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert "is missing" in str(checkpoint.verify(folder))


def test_pruning_keeps_the_newest_verified_ones_and_the_best(tmp_path, trained):
    folders = {step: save(tmp_path, trained, step) for step in range(1, 7)}
    (folders[6] / "config.json").write_text("{}")  # damaged: does not count, stays for a look
    checkpoint.prune(tmp_path, keep_last=2, best_step=2)
    assert names(tmp_path) == [folders[step].name for step in (2, 4, 5, 6)]


def test_a_failed_write_raises_removes_its_temporary_folder_and_leaves_the_old_checkpoint(
    tmp_path, trained, monkeypatch
):
    old = save(tmp_path, trained, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        save(tmp_path, trained, 2)
    assert caught.value.exit_code == 74
    assert names(tmp_path) == [old.name]
    assert checkpoint.verify(old) is None


def test_leftovers_of_an_interrupted_save_are_no_checkpoint_and_are_swept(tmp_path, trained):
    save(tmp_path, trained, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "step-00000001"
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_every_file_and_folder_is_synced_before_and_the_parents_after_the_rename(tmp_path, trained, monkeypatch):
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        calls.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = save(tmp_path / "checkpoints", trained, 1)
    temporary = folder.with_name(f".writing-{folder.name}")
    at = calls.index(("rename", str(folder)))
    before = [path for kind, path in calls[:at] if kind == "sync"]
    assert before[-1] == str(temporary)
    assert sorted(before[:-1]) == [str(temporary / name) for name in names(folder)]
    assert calls[at + 1 :] == [("sync", str(folder.parent)), ("sync", str(tmp_path))]


def snapshot_of(trained, step: int):
    model, optimizers, _ = trained
    return take_snapshot(model, optimizers, TrainerState(step=step), [get_rng()])


def test_background_saves_are_of_the_moment_they_were_asked_for_and_never_two_at_once(tmp_path, trained, monkeypatch):
    model, _, tokenizer = trained
    writing, most, save_now, submitted = [], [], checkpoint.save, threading.Event()

    def slow(*arguments):
        writing.append(1)
        most.append(len(writing))
        assert submitted.wait(60)  # training goes on before anything is written
        save_now(*arguments)
        writing.pop()

    monkeypatch.setattr(saver_module, "save", slow)
    weight = model.lm_head.weight
    saved = weight.detach().clone()
    with BackgroundSaver(tmp_path, model, tokenizer, keep_last=9) as saver:
        saver.submit(snapshot_of(trained, 1))
        with torch.no_grad():
            weight.zero_()  # training goes on
        submitted.set()
        saver.submit(snapshot_of(trained, 2))
    assert most == [1, 1]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert torch.equal(load_file(tmp_path / "step-00000001/model.safetensors")["model.embed_tokens.weight"], saved)


def keep_checking(saver: BackgroundSaver) -> None:
    """As the training loop does between its steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        saver.check()
        time.sleep(0.01)


def test_a_failed_background_save_is_raised_in_the_training_loop(tmp_path, trained, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    model, _, tokenizer = trained
    with BackgroundSaver(tmp_path, model, tokenizer, keep_last=9) as saver:
        saver.submit(snapshot_of(trained, 1))
        with pytest.raises(StorageError, match="No space left"):
            keep_checking(saver)
    with (
        pytest.raises(StorageError, match="No space left"),
        BackgroundSaver(tmp_path, model, tokenizer, 9) as saver,
    ):
        saver.submit(snapshot_of(trained, 1))
    assert names(tmp_path) == []
