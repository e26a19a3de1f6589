"""Distillation: the teacher's probabilities, kept or asked for, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from tiny_runs import MODEL, cut_back, outcome, rows, run_command, training_rows, write_yaml

from minimoe.bpe import train_bpe
from minimoe.config import DistilConfig, DistilRun
from minimoe.convert.export import export_folder
from minimoe.data.batch import Batch
from minimoe.errors import UserError
from minimoe.train import distil
from minimoe.train.distil import Taught, Teacher, distil_objective, divergence
from minimoe.train.objectives import Step
from minimoe.train.parallel import make_accelerator
from minimoe.train.teacher_cache import TeacherCache, row_key


@pytest.fixture
def teacher(tmp_path, tiny_tokenizer) -> Path:
    folder = tmp_path / "teacher"
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_model(3, vocab_size=448, **ids).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(pretrain_config, teacher):
    def make(output: str = "distil", more: dict | None = None, learn: str = "documents", **train) -> DistilRun:
        values = pretrain_config(output, **train).model_dump(exclude={"tokenizer", "model", "init_from", "context"})
        values["distil"] = {"teacher": str(teacher), "learn": learn} | (more or {})
        return DistilRun.model_validate(values | {"model": MODEL})

    return make


def packed_batch() -> Batch:
    """Two documents and padding in a row, one in the other."""
    ids = torch.randint(10, 400, (2, 12))
    positions = torch.tensor([[*range(5), *range(4), *range(3)], list(range(12))])
    mask = torch.tensor([[1] * 9 + [0] * 3, [1] * 12])
    labels = torch.where((mask == 1) & (positions > 0), ids, -100)
    return Batch(ids, labels, positions, mask)


def learned_of(batch: Batch) -> torch.Tensor:
    return F.pad(batch.labels[:, 1:] != -100, (0, 1))


def test_the_divergence_is_that_of_torch_and_never_negative():
    torch.manual_seed(0)
    student, teacher = torch.randn(20, 30), torch.randn(20, 30)
    for temperature in (1.0, 2.0):
        logprobs = (teacher / temperature).log_softmax(-1)
        expected = F.kl_div((student / temperature).log_softmax(-1), logprobs, log_target=True, reduction="none").sum(
            -1
        )
        torch.testing.assert_close(divergence(student, Taught(None, logprobs), temperature), expected)
        kept, ids = logprobs.topk(30)
        torch.testing.assert_close(divergence(student, Taught(ids, kept), temperature), expected, atol=1e-5, rtol=1e-4)
        kept, ids = logprobs.topk(5)
        few = divergence(student, Taught(ids, kept), temperature)
        assert (few >= -1e-6).all()
        assert (few <= expected + 1e-5).all()  # what is taken together can only hide differences
        assert divergence(teacher, Taught(ids, kept), temperature).abs().max() < 1e-5


def test_tokens_beyond_the_tokenizer_take_no_part():
    logits = torch.randn(3, 40)
    logprobs = logits[:, :30].log_softmax(-1)
    torch.testing.assert_close(divergence(logits, Taught(None, logprobs), 1.0), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_the_teacher_reads_each_document_of_a_row_alone(stock, teacher, config, tmp_path, tiny_tokenizer):
    folder = teacher
    if stock:
        export_folder(str(teacher), str(tmp_path / "stock"))
        folder = tmp_path / "stock"
    made = config(more={"teacher": str(folder)})
    model, _ = distil.load_model(folder, "cpu", torch.float32)
    ask = Teacher(model, len(tiny_tokenizer), made, make_accelerator(made.train))
    batch = packed_batch()
    found = ask(batch, learned_of(batch)).logprobs
    alone = []
    for row, span in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 12))):
        logits = model(input_ids=batch.input_ids[row, span][None]).logits[0, :-1, : len(tiny_tokenizer)]
        alone.append(logits.log_softmax(-1))
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_what_is_kept_is_what_the_teacher_says(config, tiny_tokenizer, teacher):
    made = config(more={"top_k": 4, "cache": True})
    made = made.model_copy(update={"data": made.data.model_copy(update={"sequence_length": 12})})
    model, _ = distil.load_model(teacher, "cpu", torch.float32)
    accelerator = make_accelerator(made.train)
    batch = packed_batch()
    plain = Teacher(model, len(tiny_tokenizer), config(more={"top_k": 4}), accelerator)(batch, learned_of(batch))
    first = Teacher(model, len(tiny_tokenizer), made, accelerator)(batch, learned_of(batch))
    again = Teacher(model, len(tiny_tokenizer), made, accelerator)
    again._ask = None  # not asked a second time
    for found in (first, again(batch, learned_of(batch))):
        assert torch.equal(found.ids, plain.ids)
        torch.testing.assert_close(found.logprobs, plain.logprobs)


def test_torn_and_damaged_records_are_not_read(tmp_path):
    row = {name: tensor[0] for name, tensor in packed_batch().tensors().items()}
    key, ids, logprobs = row_key(row), torch.arange(24).view(12, 2), -torch.rand(12, 2)
    cache = TeacherCache(tmp_path / "t", 12, 2, 0)
    cache.put(key, ids, logprobs)
    cache.put(b"0" * 16, ids, logprobs)
    file = tmp_path / "t" / "rank-0.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    cut = TeacherCache(tmp_path / "t", 12, 2, 0)
    assert len(cut) == 1
    assert torch.equal(cut.get(key)[0], ids)
    assert torch.equal(cut.get(key)[1], logprobs)
    assert cut.get(b"0" * 16) is None
    cut.put(b"0" * 16, ids, logprobs)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:40] + b"x" + whole[41:])
    damaged = TeacherCache(tmp_path / "t", 12, 2, 1)
    assert damaged.get(key) is None
    assert damaged.get(b"0" * 16) is not None


def test_the_loss_is_a_mixture_and_has_the_routers_terms():
    model = tiny_model(vocab_size=448, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    batch = packed_batch()
    logprobs = torch.randn(int(learned_of(batch).sum()), 400).log_softmax(-1)
    distil_ = DistilConfig(teacher="x", weight=0.3, temperature=2.0)
    losses = distil_objective(distil_, lambda batch, learned: Taught(None, logprobs))(model, batch, Step.of(batch))
    plain = model(**batch.model_inputs())
    torch.testing.assert_close(losses.terms["lm_loss"], plain.lm_loss)
    expected = 0.7 * plain.lm_loss + 0.3 * 4 * losses.terms["divergence"]
    expected = expected + 0.5 * plain.load_balancing_loss + 0.1 * plain.router_z_loss
    torch.testing.assert_close(losses.loss, expected)


@pytest.mark.parametrize("more", [{}, {"top_k": 8, "cache": True}], ids=["full", "cached"])
@pytest.mark.parametrize("learn", ["documents", "answers"])
def test_a_student_comes_nearer_and_resumes_with_the_same_bytes(more, learn, config, write_jsonl):
    from tiny_runs import CHATS

    made = config(more=more | {"weight": 1.0}, learn=learn, max_steps=14, batch_size=2)
    if learn == "answers":
        data = made.data.model_dump() | {"train": str(write_jsonl(CHATS, "chats.jsonl")), "sequence_length": 48}
        made = DistilRun.model_validate(made.model_dump() | {"data": data})
    distil.run(made)
    logged = training_rows(made.output_dir)
    assert logged[-1]["divergence"] < 0.8 * logged[0]["divergence"]
    assert logged[-1]["load_balancing_loss"] > 0
    assert any("val_loss" in row for row in rows(made.output_dir))
    expected = outcome(made.output_dir)
    cut_back(made.output_dir, 10)
    distil.run(made, resume=True)
    assert outcome(made.output_dir) == expected


def test_a_student_with_another_vocabulary_is_refused(config, tmp_path):
    other = tmp_path / "other"
    tokenizer = train_bpe(iter(["abc abd bca " * 20]), vocab_size=300)
    tiny_model(vocab_size=448, eos_token_id=tokenizer.eos_token_id).save_pretrained(other)
    tokenizer.save_pretrained(other)
    values = config().model_dump() | {"model": None, "init_from": str(other)}
    with pytest.raises(UserError, match="is not the teacher's"):
        distil.run(DistilRun.model_validate(values))


def test_the_preview_shows_what_the_student_reads(config, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "distil.yaml", config())
    assert run_command(monkeypatch, "preview", path, "--count", "1") == 0
    assert "83% learned" in capsys.readouterr().out  # all but the first token of a document


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distil.cache=true"], "needs top_k"),
        (["model=null"], "exactly one of model"),
        (["lora={}", "optimizer.name=adamw"], "give init_from"),
        (["data.sequence_length=99"], "more than the teacher's 64 positions"),
        (["distil.teacher=nowhere"], "model folder not found"),
    ],
)
def test_what_cannot_be_is_refused(words, said, config, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "distil.yaml", config())
    assert run_command(monkeypatch, "distil", path, *words) == 2
    assert said in capsys.readouterr().err
