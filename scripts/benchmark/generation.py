"""The jobs of generation: decoding, the first token of a prompt, and what int8 weights cost."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minimoe.bpe import train_bpe
from minimoe.config import GenerationSection, WeightsName
from minimoe.generation.engine import Engine
from minimoe.tokenizer import encode_text
from scripts.benchmark.measure import Run, median_seconds, peak_bytes, reset_peak, resident_bytes, timed
from scripts.benchmark.models import build_model
from scripts.benchmark.shapes import Shape

SHORT, LONG, NEW = 128, 512, 64  # tokens of the prompts, and of a completion


def decode(subject: str, shape: Shape, batch: int, device: str) -> Run:
    """64 greedy tokens after 128-token prompts, and the first token after 512-token prompts."""
    before = resident_bytes("VmRSS") if device == "cpu" else 0.0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights: WeightsName = "int8" if subject.endswith("int8") else "exact"
    ours = subject.startswith("minimoe")
    model: Any = build_model("minimoe" if ours else subject, shape).to(device, dtype).eval()
    compiled = device == "cuda" and not subject.endswith("eager")
    complete = with_engine(model, weights, batch, compiled) if ours else with_transformers(model, batch)

    def run() -> dict[str, float]:
        reset_peak(device)
        first = median_seconds(lambda: complete(LONG, 1), device, times=1)
        prefill = timed(lambda: complete(SHORT, 1), device)
        rate = batch * (NEW - 1) / (timed(lambda: complete(SHORT, NEW), device) - prefill)
        # Of a batch's rows each reads its own experts at worst; the limit that counts is that of one row.
        itemsize = 1 if weights == "int8" else dtype.itemsize  # of experts; for 8 rows dense matrices are float
        return {
            "tokens_per_second": rate,
            "bytes_per_second": itemsize * shape.active_matrix_parameters() * rate / batch,
            "first_token_seconds": first,
            "peak_bytes": peak_bytes(device) - before,
        }

    return run


def with_engine(model: Any, weights: WeightsName, batch: int, compiled: bool) -> Any:
    """A function (prompt's length, new tokens) that completes `batch` prompts with minimoe's engine."""
    text = Path(__file__).read_text(encoding="utf-8")
    engine = Engine(model, train_bpe(iter([text] * 4), 1024))
    engine.end_ids = frozenset()  # an untrained model may say at once that it has ended
    words = sorted({word for word in text.split() if word.isalpha()})
    words = [word for word in words if len(encode_text(engine.tokenizer, f" {word}")) == 1]
    chooser = random.Random(0)
    # The document's start is a token too.
    prompts = {
        length: ["".join(f" {word}" for word in chooser.choices(words, k=length - 1)) for _ in range(batch)]
        for length in (SHORT, LONG)
    }

    def complete(length: int, count: int) -> None:
        settings = GenerationSection(
            max_new_tokens=count,
            temperature=0,
            top_p=1,
            batch_size=batch,
            weights=weights,
            compile=compiled,
        )
        for completion in engine.generate(prompts[length], settings):
            assert (completion.prompt_tokens, completion.new_tokens) == (length, count), completion

    return complete


def with_transformers(model: Any, batch: int) -> Any:
    """The same with `generate` of transformers."""
    model.config.output_router_logits = False  # of use in training only
    prompts = {
        length: torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)
        for length in (SHORT, LONG)
    }
    # transformers compiles the step if the cache has a fixed size
    static = {"cache_implementation": "static"} if model.device.type == "cuda" else {}

    def complete(length: int, count: int) -> None:
        ids = prompts[length]
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **static)

    return complete


def rounding(model_dir: str, text: str) -> Run:
    """A trained model's bits per byte on held-out documents, with exact and with int8 weights."""
    engine = Engine.from_pretrained(model_dir, "cpu", torch.float32)
    documents = [json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines()]
    encoded = [engine.encode("") + encode_text(engine.tokenizer, document) for document in documents]
    encoded = [ids[: engine.context_length] for ids in encoded]
    num_bytes = sum(len(engine.tokenizer.decode(ids[1:]).encode()) for ids in encoded)

    def bits_per_byte(weights: WeightsName) -> float:
        packed = engine.packed(weights)
        assert packed is not None
        nats = sum(
            float(F.cross_entropy(packed.logits(ids[:-1]), torch.tensor(ids[1:]), reduction="sum")) for ids in encoded
        )
        return nats / math.log(2) / num_bytes

    def run() -> dict[str, float]:
        return {"exact": bits_per_byte("exact"), "int8": bits_per_byte("int8")}

    return run
