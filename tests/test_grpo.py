"""GRPO: rewards in their process, advantages, losses, and that what rolls out is what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_runs import cut_back, outcome, rows, run_command, training_rows, write_yaml

from minimoe.config import GenerationSection, GrpoConfig, GrpoRun, RewardConfig
from minimoe.data.prompts import open_prompts, prompt_at
from minimoe.errors import UserError
from minimoe.generation.engine import Engine
from minimoe.train import grpo
from minimoe.train.answers import Answer, pack_answers, set_advantages, token_weights
from minimoe.train.grpo import policy_loss
from minimoe.train.objectives import Step
from minimoe.train.rewards import Rewards

PROMPTS = [{"prompt": f"Where is the {a}?", "check": a} for a in ("cat", "boat", "moon", "hat", "bell", "kite")]


def one(name: str, **more) -> list[RewardConfig]:
    return [RewardConfig(function=f"rewarding:{name}", **more)]


# ---- rewards ----


def test_a_reward_that_misbehaves_costs_its_answer_alone():
    with Rewards(one("misbehaves"), seconds=1.0) as rewards:
        for kind, said in [
            ("raise", "ValueError: not this one"),
            ("hang", "more than 1 s"),
            ("die", "ended its process"),
            ("nan", "no finite number"),
            ("text", "ValueError"),
        ]:
            assert rewards("a", {"kind": kind}) == (None, [None])
            assert said in rewards.last_error
            assert rewards("a", {}) == (0.5, [0.5])


def test_what_a_reward_prints_stays_out_of_the_output(capfd):
    with Rewards(one("talks"), seconds=5.0) as rewards:
        assert rewards("a", {}) == (1.0, [1.0])
    printed = capfd.readouterr()
    assert "a reward talks" not in printed.out


def test_several_rewards_are_weighted():
    functions = [*one("is_short", weight=0.5), *one("same", weight=2.0)]
    with Rewards(functions, seconds=5.0) as rewards:
        assert rewards("four", {}) == (0.0, [-4.0, 1.0])


@pytest.mark.parametrize(
    ("name", "said"), [("rewarding:absent", "AttributeError"), ("absent_module:f", "absent_module")]
)
def test_a_reward_that_is_not_there_is_refused_at_once(name, said):
    with pytest.raises(UserError, match=said):
        Rewards([RewardConfig(function=name)], seconds=1.0)


@pytest.mark.parametrize("name", ["nothing", "a:b:c", ":f", "m:", "m:f()"])
def test_a_reward_is_named_as_module_and_function(name):
    with pytest.raises(ValueError, match="module:function"):
        RewardConfig(function=name)


# ---- advantages and weights ----


def answers(*values: tuple[float | None, int, bool]) -> list[Answer]:
    return [Answer([1, 2], list(range(n)), [-1.0] * n, "", cut, reward, [reward]) for reward, n, cut in values]


def test_advantages_are_of_the_group():
    group = answers((1.0, 2, False), (0.0, 2, False), (0.0, 2, False), (1.0, 2, False))
    assert set_advantages(group, "grpo", True)
    deviation = torch.tensor([1.0, 0, 0, 1]).std().item()
    assert [a.advantage for a in group] == pytest.approx(
        [0.5 / deviation, -0.5 / deviation] * 1 + [-0.5 / deviation, 0.5 / deviation], abs=1e-3
    )
    assert set_advantages(group, "dr_grpo", True)
    assert [a.advantage for a in group] == [0.5, -0.5, -0.5, 0.5]


def test_groups_that_teach_nothing_are_told():
    group = answers((1.0, 2, False), (1.0, 2, False))
    assert not set_advantages(group, "grpo", True)
    assert [a.advantage for a in group] == [0, 0]
    assert not set_advantages(answers((None, 2, False), (None, 2, False)), "grpo", True)


def test_failed_and_truncated_answers_are_left_out():
    group = answers((1.0, 2, False), (None, 2, False), (0.0, 2, False), (9.0, 4, True))
    assert set_advantages(group, "dr_grpo", False)
    assert [a.advantage for a in group] == [0.5, 0, -0.5, 0]
    assert [w > 0 for w in token_weights(group, "grpo", 4)] == [True, False, True, False]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "cispo"])
def test_the_weights_make_the_mean_that_the_paper_has(loss):
    group = answers((1.0, 2, False), (0.0, 6, False))
    weights = token_weights(group, loss, 8)
    expected = {"grpo": [1 / 4, 1 / 12], "dr_grpo": [1 / 16, 1 / 16], "cispo": [1 / 8, 1 / 8]}[loss]
    assert weights == pytest.approx(expected)


def test_the_policy_loss_is_clipped_where_it_would_go_on():
    old = torch.zeros(4)
    new = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    policy_loss(new, old, advantages, GrpoConfig(rewards=one("same"))).sum().backward()
    ratio = new.detach().exp()
    # Better answers are not pushed beyond 1 + clip, worse ones not below 1 - clip.
    torch.testing.assert_close(new.grad, torch.tensor([0.0, -ratio[1], ratio[2], 0.0]))
    new.grad = None
    policy_loss(new, old, advantages, GrpoConfig(rewards=one("same"), loss="cispo")).sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([-1.2, -0.8, 1.2, 0.8]))


def test_the_loss_of_a_batch_is_the_papers_mean_over_tokens_and_answers():
    """The formulas with a mask over padded rows: the trainers of other libraries sample for themselves."""
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 5) - 2, torch.randn(3, 5) - 2, torch.randn(3, 1)
    lengths = torch.tensor([5, 3, 1])
    mask = (torch.arange(5) < lengths[:, None]).float()
    coef_1 = torch.exp(new - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.3)
    theirs = -torch.min(coef_1 * advantages, coef_2 * advantages)
    grpo_ = ((theirs * mask).sum(-1) / mask.sum(-1)).mean()
    dr_grpo = (theirs * mask).sum() / (3 * 5)
    group = answers(*[(0.0, int(n), False) for n in lengths])
    for loss, expected in (("grpo", grpo_), ("dr_grpo", dr_grpo)):
        settings = GrpoConfig(rewards=one("same"), clip_high=0.3, loss=loss)
        weights = torch.tensor(token_weights(group, loss, 5))[:, None] * mask
        ours = (weights * policy_loss(new, old, advantages, settings)).sum()
        torch.testing.assert_close(ours, expected)


# ---- what rolls out is what is trained ----


@pytest.mark.parametrize("router", [{}, {"scoring_func": "sigmoid", "n_shared_experts": 1, "first_k_dense_replace": 1}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engine_and_training_agree_in_probabilities_and_routing(router, temperature, tiny_tokenizer):
    model = tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=64, **router)
    engine = Engine(model, tiny_tokenizer)
    prompts = [engine.encode(f"Where is the {word}?", chat=True) for word in ("cat", "moon", "boat by the sea")]
    settings = GenerationSection(max_new_tokens=12, temperature=temperature, top_p=1.0)
    completions = engine.complete(prompts, settings, with_logprobs=True)
    made = [
        Answer(ids, list(c.token_ids), list(c.logprobs), c.text, False, 0.0, [0.0], advantage=1.0)
        for ids, c in zip(prompts, completions, strict=True)
    ]
    config = GrpoConfig(rewards=one("same"), max_new_tokens=12, temperature=temperature)
    batch = pack_answers(made, token_weights(made, config.loss, 12), 64, 0, 1)
    model.train()
    with torch.no_grad():
        inputs = batch.model_inputs()
        outputs = model(**inputs, logprob_temperature=temperature, output_router_logits=True)
        learned = batch.weights > 0
        assert learned.sum() == sum(len(c.token_ids) for c in completions)
        assert (outputs.token_logprobs - batch.old_logprobs)[learned].abs().max() < 1e-5
        # Each answer alone, as it was decoded, through the inference path: the same experts for every token.
        trained = [logits.view(*batch.input_ids.shape, -1) for logits in outputs.router_logits]
        model.eval()
        for answer in made:
            ids = answer.prompt_ids + answer.token_ids
            row, start = next(
                (r, s)
                for r in range(len(batch.input_ids))
                for s in range(65 - len(ids))
                if batch.input_ids[r, s : s + len(ids)].tolist() == ids and batch.position_ids[r, s] == 0
            )
            alone = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False).router_logits
            for one_layer, layer in zip(alone, trained, strict=True):
                k = model.config.num_experts_per_tok
                expected = one_layer.topk(k).indices.sort().values
                assert torch.equal(layer[row, start : start + len(ids)].topk(k).indices.sort().values, expected)


def test_packing_answers_changes_nothing_of_the_loss(tiny_tokenizer):
    model = tiny_model(vocab_size=448, max_position_embeddings=64, router_aux_loss_coef=0.0)
    made = [
        Answer([5, 6, 7], [8, 9], [-3.0, -4.0], "", False, 1.0, [1.0], advantage=0.7),
        Answer([5, 6], [9, 8, 7, 6], [-3.0, -4.0, -5.0, -6.0], "", False, 0.0, [0.0], advantage=-0.7),
    ]
    config = GrpoConfig(rewards=one("same"), max_new_tokens=8)
    objective = grpo.rollout_objective(config)
    values = []
    for length in (32, 6):  # together in a row, or one a row
        batch = pack_answers(made, token_weights(made, config.loss, 8), length, 0, 1)
        values.append(objective(model, batch, Step.of(batch)).loss)
    torch.testing.assert_close(*values)
    expected = torch.zeros(())
    for answer in made:
        ids = torch.tensor([answer.prompt_ids + answer.token_ids])
        logp = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        ratio = (logp[len(answer.prompt_ids) - 1 :] - torch.tensor(answer.logprobs)).exp()
        clipped = ratio.clamp(0.8, 1.2)
        per_token = -torch.minimum(ratio * answer.advantage, clipped * answer.advantage)
        expected = expected + per_token.mean() / 2
    torch.testing.assert_close(values[0], expected)


# ---- prompts ----


def test_prompts_are_read_in_every_form_and_keep_their_row(data_config, write_jsonl, tiny_tokenizer):
    asked = {"role": "user", "content": "How are you?"}
    made = [
        {"prompt": "How are you?", "id": 1},
        {"prompt": [asked], "id": 2},
        {"messages": [asked, {"role": "assistant", "content": "Well."}], "id": 3},
        {"conversations": [{"from": "human", "value": "How are you?"}], "id": 4},
    ]
    found = open_prompts(
        data_config(str(write_jsonl(made)), validation_fraction=0, sequence_length=64), tiny_tokenizer, 0, 8, 9
    )
    assert [prompt.messages for prompt in found.train] == [[asked]] * 4
    assert [prompt.row["id"] for prompt in found.train] == [1, 2, 3, 4]
    order = [prompt_at(found.train, number, 0).row["id"] for number in range(8)]
    assert sorted(order[:4]) == sorted(order[4:]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "Once"}, "prompt is None"),
        ({"prompt": 3}, "prompt is 3"),
        ({"messages": [{"role": "assistant", "content": "Well."}]}, "role assistant first"),
        ({"prompt": "word " * 99}, "leave no room"),
    ],
)
def test_what_is_no_prompt_is_refused(row, said, data_config, write_jsonl, tiny_tokenizer):
    with pytest.raises(UserError, match=said):
        open_prompts(data_config(str(write_jsonl([row])), validation_fraction=0), tiny_tokenizer, 0, 8, 9)


def test_bad_prompts_are_counted_where_the_config_says_so(data_config, write_jsonl, tiny_tokenizer):
    made = [{"prompt": 3}, {"prompt": "How are you?"}, {"prompt": "word " * 99}]
    data = data_config(str(write_jsonl(made)), validation_fraction=0, on_bad_rows="skip", sequence_length=64)
    found = open_prompts(data, tiny_tokenizer, 0, 8, 9)
    assert found.counts == {"bad_rows": 1, "dropped": 1}
    assert len(found.train) == 1


# ---- whole runs ----


@pytest.fixture
def config(sft_config, write_jsonl, tmp_path, tiny_tokenizer):
    folder = tmp_path / "model"
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_model(
        vocab_size=len(tiny_tokenizer), max_position_embeddings=64, initializer_range=0.05, **ids
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)

    def make(output: str = "grpo", more: dict | None = None, lora: dict | None = None, **train) -> GrpoRun:
        values = sft_config(folder, output, **({"max_steps": 6, "batch_size": 16} | train)).model_dump()
        values["data"] |= {"train": str(write_jsonl(PROMPTS, "prompts.jsonl")), "sequence_length": 64}
        values["data"] |= {"validation_fraction": 0.2}
        values["optimizer"] = {"name": "adamw", "lr": 0.02}
        values |= {"grpo": {"rewards": [{"function": "rewarding:has_letter"}], "max_new_tokens": 10} | (more or {})}
        return GrpoRun.model_validate(values | {"lora": lora})

    return make


def rollouts_of(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "cispo"])
def test_a_run_gets_more_reward(loss, config, capsys):
    made = config(more={"loss": loss}, max_steps=25)
    grpo.run(made)
    assert "tokens per expert" not in capsys.readouterr().out  # nobody knows how long the answers will be
    logged = training_rows(made.output_dir)
    assert logged[-1]["reward"] > 2 * logged[0]["reward"] + 0.05
    assert logged[0]["ratio_difference"] < 1e-5
    assert logged[0]["load_balancing_loss"] > 0
    assert "val_reward" in rows(made.output_dir)[-1]
    found = rollouts_of(made.output_dir)
    assert len(found) == 25 * 16
    assert {"step", "prompt", "answer", "reward", "rewards", "advantage", "tokens", "truncated"} <= set(found[0])


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_resumed_run_leaves_the_same_bytes_also_within_a_rollout(lora, config):
    made = config(more={"updates_per_rollout": 4, "kl_weight": 0.1}, lora=lora, save_every=1, keep_last=9, max_steps=7)
    grpo.run(made)
    expected, answers_ = outcome(made.output_dir), rollouts_of(made.output_dir)
    assert {row["step"] for row in answers_} == {0, 4}
    logged = training_rows(made.output_dir)
    assert logged[0]["ratio_difference"] < 1e-5 < logged[1]["ratio_difference"]
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert logged[3]["kl"] > 1e-6
    for step in (6, 4, 2):
        cut_back(made.output_dir, step)
        grpo.run(made, resume=True)
        assert outcome(made.output_dir) == expected
        assert rollouts_of(made.output_dir) == answers_


@pytest.mark.parametrize("kind", ["", "raise"])
def test_rewards_that_are_all_the_same_or_all_fail_train_nothing_and_are_counted(kind, config, write_jsonl, capsys):
    made = config(more={"rewards": [{"function": "rewarding:misbehaves"}]}, max_steps=2)
    write_jsonl([row | {"kind": kind} for row in PROMPTS], "prompts.jsonl")
    grpo.run(made)
    logged = training_rows(made.output_dir)
    assert logged[-1]["degenerate_groups"] == 1
    assert logged[-1]["policy_loss"] == 0
    assert logged[-1]["failed_rewards"] == (16 if kind else 0)
    assert (
        "a reward failed, and its answer is left out: rewarding:misbehaves: ValueError" in capsys.readouterr().out
    ) == bool(kind)


def test_what_cannot_be_is_refused(config, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "grpo.yaml", config())
    assert run_command(monkeypatch, "grpo", path, "train.batch_size=12") == 2
    assert "no multiple of grpo.group_size 8" in capsys.readouterr().err
    assert run_command(monkeypatch, "grpo", path, "grpo.max_new_tokens=64") == 2
    assert "no room for a prompt" in capsys.readouterr().err
    assert run_command(monkeypatch, "grpo", path, "grpo.rewards=[{function: 'absent:f'}]") == 2
    assert "absent" in capsys.readouterr().err


def test_the_preview_shows_prompts(config, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "grpo.yaml", config())
    assert run_command(monkeypatch, "preview", path, "--count", "2") == 0
    shown = capsys.readouterr().out
    assert "Where is the" in shown
    assert "check" in shown
