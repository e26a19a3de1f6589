"""Two ranks train every stage after SFT as one does, as copies or sharded: the same losses, answers and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import relative_error, tiny_model
from tiny_runs import CHATS, MODEL, STORIES, cut_back, on_ranks, training_rows

pytestmark = pytest.mark.long
PAIRS = [
    {"prompt": chat["messages"][0]["content"], "chosen": chat["messages"][1]["content"], "rejected": "I do not know."}
    for chat in CHATS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with what one process made of every stage, and what two made as copies and sharded."""
    root = tmp_path_factory.mktemp("ranks")
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_model(vocab_size=len(tiny_tokenizer), **ids).save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    files = {"chats": CHATS, "pairs": PAIRS, "stories": [{"text": text} for text in STORIES]}
    files["prompts"] = [{"prompt": pair["prompt"]} for pair in PAIRS]
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"init_from": str(root / "model")}
    reward = {"rewards": [{"function": "rewarding:has_letter"}], "group_size": 4, "max_new_tokens": 8, "kl_weight": 0.1}
    stages = {
        "lora": ("sft", "chats", start | {"lora": {}}),
        "distil": ("distil", "stories", {"model": MODEL, "distil": {"teacher": start["init_from"]}}),
        "dpo": ("dpo", "pairs", start),
        "kto": ("dpo", "pairs", start | {"dpo": {"loss": "kto"}}),
        "grpo": ("grpo", "prompts", start | {"grpo": reward}),
    }
    for ranks in ("one", "two", "sharded"):
        words = []
        for name, (stage, data, values) in stages.items():
            config = values | {
                "output_dir": str(root / ranks / name),
                "data": {
                    "train": str(root / f"{data}.jsonl"),
                    "validation_fraction": 0.3,
                    "sequence_length": 64,
                    "cache_dir": str(root / "cache"),
                    "num_processes": 1,
                },
                "optimizer": {"name": "adamw", "lr": 0.01},
                "train": {"max_steps": 4, "batch_size": 8, "precision": "fp32", "log_every": 1, "eval_every": 4}
                | {"save_every": 2},
            }
            if ranks == "sharded":
                config["parallel"] = {} if name == "lora" else {"expert_size": 2}
            path = root / f"{ranks}-{name}.yaml"
            path.write_text(json.dumps(config))
            words += [stage, str(path)]
        on_ranks(1 if ranks == "one" else 2, *words)
    return root


@pytest.mark.parametrize("layout", ["two", "sharded"])
@pytest.mark.parametrize("name", ["lora", "distil", "dpo", "kto", "grpo"])
def test_two_ranks_equal_one(name, layout, trained):
    one, two = (training_rows(trained / ranks / name) for ranks in ("one", layout))
    assert len(one) == len(two) == 4
    for row, other in zip(one, two, strict=True):
        # At first the model is its own reference, and which answer is ahead is a matter of rounding.
        rounded = {"reward_accuracy"} if row["step"] == 1 else set()
        for key in row.keys() - {"batch_hash", "expert_load", "clipped"} - rounded:
            # Rewards and probabilities are of the same answers; sums are made in another order.
            assert other[key] == pytest.approx(row[key], rel=2e-4, abs=2e-5), (row["step"], key)
    for file in ("model.safetensors", "adapter_model.safetensors"):
        if (trained / "one" / name / "final" / file).exists():
            weights, others = (load_file(trained / ranks / name / "final" / file) for ranks in ("one", layout))
            assert max(relative_error(others[key], weights[key]) for key in weights) < 2e-3
            break
    else:
        raise AssertionError("no weights")


def test_a_sharded_run_of_an_adapter_goes_on_as_it_would_have(trained, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(trained / "sharded" / "lora", folder)
    cut_back(folder, 2)
    config = json.loads((trained / "sharded-lora.yaml").read_text()) | {"output_dir": str(folder)}
    (tmp_path / "lora.yaml").write_text(json.dumps(config))
    on_ranks(2, "--resume", "sft", str(tmp_path / "lora.yaml"))
    places = (folder, trained / "sharded" / "lora")
    end, expected = (load_file(place / "final" / "adapter_model.safetensors") for place in places)
    assert all(torch.equal(end[key], tensor) for key, tensor in expected.items())


def test_ranks_share_the_prompts_and_log_each_answer_once(trained):
    one, two = ((trained / ranks / "grpo" / "rollouts.jsonl").read_text().splitlines() for ranks in ("one", "two"))
    assert len(one) == len(two) == 4 * 8
    # The first rollout is of the same weights.
    assert [json.loads(line)["answer"] for line in one[:8]] == [json.loads(line)["answer"] for line in two[:8]]
