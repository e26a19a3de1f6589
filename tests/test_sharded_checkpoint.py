"""Checkpoints that ranks write side by side: whole or not there, whoever dies, and readable on any layout."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_runs import MODEL, STORIES, cut_back, on_ranks, rows, training_rows, weights

from minimoe.errors import EXIT_IO, EXIT_PREEMPTED
from minimoe.failpoints import VARIABLE
from minimoe.loading import load_model
from minimoe.sharded_files import in_parts, parts_of
from minimoe.train.checkpoint import latest, verify

EVERY = 2  # steps between checkpoints
STEPS = 6


class Job:
    """A run on several ranks, in a folder of its own."""

    def __init__(self, root: Path, name: str, tokenizer: Path, **values) -> None:
        self.folder, self.config = root / name, root / f"{name}.yaml"
        data = root / "stories.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES * 3))
        made = {
            "output_dir": str(self.folder),
            "tokenizer": str(tokenizer),
            "model": MODEL,
            "data": {"train": str(data), "sequence_length": 32, "cache_dir": str(root / "cache"), "num_processes": 1},
            "optimizer": {"name": "muon", "lr": 0.01},
            "train": {"max_steps": STEPS, "batch_size": 8, "precision": "fp32", "log_every": 1}
            | {"save_every": EVERY, "keep_last": 9},
            "parallel": {"expert_size": 2},
        } | values
        self.config.write_text(json.dumps(made))

    def start(self, ranks: int = 2, resume: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        """Until the last of them has ended, which takes less than two minutes whatever happens."""
        words = [*(["--resume"] if resume else []), "pretrain", str(self.config)]
        return on_ranks(ranks, *words, check=False, **environment)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def newest(self) -> int:
        """The step of the newest checkpoint that can be trusted."""
        found, _ = latest(self.checkpoints)
        return int(found.name.removeprefix("step-")) if found else 0

    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_tokenizer_dir) -> Job:
    """A run that nothing has disturbed."""
    job = Job(tmp_path_factory.mktemp("sharded"), "whole", tiny_tokenizer_dir)
    done = job.start()
    assert done.returncode == 0, done.stderr[-4000:]
    return job


def copy_of(job: Job, root: Path) -> Job:
    copy = Job.__new__(Job)
    copy.folder, copy.config = root / "copy", root / "copy.yaml"
    shutil.copytree(job.folder, copy.folder)
    values = json.loads(job.config.read_text()) | {"output_dir": str(copy.folder)}
    copy.config.write_text(json.dumps(values))
    return copy


def assert_same_end(job: Job, whole: Job) -> None:
    expected, actual = (weights(place.folder / "final") for place in (whole, job))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert training_rows(job.folder) == training_rows(whole.folder)


def test_every_rank_writes_its_part_and_the_checkpoint_opens_as_a_model(whole):
    folder = whole.checkpoints / f"step-{STEPS:08d}"
    assert verify(folder) is None
    assert in_parts(folder)
    assert all(parts_of(folder, rank) for rank in (0, 1))
    assert not (folder / "model.safetensors").exists()
    sizes = [sum(file.stat().st_size for file in parts_of(folder, rank)) for rank in (0, 1)]
    assert max(sizes) < 0.6 * sum(sizes)  # none of them has much more than its share
    opened, final = (load_model(place)[0].state_dict() for place in (folder, whole.folder / "final"))
    assert opened.keys() == final.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in final.items())
    assert json.loads((whole.folder / "final" / "config.json").read_text())["architectures"] == ["MiniMoeForCausalLM"]


def test_resumed_on_the_same_layout_it_goes_on_bit_for_bit(whole, tmp_path):
    job = copy_of(whole, tmp_path)
    cut_back(job.folder, EVERY)
    done = job.start(resume=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_end(job, whole)


LAYOUTS = {
    "one process": (1, None),
    "two ranks, nothing shared out but weights": (2, {}),
    "four ranks": (4, {}),
    "four ranks, two replicas, experts over two": (4, {"replicate_size": 2, "expert_size": 2}),
}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory, tiny_tokenizer_dir) -> Job:
    """Like `whole`, by AdamW: Muon's directions are bf16 where the hardware has it, which enlarges any difference."""
    values = {"name": "adamw", "lr": 0.01}
    job = Job(tmp_path_factory.mktemp("smooth"), "whole", tiny_tokenizer_dir, optimizer=values)
    assert job.start().returncode == 0
    return job


@pytest.mark.on_demand
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_other_layout_goes_on_with_the_same_curve(layout, smooth, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    job = copy_of(smooth, tmp_path)
    values = json.loads(job.config.read_text()) | {"parallel": parallel}
    job.config.write_text(json.dumps(values))
    cut_back(job.folder, EVERY)
    done = job.start(ranks=ranks, resume=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for row, expected in zip(training_rows(job.folder), training_rows(smooth.folder), strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-6)
    expected = weights(smooth.folder / "final")
    for name, tensor in weights(job.folder / "final").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_one_process_goes_on_from_the_parts_of_two_ranks_and_two_from_the_whole_of_one(whole, tmp_path):
    job = copy_of(whole, tmp_path)
    values = json.loads(job.config.read_text())
    del values["parallel"]
    job.config.write_text(json.dumps(values))
    cut_back(job.folder, 2)
    shutil.move(job.checkpoints / "step-00000002", tmp_path / "kept")
    job.checkpoints.mkdir(exist_ok=True)
    shutil.move(tmp_path / "kept", job.checkpoints / "step-00000002")
    alone = job.start(ranks=1, resume=True)
    assert alone.returncode == 0, alone.stderr[-4000:]
    assert "resuming from" in alone.stdout
    assert not in_parts(job.checkpoints / "step-00000004")
    expected, actual = (weights(place.folder / "final") for place in (whole, job))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6)
    cut_back(job.folder, 4)
    job.config.write_text(json.dumps(values | {"parallel": {}}))
    again = job.start(ranks=2, resume=True)
    assert again.returncode == 0, again.stderr[-4000:]
    actual = weights(job.folder / "final")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_part_that_is_cut_flipped_missing_or_of_another_step_is_found_and_the_older_checkpoint_used(whole, tmp_path):
    job = copy_of(whole, tmp_path)
    newest, older = (job.checkpoints / f"step-{step:08d}" for step in (STEPS, STEPS - EVERY))
    assert len(list(newest.glob("shard-*"))) == 4
    for file in sorted(newest.glob("shard-*")):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[-1] ^= 1
        for damage in (content[: len(content) // 2], bytes(flipped), None, (older / file.name).read_bytes()):
            file.unlink() if damage is None else file.write_bytes(damage)
            found, refused = latest(job.checkpoints)
            assert found == older
            assert file.name in refused[newest.name]
            file.write_bytes(content)
    assert latest(job.checkpoints) == (newest, {})


# What happens at or beside the second checkpoint, and the newest one that is left: one of these. LAST: of the ranks.
ENDS = {
    "rank 0 is killed in a step": ({VARIABLE: "train.step@5#0=kill"}, (2, 4)),
    "the last is killed in a step": ({VARIABLE: "train.step@5#LAST=kill"}, (2, 4)),
    "the last is killed with its part written": ({VARIABLE: "save.shard@2#LAST=kill"}, (2,)),
    "rank 0 is killed between the parts and the manifest": ({VARIABLE: "save.shards@2#0=kill"}, (2,)),
    "rank 0 is killed after the rename": ({VARIABLE: "save.published@2#0=kill"}, (4,)),
    "rank 0 cannot write the manifest": ({VARIABLE: "save.manifest@2#0=full"}, (2,)),
    "the last cannot write its part": ({"LIMIT_RANK": "LAST", "LIMIT_BYTES": "10000"}, (0,)),
    "the last gets SIGTERM": ({VARIABLE: "train.step@3#LAST=signal:SIGTERM"}, (3,)),
}


@pytest.fixture(scope="module", params=(2, 4), ids="{} ranks".format)
def ended(request, tmp_path_factory, tiny_tokenizer_dir) -> tuple[dict[str, tuple[Job, int, dict]], Job]:
    """Runs that ended so, with the newest checkpoint and the status that they left, and one that nothing disturbed; all
    have been resumed since."""
    root, found, ranks = tmp_path_factory.mktemp("ended"), {}, request.param
    undisturbed = Job(root, "whole", tiny_tokenizer_dir)
    for number, (case, (environment, _)) in enumerate(ENDS.items()):
        job = Job(root, f"run-{number}", tiny_tokenizer_dir)
        words = {name: value.replace("LAST", str(ranks - 1)) for name, value in environment.items()}
        assert job.start(ranks, **words).returncode != 0, case
        found[case] = (job, job.newest(), job.status())
    jobs = [undisturbed, *(job for job, *_ in found.values())]
    on_ranks(ranks, "--resume", *(word for job in jobs for word in ("pretrain", str(job.config))))
    return found, undisturbed


@pytest.mark.on_demand
@pytest.mark.parametrize("case", ENDS)
def test_a_run_that_ended_badly_goes_on_from_the_last_checkpoint(case, ended):
    jobs, undisturbed = ended
    job, newest, status = jobs[case]
    assert newest in ENDS[case][1]
    if "cannot write" in case:
        assert status["exit_code"] == EXIT_IO
        assert ("No space left" if "manifest" in case else "File too large") in status["message"]
    if "SIGTERM" in case:
        assert status["exit_code"] == EXIT_PREEMPTED
    assert not list(job.checkpoints.glob(".*"))
    assert_same_end(job, undisturbed)


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path, tiny_tokenizer_dir):
    job = Job(tmp_path, "skips", tiny_tokenizer_dir)
    done = job.start(**{VARIABLE: "train.loss@3#1=nan"})
    assert done.returncode == 0, done.stderr[-4000:]
    (event,) = (row for row in rows(job.folder) if "event" in row)
    assert (event["event"], event["step"], event["skipped"]) == ("non-finite", 3, True)
    assert {file.name for file in (job.folder / "skipped").iterdir()} == {
        f"step-00000003-rank-{rank}.safetensors" for rank in (0, 1)
    }
    assert verify(job.checkpoints / f"step-{STEPS:08d}") is None


def test_one_ranks_full_disk_ends_all_and_the_older_checkpoint_stays(tmp_path, tiny_tokenizer_dir):
    job = Job(tmp_path, "full", tiny_tokenizer_dir)
    assert job.start(**{VARIABLE: "save.shard@2#1=full"}).returncode != 0
    assert job.newest() == 2
    assert not list(job.checkpoints.glob(".*"))
    status = job.status()
    assert status["exit_code"] == EXIT_IO
    assert "No space left" in status["message"]


@pytest.mark.on_demand
def test_four_ranks_lose_one_and_two_go_on(tmp_path, tiny_tokenizer_dir):
    job = Job(tmp_path, "four", tiny_tokenizer_dir, parallel={"replicate_size": 2, "expert_size": 2})
    assert job.start(ranks=4, **{VARIABLE: "save.shard@2#3=kill"}).returncode != 0
    assert job.newest() == 2
    values = json.loads(job.config.read_text())
    job.config.write_text(json.dumps(values | {"parallel": {"expert_size": 2}}))
    done = job.start(ranks=2, resume=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row["step"] for row in training_rows(job.folder)] == [1, 2, 3, 4, 5, 6]
