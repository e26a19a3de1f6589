"""What accelerate's launcher and config file may ask for."""

from __future__ import annotations

import pytest

from minimoe.config.training import ParallelConfig, TrainConfig
from minimoe.errors import UserError
from minimoe.train.parallel import check_launcher, make_accelerator


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [
        ("ACCELERATE_USE_FSDP", "true", "torchrun"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "torchrun"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.micro_batch_size"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "train.compile"),
    ],
)
def test_what_the_trainer_would_not_do_is_refused(variable, value, fix):
    with pytest.raises(UserError, match=f"{variable}={value}") as refused:
        check_launcher({variable: value})
    assert fix in refused.value.fix


def test_accelerates_defaults_are_fine():
    check_launcher({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"})
    check_launcher({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "true"})


def test_one_process_of_accelerate_on_a_cpu_is_told_how_to_be_several(monkeypatch, capsys):
    make_accelerator(TrainConfig(max_steps=1, device="cpu"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make_accelerator(TrainConfig(max_steps=1, device="cpu"))
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err


def test_offloading_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="for GPUs"):
        make_accelerator(TrainConfig(max_steps=1, device="cpu"), ParallelConfig(cpu_offload=True))
