"""A stage is batches and an objective: one that is made up here gets resume, guard and logs from the loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MODEL, cut_back, outcome, rows, training_rows

from minimoe.config import TrainingRun
from minimoe.data.loader import Batch, Batches, Data
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.train.loop import fit
from minimoe.train.objectives import Losses, Step
from minimoe.train.parallel import make_accelerator


class WeightedRun(TrainingRun):
    """Rows that are wanted or unwanted, as rewards would have it."""

    stage: ClassVar = "weighted"


@dataclass(frozen=True)
class WeightedBatch(Batch):
    weights: torch.Tensor  # (B,)

    def num_items(self) -> torch.Tensor:
        return torch.tensor(len(self.weights))


class CountingRows(Batches):
    """Row i counts up from i: wanted where i is even."""

    rows_per_epoch = 10

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> WeightedBatch:
        first = torch.arange(rank, batch_size, world_size) + step * batch_size
        ids = (first[:, None] + torch.arange(8)) % 10
        positions = torch.arange(8).expand(len(ids), -1).contiguous()
        return WeightedBatch(ids, ids, positions, torch.ones_like(ids), 1.0 - 1.1 * (first % 2))


def weighted(model, batch: WeightedBatch, step: Step) -> Losses:
    """Mean over rows of weight * negative log-likelihood per token."""
    outputs = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False)
    logp = outputs.logits[:, :-1].log_softmax(-1).gather(2, batch.labels[:, 1:, None])[..., 0].mean(1)  # (B,)
    wanted = batch.weights > 0
    rows = step.num_items
    terms = {"wanted_logp": (logp * wanted).sum() / rows, "unwanted_logp": (logp * ~wanted).sum() / rows}
    return Losses(-(batch.weights * logp).sum() / rows, terms, outputs.expert_counts)


@pytest.fixture
def train(pretrain_config, tiny_tokenizer):
    """Train the made-up stage; the same folder each time."""

    def run(resume: bool = False, dropout: float = 0.0, **options) -> Path:
        values = pretrain_config("weighted", max_steps=24, **options).model_dump(
            exclude={"model", "tokenizer", "init_from", "context"}
        )
        config = WeightedRun.model_validate(values)
        torch.manual_seed(1)
        model = MiniMoeForCausalLM(MiniMoeConfig(**MODEL, vocab_size=len(tiny_tokenizer), attention_dropout=dropout))
        data = Data(train=CountingRows(), validation=None, counts={}, fingerprint="counting")
        accelerator = make_accelerator(config.train)
        fit(config, model, tiny_tokenizer, lambda: data, weighted, accelerator, resume=resume, overwrite=not resume)
        return Path(config.output_dir)

    return run


def test_it_learns_what_its_objective_asks_for_and_logs_its_terms(train):
    logged = training_rows(train())
    assert "lm_loss" not in logged[0]
    assert logged[-1]["wanted_logp"] > logged[0]["wanted_logp"] + 0.5
    gap = [row["wanted_logp"] - row["unwanted_logp"] for row in logged]
    assert gap[-1] > gap[0]
    for row in logged:  # of each four rows, two are wanted
        assert row["loss"] == pytest.approx(-row["wanted_logp"] + 0.1 * row["unwanted_logp"], rel=1e-5)


def test_it_resumes_with_the_same_bytes(train):
    folder = train(dropout=0.1)  # which draws random numbers
    expected = outcome(folder)
    cut_back(folder, 22)
    assert outcome(train(dropout=0.1, resume=True)) == expected


def test_micro_batches_add_up_to_its_step(train):
    whole, parts = (training_rows(train(micro_batch_size=rows))[0] for rows in (4, 1))
    for name in ("loss", "wanted_logp", "unwanted_logp", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
    assert parts["batch_hash"] == whole["batch_hash"]


def test_a_skipped_step_leaves_its_whole_batch_for_inspection(train, switch_on):
    switch_on("train.loss@2=nan")
    folder = train()
    (event,) = [row for row in rows(folder) if "event" in row]
    batch = load_file(folder / event["batch_file"])
    assert batch["weights"].tolist() == CountingRows().batch(1, 4).weights.tolist()
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask", "weights"}
