"""A model as the tools around `transformers` use it, beside its own Qwen3-MoE as control."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from tiny import tiny_config, tiny_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from minimoe import MiniMoeForCausalLM
from minimoe.errors import UserError
from minimoe.model.losses import IGNORE_INDEX
from minimoe.train.callback import SelectionBiasCallback
from minimoe.train.optim import update_selection_bias

VARIANTS = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid", "n_shared_experts": 1, "first_k_dense_replace": 1},
    "qwen3-moe": None,
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request):
    if request.param is not None:
        return tiny_model(**request.param).eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": []}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **layers, **experts)).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (3, 12))
    labels = ids.masked_fill(torch.rand(3, 12) < 0.4, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def trainer(model, tmp_path):
    def make(**arguments) -> Trainer:
        arguments |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        return Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **arguments))

    return make


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)


def test_the_loss_in_evaluation_is_the_cross_entropy(model, batch):
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, batch["labels"]))


def test_label_smoothing_shifts_the_labels(model, batch, trainer):
    logits = model(batch["input_ids"]).logits
    loss = trainer(label_smoothing_factor=0.1).compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, cross_entropy(logits, batch["labels"], 0.1))


def test_labels_may_come_shifted(model, batch):
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    expected = model(**batch).loss
    # The stock model wants labels too, and leaves them alone.
    actual = model(batch["input_ids"], labels=batch["labels"], shift_labels=shifted.roll(1, 0)).loss
    assert (actual - expected).abs() > 1e-3
    actual = model(batch["input_ids"], labels=batch["labels"].roll(1, 0), shift_labels=shifted).loss
    torch.testing.assert_close(actual, expected)


def test_a_tuple_has_the_loss_or_the_logits_first(model, batch):
    expected = model(**batch)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected.loss)
    torch.testing.assert_close(expected.to_tuple()[0], expected.loss)
    torch.testing.assert_close(model(batch["input_ids"])[0], expected.logits)


def test_metrics_are_computed_of_the_logits_alone(model, batch, trainer):
    loss, logits, labels = trainer().prediction_step(model, batch, prediction_loss_only=False)
    torch.testing.assert_close(logits, model(**batch).logits)
    assert (labels == batch["labels"]).all()
    torch.testing.assert_close(loss, cross_entropy(logits, labels))


@pytest.mark.parametrize("options", [{"skip_logits": True}, {"logits_to_keep": 2}])
def test_an_adapter_of_the_head_takes_part_in_every_loss(batch, options):
    class Adapted(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.head, self.bias, self.weight = head, nn.Parameter(torch.randn(97)), head.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.bias

    model = tiny_model().eval()
    model.lm_head = Adapted(model.lm_head)
    torch.testing.assert_close(model(**batch, **options).loss, model(**batch).loss)
    model = tiny_model().eval()
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(model(**batch, **options).loss, model(**batch).loss)


def test_weights_of_another_shape_are_taken_only_when_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"mismatch|another shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=101)
    larger = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=101, ignore_mismatched_sizes=True)
    assert larger.lm_head.weight.shape[0] == 101
    torch.testing.assert_close(
        larger.model.layers[1].self_attn.q_proj.weight, model.model.layers[1].self_attn.q_proj.weight
    )


def test_what_tools_set_on_a_config_is_kept_and_named(tmp_path):
    model = tiny_model()
    model.config.sliding_window = 3
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not read sliding_window of config.json"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.sliding_window == 3
    # A key like one of ours is taken for a misspelled one if that is missing.
    model.config.layer_norm_eps = 1.0
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"layer_norm_eps.* of config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="layer_norm_eps: unknown key, did you mean 'rms_norm_eps'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_logits(model, batch, tmp_path, place):
    expected = model(**batch).logits
    if place == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.model.layers[1].mlp.experts.down_proj.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_learns_from_a_language_model_and_loads_again(model, tmp_path, auto):
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "language model")
    classifier = auto.from_pretrained(tmp_path / "language model", num_labels=3)
    ids = torch.randint(1, 97, (4, 8))
    shape = ids.shape if auto is AutoModelForTokenClassification else ids.shape[:1]
    labels = torch.arange(ids.numel()).view_as(ids).remainder(3)[..., 0] if len(shape) == 1 else ids % 3
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for _ in range(40):
        loss = classifier(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2
    classifier.eval().save_pretrained(tmp_path / "classifier")
    loaded = auto.from_pretrained(tmp_path / "classifier").eval()
    torch.testing.assert_close(loaded(ids).logits, classifier(ids).logits)
    assert loaded(ids).logits.shape == (*shape, 3)


def test_the_selection_bias_moves_under_trainer_as_under_minimoe(tmp_path):
    """Two steps of two micro-batches, with padding, which counts nowhere."""
    ids = torch.randint(0, 97, (8, 6))
    rows = [{"input_ids": row, "labels": row, "attention_mask": (torch.arange(6) < 4).long()} for row in ids]
    model = tiny_model(scoring_func="sigmoid", router_bias_update_rate=0.1)
    before = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers]
    chosen = []
    model.register_forward_hook(lambda module, args, outputs: chosen.append(outputs.expert_counts))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        use_cpu=True,
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[SelectionBiasCallback()]).train()
    assert [int(counts.sum()) for counts in chosen] == [2 * 4 * 2 * 2] * 4  # rows, real tokens, k, layers
    wanted = tiny_model(scoring_func="sigmoid")
    for layer, bias in zip(wanted.model.layers, before, strict=True):
        layer.mlp.gate.e_score_correction_bias.copy_(bias)
    for counts in (chosen[0] + chosen[1], chosen[2] + chosen[3]):
        update_selection_bias(wanted, counts, 0.1)
    for layer, other in zip(model.model.layers, wanted.model.layers, strict=True):
        torch.testing.assert_close(layer.mlp.gate.e_score_correction_bias, other.mlp.gate.e_score_correction_bias)
    with pytest.raises(UserError, match="no minimoe model in Linear"):
        SelectionBiasCallback().on_train_begin(None, None, None, model=nn.Linear(1, 1))


def test_answers_that_a_trainer_generates_do_not_move_the_bias():
    model = tiny_model(scoring_func="sigmoid", router_bias_update_rate=0.1).train()
    callback = SelectionBiasCallback()
    callback.on_train_begin(None, None, None, model=model)
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias
    before, ids = bias.clone(), torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        model(ids)
    callback.on_optimizer_step(None, None, None)
    assert torch.equal(bias, before)
    model(ids)
    callback.on_optimizer_step(None, None, None)
    assert not torch.equal(bias, before)


def test_continuous_batching_and_early_exit_generate_the_same_tokens(model):
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=96, pad_token_id=0)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected.append(model.generate(ids, generation_config=settings)[0, len(prompt) :].tolist())
        early = model.generate(ids, generation_config=settings, assistant_early_exit=1)[0, len(prompt) :].tolist()
        assert early == expected[-1]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=small)
    assert [results[f"req_{number}"].generated_tokens for number in range(2)] == expected


def test_experts_backends_are_used_when_asked_for(model, batch, tmp_path):
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    for backend in ("grouped_mm", "batched_mm", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=backend).eval()
        assert loaded.config._experts_implementation == backend
        torch.testing.assert_close(loaded(**batch).logits, expected)
    with pytest.raises(ValueError, match="fastest"):
        model.set_experts_implementation("fastest")


def test_an_experts_backend_runs_in_place_of_the_dispatch_paths():
    model = tiny_model()
    assert model.config._experts_implementation == "eager"
    called = []
    ALL_EXPERTS_FUNCTIONS.register("counting", lambda module, x, ids, weights: called.append(ids.shape) or x)
    model.config._experts_implementation = "counting"
    model(torch.randint(0, 97, (2, 5)))
    assert called == [(10, 2)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["softmax", "sigmoid"])
def test_shapes_are_computed_without_weights(variant, training, dtype):
    with torch.device("meta"):
        model = MiniMoeForCausalLM(tiny_config(**VARIANTS[variant])).to(dtype).train(training)
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    outputs = model(ids, labels=ids)
    assert outputs.logits.is_meta
    assert outputs.logits.shape == (2, 9, 97)
    assert outputs.loss.shape == ()


@pytest.mark.parametrize("variant", ["softmax", "sigmoid"])
def test_a_model_is_sharded_by_transformers_own_plans(variant, tmp_path):
    tiny_model(**VARIANTS[variant]).save_pretrained(tmp_path / "model")
    worker, result = Path(__file__).parent / "two_ranks_sharded.py", tmp_path / "result.json"
    launcher = "torch.distributed.run --nproc_per_node 2 --standalone".split()
    command = [sys.executable, "-m", *launcher, str(worker), str(tmp_path / "model"), str(result)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(result.read_text())
    assert set(found) == {"tensor", "tensor and experts", "fully sharded", "fully sharded and experts"}
    for layout, errors in found.items():
        assert errors["sharded"] > 0, layout
        assert errors["loss"] < 1e-5, layout
        assert errors["evaluated"] < 1e-5, layout
        assert errors["gradients"] < 1e-5, layout


def test_gradients_of_each_row_by_torch_func(model):
    """`vmap` needs an experts backend whose shapes do not depend on values, here as in Qwen3-MoE."""
    model.set_experts_implementation("grouped_mm")
    rows = torch.randint(0, 97, (3, 8))

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        return functional_call(model, parameters, (), inputs).loss

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, rows)
    for number, ids in enumerate(rows):
        alone = torch.func.grad(loss)(parameters, ids)
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][number], gradient, atol=1e-5, rtol=1e-4)
