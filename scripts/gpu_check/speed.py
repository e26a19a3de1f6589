"""The parts that measure: training and decoding beside others, where the time of a step goes, what is learned in it."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimoe.bpe import train_bpe
from minimoe.config import OptimizerConfig
from minimoe.ops import BACKENDS, using
from minimoe.tokenizer import encode_texts
from minimoe.train.optim import build_optimizers
from scripts.benchmark.generation import decode
from scripts.benchmark.machine import ceilings
from scripts.benchmark.models import build_model
from scripts.benchmark.shapes import GPU_SHAPES, SHAPES, Shape
from scripts.benchmark.training import train_step

Figures = Iterator[dict[str, Any]]
SMALL = Shape(layers=2, hidden=64, heads=2, experts=4, width=64, vocabulary=1536, batch=2, sequence=64)
# The most telling comparisons first, as the time may end: for each shape ours, the strongest peer, the dense twin.
SUBJECTS = (
    "minimoe",
    "qwen3 grouped_mm",
    "dense",
    "minimoe triton",
    "minimoe compiled",
    "qwen3 grouped_mm compiled",
    "dense compiled",
    "qwen3 literal loop",
)
# What the names of kernels tell; the first that fits.
KINDS = {
    "grouped matmuls": ("grouped", "moe"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated", "softmax"),
    "optimizer": ("multi_tensor", "adam", "foreach", "newton"),
    "gather, scatter, sort": ("index", "gather", "scatter", "sort", "radix", "searchsorted"),
    "other matmuls": ("gemm", "nvjet", "cutlass", "::mm", "addmm", "bmm", "matmul"),
}


def speed(device: str) -> Figures:
    """Tokens a second, model FLOPs utilisation and peak memory of a whole training step in bf16."""
    on_gpu = device == "cuda"
    shapes = {name: GPU_SHAPES[name] for name in ("gpu-fine", "gpu-768")} | {"few": replace(SHAPES["few"], batch=64)}
    peak = ceilings(device)()["bf16"]
    for subject in SUBJECTS if on_gpu else ("minimoe", "qwen3 grouped_mm", "dense"):
        for name, shape in (shapes if on_gpu else {"small": SMALL}).items():
            by_kernels = subject == "minimoe triton"
            try:
                with using(*BACKENDS) if by_kernels else nullcontext():
                    run = train_step(
                        "minimoe" if by_kernels else subject, shape, "bf16", device, at_least=1.0, settle=0.5
                    )()
            except torch.OutOfMemoryError:
                yield {"shape": name, "subject": subject, "out of memory": True}
                continue
            except Exception as failure:
                if not by_kernels:
                    raise
                yield {"shape": name, "subject": subject, "failed": repr(failure)[:300]}
                continue
            finally:
                torch._dynamo.reset()
                if on_gpu:
                    torch.cuda.empty_cache()
            yield {
                "shape": name,
                "subject": subject,
                "tokens/s": round(shape.batch * shape.sequence / run["seconds"]),
                "utilisation": shape.step_flops() / run["seconds"] / peak,
                "peak memory (GB)": run["peak_bytes"] / 1e9,
            }


def decoding(device: str) -> Figures:
    """Tokens a second of greedy decoding."""
    shape = SHAPES["few"] if device == "cuda" else replace(SMALL, sequence=512)
    for batch in (1, 8, 64) if device == "cuda" else (1,):
        for subject in ("minimoe", "minimoe eager", "qwen3 grouped_mm"):
            figures = decode(subject, shape, batch, device)()
            names = {"tokens/s": "tokens_per_second", "first token (s)": "first_token_seconds"}
            yield {"batch": batch, "subject": subject, **{key: figures[name] for key, name in names.items()}}


def profile(device: str) -> Figures:
    """The ten costliest kernels of a training step, and the share of each kind."""
    shape = GPU_SHAPES["gpu-fine"] if device == "cuda" else SMALL
    step = train_step("minimoe", shape, "bf16", device, settle=0.5)
    step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as found:
        step()
    times: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[event.key] = times.get(event.key, 0.0) + spent
    total = sum(times.values()) or 1.0
    shares: dict[str, float] = {}
    for name, spent in times.items():
        kind = next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")
        shares[kind] = shares.get(kind, 0.0) + spent / total
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        yield {"kind": kind, "share": share}
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:10]:
        yield {"kernel": name[:90].replace("|", "/"), "share": spent / total, "milliseconds": spent / 1e3}


def learning(device: str, limit: float) -> Figures:
    """The MoE and the dense twin of equal active parameters in equal seconds, on Python's own library as text."""
    on_gpu = device == "cuda"
    seconds = min(90.0, (limit - 30) / 2) if on_gpu else 2.0
    shape = replace(SHAPES["few"], batch=64, vocabulary=4096) if on_gpu else SMALL
    train, held_out = (part.to(device) for part in _tokens(shape.vocabulary, 40_000_000 if on_gpu else 200_000))
    for subject in ("minimoe", "dense"):
        torch.manual_seed(0)
        model = build_model(subject, shape).to(device).train()
        optimizers = build_optimizers(model, OptimizerConfig(name="muon", lr=0.02))
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        started, steps, shown = time.monotonic(), 0, 0.0
        while (spent := time.monotonic() - started) < seconds:
            left = min(1.0, 3 * (1 - spent / seconds))  # constant, then down to nothing over the last third
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * left
            ids = _rows(train, shape, steps)
            with torch.autocast(device, torch.bfloat16):
                loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
            if on_gpu:
                torch.cuda.synchronize()
            if spent >= shown:
                yield {
                    "subject": subject,
                    "seconds": round(spent, 1),
                    "steps": steps,
                    "held-out": _loss(model, held_out, shape),
                }
                shown += seconds / 4
                started += time.monotonic() - started - spent  # what the measuring took is not training
        yield {"subject": subject, "seconds": seconds, "steps": steps, "held-out": _loss(model, held_out, shape)}


def _tokens(vocabulary: int, most_bytes: int) -> tuple[Tensor, Tensor]:
    """Ids of text that every machine has: its training part and a tenth held out."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size < most_bytes and "site-packages" not in path.parts and "test" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
            size += len(texts[-1])
    tokenizer = train_bpe(iter(texts[::8]), vocabulary)
    ids = torch.tensor([token for ids in encode_texts(tokenizer, texts) for token in ids])
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def _rows(ids: Tensor, shape: Shape, step: int) -> Tensor:
    """Random rows (B, S), the same for every subject."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(ids) - shape.sequence, (shape.batch, 1), generator=generator).to(ids.device)
    return ids[starts + torch.arange(shape.sequence, device=ids.device)]


@torch.no_grad()
def _loss(model: Any, ids: Tensor, shape: Shape) -> float:
    """Nats per token of 4 batches."""
    model.eval()
    losses = [
        model(rows, labels=rows, skip_logits=True, use_cache=False).lm_loss
        for rows in (_rows(ids, shape, -1 - n) for n in range(4))
    ]
    model.train()
    return float(torch.stack(losses).mean())
