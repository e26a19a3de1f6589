"""Whole runs: overfitting, resuming, accumulation, several processes, balancing, and errors at the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import relative_error, tiny_config, tiny_model
from tiny_runs import STORIES, rows, run_command, training_rows, weights, write_yaml

from minimoe.config import DpoRun, GrpoRun, PretrainRun, SourceConfig
from minimoe.config.training import OptimizerConfig, TrainConfig
from minimoe.data.loader import Batch
from minimoe.errors import UserError
from minimoe.evaluate.perplexity import evaluate_model
from minimoe.model.losses import IGNORE_INDEX, load_balancing_loss
from minimoe.model.moe import MoEFeedForward
from minimoe.tokenizer import load_tokenizer
from minimoe.train import dpo, grpo, loop, pretrain, sft
from minimoe.train.objectives import next_token
from minimoe.train.optim import update_selection_bias
from minimoe.train.parallel import forward_backward, make_accelerator


def test_the_real_commands_overfit_one_batch_and_say_it_back(
    tmp_path, pretrain_config, sft_config, monkeypatch, capsys
):
    # One document in one row: every token follows from the ones before it, so the loss can reach 0.
    story = tmp_path / "story.txt"
    story.write_text(" ".join(STORIES))
    config = pretrain_config(max_steps=70, batch_size=1, eval_every=70, save_every=70)
    path = write_yaml(tmp_path / "pretrain.yaml", config)
    overrides = [f"data.train={story}", "data.validation_fraction=0", "data.sequence_length=256", "optimizer.lr=0.05"]
    assert run_command(monkeypatch, "pretrain", path, *overrides) == 0
    assert training_rows(config.output_dir)[-1]["lm_loss"] < 0.05
    final = Path(config.output_dir) / "final"
    chat = sft_config(final, max_steps=60, batch_size=8, save_every=60)
    path = write_yaml(tmp_path / "sft.yaml", chat)
    assert run_command(monkeypatch, "sft", path, "optimizer.lr=0.05") == 0
    assert training_rows(chat.output_dir)[-1]["lm_loss"] < 0.05
    capsys.readouterr()
    words = [
        "generate",
        Path(chat.output_dir) / "final",
        "--chat",
        "--json",
        "--prompt",
        "Where is the boat?",
        "temperature=0",
    ]
    assert run_command(monkeypatch, *words) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "On the sea."


def test_a_run_leaves_what_others_rely_on(pretrain_config):
    config = pretrain_config(sample_every=3, sample_prompts=["The cat"], sample_tokens=4)
    final = pretrain.run(config)
    folder = Path(config.output_dir)
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert visible == set("config.yaml run.json status.json metrics.jsonl samples.jsonl checkpoints final".split())
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"step-00000004", "step-00000006"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        p.name for p in final.iterdir()
    }
    row = training_rows(folder)[-1]
    wanted = "step tokens loss lm_loss load_balancing_loss router_z_loss lr grad_norm batch_hash expert_load"
    assert set(wanted.split()) <= set(row)
    assert [len(layer) for layer in row["expert_load"]] == [4, 4]
    validations = [row for row in rows(folder) if "val_loss" in row]
    assert [row["step"] for row in validations] == [3, 6]
    assert all(row["val_bits_per_byte"] > 0 for row in validations)


def test_gradients_with_accumulation_equal_those_of_the_whole_batch_with_uneven_masks():
    from tiny import tiny_model

    model = tiny_model(router_aux_loss_coef=0.01, router_aux_loss_type="sequence", router_z_loss_coef=0.01)
    ids = torch.randint(1, 97, (8, 12))
    labels = ids.clone()
    for row in range(8):  # between 1 and 11 learned tokens a row; rows 4 and 5 have none
        labels[row, row + 2 :] = IGNORE_INDEX
    labels[4:6] = IGNORE_INDEX
    num_items = (labels[:, 1:] != IGNORE_INDEX).sum()
    gradients = []
    for micro in (8, 2):
        model.zero_grad()
        for part_ids, part_labels in zip(ids.split(micro), labels.split(micro), strict=True):
            out = model(part_ids, labels=part_labels, num_items_in_batch=num_items, skip_logits=True, use_cache=False)
            # The router terms weigh micro-batches by learned tokens, so only the language-model part is exact.
            out.lm_loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for whole, accumulated in zip(*gradients, strict=True):
        assert relative_error(accumulated, whole) < 1e-5


def test_validation_runs_in_the_precision_of_training(pretrain_config, monkeypatch):
    precisions = []

    def evaluate(*arguments):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return evaluate_model(*arguments)

    monkeypatch.setattr(loop, "evaluate_model", evaluate)
    for precision in ("bf16", "fp32"):
        pretrain.run(pretrain_config(precision, max_steps=1, precision=precision))
    assert precisions == [True, False]


def test_brackets_in_paths_and_texts_are_shown_as_they_are(pretrain_config, write_jsonl, tmp_path, capsys, monkeypatch):
    (tmp_path / "[a]").mkdir()
    data = write_jsonl([{"text": f"[b]{text}[/x]"} for text in STORIES], "[a]/[red]stories.jsonl")
    config = pretrain_config("[bold]run[/x]", max_steps=1, sample_every=1, sample_prompts=("The [cat] [/x]",))
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": (SourceConfig(path=str(data)),)})}
    )
    path = write_yaml(tmp_path / "pretrain.yaml", config)
    assert run_command(monkeypatch, "pretrain", path) == 0
    shown = capsys.readouterr().out
    assert "[bold]run[/x]" in shown
    assert "The [cat] [/x]" in shown
    assert run_command(monkeypatch, "preview", path) == 0
    assert "[/x]" in capsys.readouterr().out
    assert run_command(monkeypatch, "evaluate", f"{config.output_dir}/final", "--data", str(data)) == 0
    assert "[red]stories" in "".join(capsys.readouterr().out.split())


def test_pretraining_goes_on_with_a_model_on_other_data(pretrain_config, write_jsonl, tmp_path, capsys):
    first = pretrain_config("first", max_steps=2)
    final = pretrain.run(first)
    other = write_jsonl([{"text": f"{text} Again."} for text in STORIES], "other.jsonl")
    values = first.model_dump(mode="json") | {"tokenizer": None, "model": None, "init_from": str(final)}
    values |= {"output_dir": str(tmp_path / "second"), "data": values["data"] | {"train": str(other)}}
    values["train"]["max_steps"] = 6
    config = PretrainRun.model_validate(values)
    again = pretrain.run(config)
    assert training_rows(config.output_dir)[0]["loss"] < training_rows(first.output_dir)[0]["loss"]
    assert weights(again).keys() == weights(final).keys()
    pretrain.run(PretrainRun.model_validate(values | {"train": values["train"] | {"max_steps": 8}}), resume=True)
    assert training_rows(config.output_dir)[-1]["step"] == 8


def test_a_tokenizer_can_be_given_a_chat_template_before_pretraining(pretrain_config, sft_config, tmp_path, capsys):
    config = pretrain_config(max_steps=1)
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    config = config.model_copy(update={"tokenizer": str(bare)})
    final = pretrain.run(config)
    assert "no chat template, which SFT needs" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="no chat template"):
        sft.run(sft_config(final, max_steps=1))
    tuned = sft.run(sft_config(final, "tuned", max_steps=1).model_copy(update={"chat_template": "chatml"}))
    assert load_tokenizer(tuned).chat_template == load_tokenizer(pretrain_config().tokenizer).chat_template
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="cannot render"):
        pretrain.run(config.model_copy(update={"chat_template": str(tmp_path / "broken.jinja")}))


def test_a_warm_up_longer_than_the_run_is_shortened_with_a_word(pretrain_config, capsys):
    values = pretrain_config(max_steps=4).model_dump(mode="json")
    values["schedule"] |= {"warmup_steps": 100, "name": "constant"}
    pretrain.run(PretrainRun.model_validate(values))
    assert "2 warm-up steps, as the 100 asked for are more than the run has" in capsys.readouterr().out
    assert [row["lr"] for row in training_rows(values["output_dir"])] == [0.01, 0.02, 0.02, 0.02]


def test_a_rate_that_is_probably_a_mistake_is_warned_of(pretrain_config, capsys):
    config = pretrain_config(max_steps=1)
    pretrain.run(config.model_copy(update={"optimizer": OptimizerConfig(name="adamw", lr=0.02)}))
    assert "optimizer.lr 0.02 is far from what adamw is usually given" in " ".join(capsys.readouterr().out.split())


def test_one_expert_per_token_with_a_weight_that_is_always_1_is_warned_of(pretrain_config, capsys):
    pretrain.run(pretrain_config("fine", max_steps=1, model={"num_experts_per_tok": 1, "norm_topk_prob": False}))
    assert "norm_topk_prob" not in capsys.readouterr().out
    pretrain.run(pretrain_config("warned", max_steps=1, model={"num_experts_per_tok": 1}))
    assert "model.norm_topk_prob makes the weight of one expert per token always 1" in capsys.readouterr().out


def test_accumulating_runs_follow_the_same_curve(pretrain_config):
    whole, accumulated = pretrain_config("whole"), pretrain_config("accumulated", micro_batch_size=1)
    # The batch-wise balance loss is a mean over each forward pass; without it the two are the same function.
    for config in (whole, accumulated):
        config.model["router_aux_loss_coef"] = 0.0
        pretrain.run(config)
    for a, b in zip(training_rows(whole.output_dir), training_rows(accumulated.output_dir), strict=True):
        assert a["batch_hash"] == b["batch_hash"]
        # After six steps of Muon, whose orthogonalisation amplifies rounding of bf16 products.
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=2e-3)
    first = [training_rows(c.output_dir)[0] for c in (whole, accumulated)]
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-5)
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(("balance", "exact"), [("batch", False), ("sequence", True), ("global", False)])
def test_what_accumulation_changes_in_the_routers_terms(balance, exact):
    """Gradients of whole rows whose padding and learned tokens are uneven, in one call and in micro-batches."""
    router = {"router_aux_loss_type": balance, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    model = tiny_model(first_k_dense_replace=1, **router).train()
    ids = torch.randint(0, 97, (6, 16))
    real = torch.arange(16) < torch.tensor([[16], [3], [9], [16], [1], [12]])
    learned = real & (torch.arange(16) >= torch.tensor([[0], [0], [7], [2], [0], [11]]))
    positions = torch.arange(16).expand_as(ids)
    batch = Batch(ids, ids.where(learned, IGNORE_INDEX), positions, real.long())
    accelerator = make_accelerator(TrainConfig(max_steps=1, device="cpu", precision="fp32"))
    found = {}
    for size in (6, 2, 1):
        model.zero_grad()
        terms, _ = forward_backward(model, batch, next_token, size, accelerator)
        found[size] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, terms
    (whole, terms), *others = found.values()
    expected = model(**batch.model_inputs(), output_router_logits=True)
    torch.testing.assert_close(terms["lm_loss"], expected.lm_loss)
    torch.testing.assert_close(terms["load_balancing_loss"], expected.load_balancing_loss)
    torch.testing.assert_close(terms["router_z_loss"], expected.router_z_loss)
    for gradients, terms in others:
        errors = {name: relative_error(gradients[name], whole[name]) for name in whole}
        assert (max(errors.values()) < 1e-5) == exact, errors
        torch.testing.assert_close(terms["router_z_loss"], expected.router_z_loss)


def test_two_processes_train_like_one_and_an_idle_expert_does_not_hang_them(tmp_path, pretrain_config):
    """20 steps on gloo; expert 0 is kept idle by its selection bias."""
    router = {"scoring_func": "sigmoid", "router_aux_loss_type": "global", "router_aux_loss_coef": 1.0}
    config = pretrain_config("one", router | {"router_z_loss_coef": 0.1})
    path = write_yaml(tmp_path / "config.yaml", config)
    worker = Path(__file__).with_name("two_processes.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    outputs = []
    for prefix in ([sys.executable], launch):
        result = subprocess.run(
            [*prefix, str(worker), str(path), str(tmp_path)],
            capture_output=True,
            text=True,
            env=env,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "Warning" not in result.stderr
        outputs.append(torch.load(tmp_path / "result.pt", weights_only=True))
    one, two = outputs
    assert two["world"] == 2
    assert two["replicas_equal"]
    assert two["idle_tokens"] == 0
    assert two["steps"] == one["steps"] == 20
    for name, gradient in one["gradients"].items():
        assert relative_error(two["gradients"][name], gradient) < 1e-5 or gradient.norm() < 1e-7, name
    assert one["hashes"] == two["hashes"]


@pytest.mark.parametrize("method", ["loss", "bias"])
def test_a_starved_expert_recovers_with_either_balancing_method(method):
    torch.manual_seed(0)
    config = tiny_config(
        num_experts=4,
        num_experts_per_tok=1,
        scoring_func="sigmoid" if method == "bias" else "softmax",
        router_bias_update_rate=0.01 if method == "bias" else 0.0,
    )
    block = MoEFeedForward(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 256, 32) + 1.0
    with torch.no_grad():
        block.gate.weight[0] -= 0.15  # the inputs' mean is 1 in every direction: expert 0 loses every token

    def load(expert_ids: torch.Tensor) -> torch.Tensor:
        return torch.bincount(expert_ids.flatten(), minlength=4)

    assert load(block(x)[1].expert_ids)[0] == 0
    optimizer = torch.optim.Adam(block.gate.parameters(), lr=0.01)
    for _ in range(150):
        _, routing = block(x)
        if method == "loss":
            optimizer.zero_grad()
            load_balancing_loss(routing.probabilities, routing.expert_ids).backward()
            optimizer.step()
        else:
            update_selection_bias(block, load(routing.expert_ids)[None], config.router_bias_update_rate)
    assert load(block(x)[1].expert_ids)[0] > 32  # half a fair share


def test_data_samples_of_every_format_train_a_step(pretrain_config, sft_config):
    samples = Path(__file__).parent.parent / "data" / "samples"
    files = sorted(path for path in samples.iterdir() if path.is_file())
    assert len(files) >= 8

    def on(config, path: Path):
        values = config.model_dump(mode="json")
        values["data"] |= {"train": str(path), "validation_fraction": 0.0, "sequence_length": 96}
        return type(config).model_validate(values)

    start = pretrain.run(on(pretrain_config("start", max_steps=1), samples / "text.txt"))
    later = {
        "preference.jsonl": (dpo, DpoRun, {}),
        "label.jsonl": (dpo, DpoRun, {"dpo": {"loss": "kto"}}),
        "prompts.jsonl": (grpo, GrpoRun, {"grpo": {"rewards": [{"function": "rewarding:same"}], "group_size": 2}}),
    }
    for path in files:
        if path.name in later:
            stage, kind, more = later.pop(path.name)
            values = on(sft_config(start, path.name, max_steps=1), path).model_dump() | more
            values["grpo"] = values.get("grpo") and values["grpo"] | {"max_new_tokens": 8}
            stage.run(kind.model_validate({key: value for key, value in values.items() if value is not None}))
            continue
        pretrain.run(on(pretrain_config(path.name, max_steps=1), path))
        if not path.name.startswith("text"):
            sft.run(on(sft_config(start, f"sft-{path.name}", max_steps=1), path))
    assert not later


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["data.train=missing.txt"], 2, "missing.txt"),
        (["train.max_stepz=3"], 2, "did you mean 'max_steps'"),
        (["train.max_steps=many"], 2, "many"),
        (["model.num_experts_per_tok=9"], 2, "9 experts per token, but there are only num_experts = 4"),
        (["model.vocab_size=64"], 2, "model.vocab_size 64 is smaller than the tokenizer's"),
        (["model.max_position_embeddings=16"], 2, "sequence_length 32 is more than model.max_position_embeddings 16"),
        (["tokenizer=runs/quickstart/nowhere"], 2, "tokenizer folder not found: runs/quickstart/nowhere"),
        (["train.device=cuda"], 2, "device 'cuda' is not available"),
        (["output_dir=/proc/minimoe"], 2, "cannot be written"),
    ],
)
def test_common_mistakes_exit_2_with_a_message_and_no_traceback(
    overrides, code, message, tmp_path, pretrain_config, monkeypatch, capsys
):
    if "device=cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    path = write_yaml(tmp_path / "config.yaml", pretrain_config())
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, "pretrain", path, *overrides) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 3


def test_empty_data_and_an_overlong_prompt_exit_2(tmp_path, pretrain_config, monkeypatch, capsys):
    config = pretrain_config(max_steps=1)
    path = write_yaml(tmp_path / "config.yaml", config)
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert run_command(monkeypatch, "pretrain", path, f"data.train={tmp_path}/empty.txt") == 2
    assert "0 usable rows" in capsys.readouterr().err
    assert run_command(monkeypatch, "pretrain", path, "--overwrite") == 0
    capsys.readouterr()
    assert run_command(monkeypatch, "generate", Path(config.output_dir) / "final", "--prompt", "The cat " * 60) == 2
    assert "32" in capsys.readouterr().err


def test_wandb_offline_needs_no_key_and_keeps_its_run_when_resumed(pretrain_config, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = pretrain_config(max_steps=2)
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"trackers": ("wandb",)})})
    pretrain.run(config)
    state = json.loads((Path(config.output_dir) / "checkpoints/step-00000002/trainer.json").read_text())
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 4})})
    pretrain.run(longer, resume=True)
    resumed = json.loads((Path(config.output_dir) / "checkpoints/step-00000004/trainer.json").read_text())
    assert resumed["wandb_run_id"] == state["wandb_run_id"]
    assert any((Path(config.output_dir) / "wandb").iterdir())


def test_gradient_checkpointing_follows_the_plain_curve(pretrain_config):
    plain, other = pretrain_config("plain", max_steps=2), pretrain_config("o", max_steps=2, gradient_checkpointing=True)
    for config in (plain, other):
        pretrain.run(config)
    for a, b in zip(training_rows(plain.output_dir), training_rows(other.output_dir), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def test_compiling_on_a_cpu_is_refused_with_the_reason(pretrain_config):
    with pytest.raises(UserError, match=r"train\.compile is for GPUs: on a CPU every batch has other sizes"):
        pretrain.run(pretrain_config(compile=True))
