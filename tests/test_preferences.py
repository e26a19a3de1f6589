"""Preferences: the forms of their rows, their packing, their losses beside TRL's, and whole runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from tiny import relative_error, tiny_model
from tiny_runs import cut_back, outcome, rows, run_command, training_rows, write_yaml
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from minimoe.config import DpoConfig, DpoRun, SourceConfig
from minimoe.data.formats import BadRow, to_document
from minimoe.data.loader import open_data
from minimoe.data.pairs import PairBatch
from minimoe.data.preferences import Judgement, Preference
from minimoe.data.rows import Row
from minimoe.errors import UserError
from minimoe.train import dpo
from minimoe.train.objectives import Step
from minimoe.train.parallel import forward_backward, make_accelerator
from minimoe.train.preference import preference_loss, preference_objective

USER, GOOD, BAD = (
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well."},
    {"role": "assistant", "content": "Go away."},
)
PAIRS = [
    {"prompt": f"Where is the {a}?", "chosen": f"On the {b}.", "rejected": f"I do not know the {a}."}
    for a, b in [("cat", "mat"), ("boat", "sea"), ("moon", "sky"), ("hat", "head"), ("bell", "barn"), ("kite", "hill")]
]
LABELS = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for row in PAIRS
    for key in ("chosen", "rejected")
]


def read(values: dict) -> Preference | Judgement:
    return to_document(Row(values, "row"), SourceConfig(path="x.jsonl"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How are you?", "chosen": "Well.", "rejected": "Go away."},
        {"prompt": [USER], "chosen": "Well.", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "How are you?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"question": "How are you?", "chosen": "Well.", "rejected": "Go away."},
        {"instruction": "How are you?", "input": "", "chosen": "Well.", "rejected": "Go away."},
        {
            "conversations": [{"from": "human", "value": "How are you?"}],
            "chosen": {"from": "gpt", "value": "Well."},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
        {
            "chosen": "\n\nHuman: How are you?\n\nAssistant: Well.",
            "rejected": "\n\nHuman: How are you?\n\nAssistant: Go away.",
        },
    ],
)
def test_every_form_of_a_preference_is_the_same_preference(row):
    assert read(row) == Preference([USER, GOOD], [USER, BAD])


def test_what_both_sides_share_is_the_prompt_and_is_not_scored():
    shared = [USER, GOOD, USER]
    found = read({"chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    assert [m.get("learned", True) for m in found.chosen] == [True, False, True, True]
    assert [m.get("learned", True) for m in found.rejected] == [True, False, True, True]


def test_a_label_may_stand_beside_a_completion_or_messages():
    expected = Judgement([USER, BAD], False)
    assert read({"prompt": "How are you?", "completion": "Go away.", "label": False}) == expected
    assert read({"messages": [USER, BAD], "label": False}) == expected
    assert read({"messages": [USER, GOOD, USER, GOOD], "label": 1}).messages[1]["learned"] is False


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "Well.", "rejected": "Go away."}, "a prompt is needed"),
        ({"prompt": "Hi", "chosen": "Well.", "rejected": "Well."}, "the same"),
        ({"prompt": "Hi", "chosen": "Well.", "rejected": ""}, "rejected is empty"),
        ({"prompt": "Hi", "chosen": "Well.", "rejected": 3}, "rejected is 3"),
        ({"prompt": "Hi", "chosen": [USER], "rejected": [BAD]}, "role user after user"),
        ({"prompt": "Hi", "question": "Ho", "chosen": "Well.", "rejected": "No."}, "give one of them"),
        ({"prompt": "Hi", "completion": "Well.", "label": "good"}, "label is 'good'"),
        ({"prompt": "Hi", "completion": "Well.", "label": 0.5}, "label is 0.5"),
        ({"prompt": "Hi", "chosen": "Well.", "rejected": "No.", "label": True}, "has no label"),
    ],
)
def test_what_is_no_preference_is_refused_with_the_reason(row, problem):
    with pytest.raises(BadRow, match=problem):
        read(row)


def batch_of(data_config, write_jsonl, tokenizer, rows_, encoding="pairs", count=4, **values) -> PairBatch:
    data = open_data(data_config(str(write_jsonl(rows_)), validation_fraction=0, **values), tokenizer, encoding, 0)
    return data.train.batch(0, count)


def test_rows_hold_whole_pairs_and_know_their_parts(data_config, write_jsonl, tiny_tokenizer):
    batch = batch_of(data_config, write_jsonl, tiny_tokenizer, PAIRS, sequence_length=128, count=6)
    found = []
    for row in range(len(batch.real)):
        for pair in range(int(batch.real[row].sum())):
            parts = [batch.parts[row] == 1 + 2 * pair + side for side in (0, 1)]
            assert all(batch.position_ids[row][part].tolist() == list(range(int(part.sum()))) for part in parts)
            texts = []
            for part in parts:
                learned = batch.labels[row][part]
                texts.append(tiny_tokenizer.decode(learned[learned >= 0], skip_special_tokens=True))
            found.append(tuple(texts))
    assert {(row["chosen"], row["rejected"]) for row in PAIRS} <= set(found)
    assert (batch.parts == 0).eq(batch.attention_mask == 0).all()
    values = torch.rand(batch.input_ids.shape)
    sums = batch.sums(values)
    expected = sum(float(values[0, t]) for t in range(values.shape[1] - 1) if batch.parts[0, t + 1] == 2)
    assert float(sums[0, 0, 1]) == pytest.approx(expected, rel=1e-5)


def test_pairs_that_do_not_fit_are_cut_to_half_a_row_each_and_counted(data_config, write_jsonl, tiny_tokenizer):
    long = {"prompt": "Hi", "chosen": "word " * 60, "rejected": "other " * 60}
    hopeless = {"prompt": "word " * 60, "chosen": "yes", "rejected": "no"}
    data = open_data(
        data_config(str(write_jsonl([long, hopeless, *PAIRS])), validation_fraction=0, sequence_length=64),
        tiny_tokenizer,
        "pairs",
        0,
    )
    assert data.counts["dropped"] == 1
    assert data.counts["truncated"] >= 1
    assert data.counts["documents"] == len(PAIRS) + 1


@pytest.mark.parametrize(
    ("encoding", "row", "problem"),
    [
        ("pairs", {"messages": [USER, GOOD]}, "chosen and rejected"),
        ("pairs", LABELS[0], "kto"),
        ("labels", {"text": "Once"}, "label"),
        ("sft", PAIRS[0], "minimoe dpo"),
        ("pretrain", PAIRS[0], "minimoe dpo"),
    ],
)
def test_a_stage_refuses_rows_of_another(encoding, row, problem, data_config, write_jsonl, tiny_tokenizer):
    with pytest.raises(UserError, match=problem):
        batch_of(data_config, write_jsonl, tiny_tokenizer, [row], encoding)


# ---- losses, beside TRL's ----


@pytest.fixture
def folders(tmp_path, tiny_tokenizer) -> tuple[Path, Path]:
    """A policy and a reference."""
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    made = []
    for seed in (0, 1):
        folder = tmp_path / f"model{seed}"
        tiny_model(seed, vocab_size=448, max_position_embeddings=128, **ids).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        made.append(folder)
    return made[0], made[1]


def packed(input_ids, completion_mask, attention_mask, reference) -> PairBatch:
    """TRL's batch, chosen rows before rejected ones, with a pair in each of our rows."""
    num_pairs, length = len(input_ids) // 2, 2 * input_ids.shape[1]
    columns = {name: torch.zeros(num_pairs, length, dtype=torch.long) for name in ("ids", "pos", "mask", "parts")}
    labels = torch.full((num_pairs, length), -100)
    for pair in range(num_pairs):
        at = 0
        for side in (0, 1):
            row = pair + side * num_pairs
            real = attention_mask[row].bool()
            ids, learned = input_ids[row][real], completion_mask[row][real].bool()
            span = slice(at, at + len(ids))
            columns["ids"][pair, span] = ids
            columns["pos"][pair, span] = torch.arange(len(ids))
            columns["mask"][pair, span] = 1
            columns["parts"][pair, span] = 1 + side
            labels[pair, span] = torch.where(learned, ids, -100)
            at += len(ids)
    real = torch.ones(num_pairs, 1, dtype=torch.bool)
    return PairBatch(columns["ids"], labels, columns["pos"], columns["mask"], columns["parts"], real, real, reference)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_loss_of_a_batch_is_trls(loss, folders, tmp_path, tiny_tokenizer):
    policy, reference = folders
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        loss_type=[loss], beta=0.3, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        tiny_model_of(policy),
        tiny_model_of(reference),
        args=arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
    )
    trainer.model.eval()
    trainer.aux_loss_enabled = False  # the balance loss is not compared here
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, dict(batch)))
        rows_of_batch = [batch[name] for name in ("input_ids", "completion_mask", "attention_mask")]
        ours = packed(*rows_of_batch, sums_under(reference, *rows_of_batch))
        model = tiny_model_of(policy)
        terms = preference_objective(DpoConfig(loss=loss, beta=0.3))(model, ours, Step.of(ours)).terms
    assert float(terms["preference_loss"]) == pytest.approx(theirs, abs=1e-6 * max(1, abs(theirs)))
    assert theirs != pytest.approx(0.6931, abs=1e-3)  # the models differ


@pytest.mark.parametrize("swapped", [False, True], ids=["divergence 0", "more"])
def test_ktos_loss_of_a_batch_is_trls(swapped, folders, tmp_path, tiny_tokenizer):
    policy, reference = reversed(folders) if swapped else folders
    arguments = KTOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        beta=0.3, desirable_weight=2.0, undesirable_weight=1.5, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = KTOTrainer(
        tiny_model_of(policy),
        tiny_model_of(reference),
        args=arguments,
        train_dataset=Dataset.from_list(LABELS),
        processing_class=tiny_tokenizer,
    )
    trainer.model.eval()
    trainer.aux_loss_enabled = False
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, dict(batch)))
        # An answer beside the one of another row, which the divergence is estimated from.
        names = ("input_ids", "completion_mask", "attention_mask")
        width = max(batch["input_ids"].shape[1], batch["KL_input_ids"].shape[1])
        both = [
            torch.cat([F.pad(batch[at + name], (0, width - batch[at + name].shape[1])) for at in ("", "KL_")])
            for name in names
        ]
        ours = packed(*both, sums_under(reference, *both))
        ours = replace(ours, wanted=torch.as_tensor(batch["label"], dtype=torch.bool)[:, None])
        assert 0 < int(ours.wanted.sum()) < len(ours.wanted)
        settings = DpoConfig(loss="kto", beta=0.3, desirable_weight=2.0, undesirable_weight=1.5)
        terms = preference_objective(settings)(tiny_model_of(policy), ours, Step.of(ours)).terms
    assert float(terms["preference_loss"]) == pytest.approx(theirs, abs=1e-6 * max(1, abs(theirs)))
    assert (float(terms["kl"]) > 0) == swapped


def tiny_model_of(folder: Path):
    from minimoe.loading import load_model

    return load_model(folder, "cpu")[0]


def sums_under(folder: Path, input_ids, completion_mask, attention_mask) -> torch.Tensor:
    """(pairs, 1, 2): log-probabilities of both answers, of rows with the first answers before the second ones."""
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    logits = tiny_model_of(folder)(input_ids=input_ids, attention_mask=attention_mask).logits
    logprobs = -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return torch.stack(logprobs.view(len(labels), -1).sum(1).chunk(2), 1)[:, None]


def test_simpo_and_orpo_are_trls(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    means, lengths = -3 * torch.rand(7, 2), torch.randint(1, 9, (7, 2)).float()
    here = SimpleNamespace(device="cpu")
    zeros = torch.zeros(7, 2)
    cpo = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0, accelerator=here)
    theirs, *_ = CPOTrainer.cpo_loss(cpo, means[:, 0], means[:, 1])
    ours = preference_loss(means * lengths, lengths, zeros, DpoConfig(loss="simpo", beta=2.0, simpo_margin=0.7))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    orpo = SimpleNamespace(beta=0.2, accelerator=here)
    theirs, *_ = ORPOTrainer.odds_ratio_loss(orpo, means[:, 0], means[:, 1])
    ours = preference_loss(means * lengths, lengths, zeros, DpoConfig(loss="orpo", beta=0.2))
    torch.testing.assert_close(ours, -theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "orpo", "kto"])
def test_micro_batches_add_up_to_the_whole_batch(loss, data_config, write_jsonl, tiny_tokenizer):
    encoding, rows_ = ("labels", LABELS) if loss == "kto" else ("pairs", PAIRS)
    batch = batch_of(data_config, write_jsonl, tiny_tokenizer, rows_, encoding, sequence_length=64)
    # The balance of a step is that of all its micro-batches so far, which is another test's.
    model = tiny_model(vocab_size=448, router_aux_loss_coef=0.0, router_z_loss_coef=0.1)
    accelerator = make_accelerator(SimpleNamespace(device="cpu", precision="fp32"))
    found = []
    for micro in (4, 1):
        model.zero_grad()
        terms, _ = forward_backward(model, batch, preference_objective(DpoConfig(loss=loss)), micro, accelerator)
        found.append((terms, {n: p.grad.clone() for n, p in model.named_parameters()}))
    (whole, grads), (parts, other) = found
    if loss != "kto":  # whose KL is a mean over a micro-batch
        assert float(parts["preference_loss"]) == pytest.approx(float(whole["preference_loss"]), rel=1e-5)
    assert float(parts["load_balancing_loss"]) > 0
    if loss != "kto":
        assert max(relative_error(other[name], grads[name]) for name in grads) < 1e-4


def test_the_routers_terms_are_the_models(data_config, write_jsonl, tiny_tokenizer):
    batch = batch_of(data_config, write_jsonl, tiny_tokenizer, PAIRS, sequence_length=64)
    model = tiny_model(vocab_size=448, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    losses = preference_objective(DpoConfig())(model, batch, Step.of(batch))
    expected = model(**batch.model_inputs())
    torch.testing.assert_close(losses.terms["load_balancing_loss"], expected.load_balancing_loss)
    torch.testing.assert_close(losses.terms["router_z_loss"], expected.router_z_loss)
    torch.testing.assert_close(losses.expert_counts, expected.expert_counts)
    total = losses.terms["preference_loss"] + 0.5 * expected.load_balancing_loss + 0.1 * expected.router_z_loss
    torch.testing.assert_close(losses.loss, total)


# ---- whole runs ----


@pytest.fixture
def config(sft_config, write_jsonl, folders):
    def make(output: str = "dpo", loss: str = "sigmoid", **train) -> DpoRun:
        file = write_jsonl(LABELS if loss == "kto" else PAIRS, "preferences.jsonl")
        values = sft_config(folders[0], output, **({"max_steps": 12} | train)).model_dump()
        values["data"] |= {"train": str(file), "sequence_length": 64, "validation_fraction": 0.2}
        values["optimizer"] = {"name": "adamw", "lr": 0.01}
        return DpoRun.model_validate(values | {"dpo": {"loss": loss}})

    return make


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo", "kto"])
def test_a_run_learns_what_is_preferred(loss, config):
    made = config(loss=loss, max_steps=16)
    final = dpo.run(made)
    logged = training_rows(made.output_dir)
    assert logged[-1]["reward_accuracy"] == 1
    assert logged[-1]["reward_margin"] > logged[0]["reward_margin"]
    assert logged[-1]["load_balancing_loss"] > 0
    assert "val_reward_accuracy" in [row for row in rows(made.output_dir) if "val_loss" in row][-1]
    assert (final / "model.safetensors").exists()


def test_the_reference_is_computed_once_and_is_the_start(config, folders, monkeypatch):
    made = config()
    dpo.run(made)
    assert training_rows(made.output_dir)[0]["preference_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert training_rows(made.output_dir)[0]["kl"] == pytest.approx(0, abs=1e-6)
    cached = list(Path(made.data.cache_dir).glob("*.reference.npy"))
    assert len(cached) == 1
    monkeypatch.setattr(dpo, "reference_logprobs", None)  # not called again
    dpo.run(made, overwrite=True)
    monkeypatch.undo()
    os.truncate(cached[0], 10)  # a torn file is made anew
    dpo.run(made, overwrite=True)
    assert training_rows(made.output_dir)[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_resumed_run_leaves_the_same_bytes(loss, config):
    made = config(loss=loss)
    dpo.run(made)
    expected = outcome(made.output_dir)
    cut_back(made.output_dir, 10)
    dpo.run(made, resume=True)
    assert outcome(made.output_dir) == expected


def test_adapters_learn_preferences_too(config, folders):
    made = DpoRun.model_validate(config().model_dump() | {"lora": {}, "optimizer": {"lr": 0.05}})
    final = dpo.run(made)
    assert training_rows(made.output_dir)[0]["preference_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert training_rows(made.output_dir)[-1]["reward_accuracy"] == 1
    assert all(".lora_" in name for name in load_file(final / "adapter_model.safetensors"))


def test_the_loss_of_a_resumed_run_cannot_change(config, tmp_path, monkeypatch, capsys):
    made = config()
    dpo.run(made)
    cut_back(made.output_dir, 10)
    path = write_yaml(tmp_path / "dpo.yaml", made)
    assert run_command(monkeypatch, "dpo", path, "dpo.beta=0.3", "--resume") == 2
    assert "dpo.beta from 0.1 to 0.3" in capsys.readouterr().err


def test_the_preview_shows_both_answers(config, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "dpo.yaml", config())
    assert run_command(monkeypatch, "preview", path, "--count", "1") == 0
    shown = capsys.readouterr().out
    assert "chosen" in shown
    assert "rejected" in shown
