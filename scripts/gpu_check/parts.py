"""The parts that compare what a GPU computes with what is known.

T tokens, D hidden, E experts, k experts per token, I expert width.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from minimoe import MiniMoeConfig, MiniMoeForCausalLM
from minimoe.bpe import train_bpe
from minimoe.config import GenerationSection
from minimoe.generation.engine import Engine
from minimoe.model.dispatch import DISPATCHES
from minimoe.model.experts import Experts
from minimoe.model.moe import MoEFeedForward
from minimoe.ops import FORMS, using
from scripts.benchmark.machine import ceilings

Figures = Iterator[dict[str, Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROOT = Path(__file__).parents[2]
TEXT = [Path(__file__).read_text(encoding="utf-8")] * 8


def small_config(**more: Any) -> MiniMoeConfig:
    """A model that is done in moments, of sizes that grouped matmuls take."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    widths = {"num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    return MiniMoeConfig(**{**sizes, **widths, "max_position_embeddings": 256, "initializer_range": 0.1, **more})


def small_model(device: str, dtype: torch.dtype = torch.float32, **more: Any) -> MiniMoeForCausalLM:
    torch.manual_seed(0)
    return MiniMoeForCausalLM(small_config(**more)).to(device, dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def machine(device: str) -> Figures:
    """What this is, and the speed of its matmuls and its memory."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    yield {"device": name, **versions}
    figures = ceilings(device)()
    yield {
        "matmul bf16 (TFLOP/s)": figures["bf16"] / 1e12,
        "matmul fp32 (TFLOP/s)": figures["fp32"] / 1e12,
        "copy (GB/s)": figures["copy"] / 1e9,
    }


def dispatch(device: str) -> Figures:
    """Both paths, as they are written and as faster forms compute them, against float64 on the CPU."""
    cases = {
        "few": (4, 2, 512, 64, 128),
        "many": (64, 8, 1024, 128, 64),
        "one": (1, 1, 64, 64, 64),
        "idle": (8, 2, 33, 64, 64),
    }
    for name, (num_experts, k, num_tokens, hidden, width) in cases.items():
        torch.manual_seed(0)
        sizes = {"num_experts": num_experts, "hidden_size": hidden, "moe_intermediate_size": width}
        experts = Experts(small_config(num_experts_per_tok=k, **sizes))
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        tokens, weights = torch.randn(num_tokens, hidden), torch.rand(num_tokens, k)
        scores = torch.rand(num_tokens, num_experts)
        if name == "idle":
            scores[:, :3] = -1
        ids = scores.topk(k).indices
        for dtype_name, dtype in DTYPES.items():
            rounded = copy.deepcopy(experts).to(dtype)
            with using():
                truth = _results(
                    DISPATCHES["replicated"], tokens.to(dtype).double(), ids, weights.double(), rounded.double()
                )
            rounded = copy.deepcopy(experts).to(device, dtype)
            for path, function in DISPATCHES.items():
                for backend in ((), ("cuda",), ("cpu", "c", "cuda"), ("triton",)):
                    arguments = (tokens.to(device, dtype), ids.to(device), weights.to(device), rounded)
                    row = {"case": name, "dtype": dtype_name, "path": path}
                    with using(*backend):
                        suited = [
                            form.backend for form in FORMS[path] if form.backend in backend and form.suits(*arguments)
                        ]
                        if backend and not suited:
                            continue
                        try:
                            found = _results(function, *arguments)
                        except Exception as failure:  # such as what a compiler of kernels says of this GPU
                            yield row | {"computed by": suited[0], "failed": repr(failure)[:300], "right": False}
                            continue
                    errors = [error(a, e) for a, e in zip(found, truth, strict=True)]
                    yield row | {
                        "computed by": suited[0] if suited else "definition",
                        "values": errors[0],
                        "gradients": max(errors[1:]),
                        "right": max(errors) < {"float32": 1e-5, "bfloat16": 2e-2}[dtype_name],
                    }


def _results(function: Any, tokens: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> list[Tensor]:
    """The output, and the gradients of tokens, weights and experts."""
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    out = function(tokens, ids, weights, experts)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    out.backward(slope)
    gradients = [tokens.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]
    return [out, *(gradient.clone() for gradient in gradients if gradient is not None)]


def documents(device: str) -> Figures:
    """Documents that share a row give the logits that each gives alone."""
    lengths = (5, 40, 1, 50)
    ids = torch.randint(0, 512, (1, sum(lengths)), device=device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    for name, dtype in DTYPES.items():
        for training in (True, False):
            # In bf16 another order of sums may choose another expert, which says nothing about documents.
            experts = {} if dtype == torch.float32 else {"first_k_dense_replace": 3}
            model = small_model(device, dtype, **experts).train(training)
            with torch.no_grad():
                together = model(ids, position_ids=positions, use_cache=False).logits.split(lengths, dim=1)
                alone = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
            worst = max(error(a, e) for a, e in zip(together, alone, strict=True))
            right = worst < {"float32": 1e-5, "bfloat16": 5e-2}[name]
            yield {"dtype": name, "training": training, "largest error": worst, "right": right}


def curves(device: str) -> Figures:
    """50 steps on the CPU and here, from the same weights on the same batches."""
    batches = torch.randint(0, 512, (50, 4, 64), generator=torch.Generator().manual_seed(0))
    batches[:, :, 1::2] = (batches[:, :, ::2] * 7 + 3) % 512  # half of it can be learned
    losses: dict[str, list[float]] = {}
    for place in ("cpu", device):
        model = small_model(place).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[place] = []
        for ids in batches.to(place):
            loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[place].append(float(loss))
    pairs = list(zip(losses["cpu"], losses[device], strict=True))
    for step in (0, 9, 24, 49):
        yield {"step": step + 1, "loss on the CPU": pairs[step][0], "loss here": pairs[step][1]}
    worst = max(abs(a - b) for a, b in pairs)
    yield {"largest difference": worst, "right": worst < 0.02}


def synchronisation(device: str) -> Figures:
    """The MoE block in bf16 never makes the host wait."""
    if device != "cuda":
        yield {"checked": False, "because": "only CUDA says when the host waits"}
        return
    block = MoEFeedForward(small_config()).to(device, torch.bfloat16).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    block(x)[0].sum().backward()  # what is made at the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    y, _ = block(x)
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        block.eval()(x)
    torch.cuda.set_sync_debug_mode("default")
    yield {"checked": True, "right": True}


def graphs(device: str) -> Figures:
    """A compiled training step is one graph, and stays the same one while documents change."""
    model = small_model(device, torch.bfloat16 if device == "cuda" else torch.float32).train()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "eager")
    counters = torch._dynamo.utils.counters
    for step in range(6):
        ids = torch.randint(0, 512, (4, 64), device=device)
        positions = torch.arange(64, device=device).repeat(4, 1)
        positions[:, 10 + step :] -= 10 + step
        loss = compiled(ids, labels=ids, position_ids=positions, skip_logits=True, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            expected = model(ids, labels=ids, position_ids=positions, skip_logits=True, use_cache=False).loss
        made = counters["stats"]["unique_graphs"]
        yield {"step": step + 1, "graphs": made, "loss": float(loss), "loss without": float(expected)}
    yield {"right": made == 1}


def generation(device: str) -> Figures:
    """Greedy tokens of the compiled step equal those of the plain one."""
    tokenizer = train_bpe(iter(TEXT), 480)
    engine = Engine(small_model(device, torch.bfloat16), tokenizer)
    prompts = ["The documents", "def", "A model that is", "x"]
    settings = GenerationSection(max_new_tokens=48, temperature=0, top_p=1, batch_size=4)
    plain = [completion.token_ids for completion in engine.generate(prompts, settings)]
    if device != "cuda":
        yield {"tokens": sum(map(len, plain)), "checked": False, "because": "decoding is compiled on a GPU only"}
        return
    compiled = settings.model_copy(update={"compile": True})
    fast = [completion.token_ids for completion in engine.generate(prompts, compiled)]
    same = sum(a == b for a, b in zip(plain, fast, strict=True))
    yield {"prompts": len(prompts), "alike": same, "right": same == len(prompts)}


def resume(device: str) -> Figures:
    """A run that is killed in mid-step and resumed, beside one that is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"text": text}) for text in (TEXT[0][start : start + 400] for start in range(0, 8000, 100))]
        (folder / "text.jsonl").write_text("\n".join(rows))
        train_bpe(iter(TEXT), 480).save_pretrained(folder / "tokenizer")
        words = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=4"]
        words += ["model.head_dim=16", "model.moe_intermediate_size=32", f"data.train={folder}/text.jsonl"]
        words += [f"data.cache_dir={folder}/cache", "data.sequence_length=64", f"tokenizer={folder}/tokenizer"]
        words += ["train.max_steps=20", "train.save_every=5", "train.eval_every=20", f"train.device={device}"]
        words += ["train.precision=fp32", "train.sample_every=null"]
        codes = [_pretrain(folder, "whole", words), _pretrain(folder, "killed", words, kill_at=13)]
        codes.append(_pretrain(folder, "killed", [*words, "--resume"]))
        yield {"exit code": str(codes), "right": codes == [0, -9, 0]}
        if codes == [0, -9, 0]:
            whole, killed = (
                MiniMoeForCausalLM.from_pretrained(folder / run / "final").state_dict() for run in ("whole", "killed")
            )
            worst = max(error(killed[key], whole[key]) for key in whole)
            yield {"largest error of a weight": worst, "bit for bit": worst == 0, "right": worst < 1e-3}


def _pretrain(folder: Path, run: str, words: list[str], kill_at: int | None = None) -> int:
    failpoint = {} if kill_at is None else {"MINIMOE_FAILPOINTS": f"train.step@{kill_at}=kill"}
    command = [sys.executable, "-m", "minimoe.cli", "pretrain", str(_ROOT / "configs/quickstart/pretrain.yaml")]
    command += [*words, f"output_dir={folder}/{run}"]
    return subprocess.run(command, env=os.environ | failpoint, check=False).returncode
