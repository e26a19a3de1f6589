"""What `benchmark.py` measures: every job prepares its subject once and returns a function that runs it once.

Jobs run in worker processes, one subject each. A run returns figures by name; `seconds` is the time of one piece
of work. Legend of the letters: B batch, S sequence, T tokens = B*S, D hidden, E experts, k experts per token,
I expert width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimoe.config import DataConfig, GenerationSection, SourceConfig, WeightsName
from minimoe.data.loader import open_data
from minimoe.generation.compiled import CompiledModel
from minimoe.generation.decode import DecodeBatch
from minimoe.generation.engine import Engine
from minimoe.generation.packed import PackedModel
from minimoe.model.attention import MiniMoeAttention, document_lengths
from minimoe.model.config import MiniMoeConfig
from minimoe.model.language_model import MiniMoeForCausalLM
from minimoe.model.moe import MoEFeedForward
from minimoe.ops.onednn import float32_by_onednn
from minimoe.model.rotary import MiniMoeRotaryEmbedding
from minimoe.tokenizer import encode_text, train_bpe
from minimoe.train.memory import keep_freed_memory

Run = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    experts: int = 4
    width: int = 1408  # of one expert
    k: int = 2  # experts per token
    vocabulary: int = 6400
    batch: int = 8
    sequence: int = 512
    kv_heads: int = 2

    def active_matrix_parameters(self) -> int:
        """Numbers that one token is multiplied with."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * head_dim
        feed_forward = self.k * 3 * self.hidden * self.width + self.experts * self.hidden
        return self.layers * (attention + feed_forward) + self.vocabulary * self.hidden

    def step_flops(self) -> float:
        """Floating-point operations of forward and backward: 6 per token and parameter, and causal attention."""
        attention = 6 * self.layers * self.hidden * self.sequence  # two products, half of each is masked
        return self.batch * self.sequence * (6 * self.active_matrix_parameters() + attention)


SHAPES = {
    "few": Shape(),
    "fine": Shape(experts=32, width=256, k=4),
    "tiny": Shape(layers=4, hidden=256, heads=4, experts=8, width=384, vocabulary=4096),
}
GPU_SHAPES = {
    "gpu-768": Shape(hidden=768, heads=12, width=2048, k=1, batch=64, kv_heads=4),
    "gpu-fine": Shape(hidden=1024, heads=16, experts=64, width=512, k=8, batch=64, kv_heads=4),
}


class LiteralExperts(nn.Module):
    """The plainest MoE: a list of modules, and for each a boolean mask of the slots that chose it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for _ in range(shape.experts):
            sizes = {
                "gate_proj": (shape.hidden, shape.width),
                "up_proj": (shape.hidden, shape.width),
                "down_proj": (shape.width, shape.hidden),
            }
            self.experts.append(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}))

    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As `minimoe.model.dispatch.replicated`, with masks instead of a sort."""
        num_tokens, num_slots = expert_ids.shape
        slots, flat = tokens.repeat_interleave(num_slots, dim=0), expert_ids.flatten()
        outputs = torch.empty_like(slots)
        for index, expert in enumerate(self.experts):
            rows = slots[flat == index]
            activated = F.silu(expert["gate_proj"](rows)) * expert["up_proj"](rows)  # type: ignore[index]
            outputs[flat == index] = expert["down_proj"](activated).to(outputs.dtype)  # type: ignore[index]
        outputs = outputs.view(num_tokens, num_slots, tokens.shape[1])
        return (outputs * weights[..., None]).sum(dim=1).to(tokens.dtype)


def minimoe_config(shape: Shape, **more: Any) -> MiniMoeConfig:
    return MiniMoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        moe_intermediate_size=shape.width,
        max_position_embeddings=2 * shape.sequence,
        **more,
    )


def build_model(subject: str, shape: Shape) -> Any:
    """An untrained model, the same architecture for every subject but `dense`."""
    torch.manual_seed(0)
    if subject.startswith("qwen3"):
        config = Qwen3MoeConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
            moe_intermediate_size=shape.width,
            norm_topk_prob=True,
            max_position_embeddings=2 * shape.sequence,
            tie_word_embeddings=True,
            output_router_logits=True,  # switches its balance loss on
            router_aux_loss_coef=0.01,
        )
        config._experts_implementation = "grouped_mm" if "grouped_mm" in subject else "eager"
        model = Qwen3MoeForCausalLM(config)
        if subject == "qwen3 literal loop":
            for layer in model.model.layers:
                layer.mlp.experts = LiteralExperts(shape)
        return model
    if subject == "dense":
        active = shape.k * shape.width
        return MiniMoeForCausalLM(minimoe_config(shape, first_k_dense_replace=shape.layers, intermediate_size=active))
    return MiniMoeForCausalLM(minimoe_config(shape))


def train_step(subject: str, shape: Shape, dtype: str, device: str) -> Run:
    """A whole optimizer step: forward, balance loss, backward, clipping, AdamW."""
    before = resident_bytes("VmRSS") if device == "cpu" else 0.0
    training_memory(subject, device)
    model = build_model(subject, shape).to(device).train()
    called = torch.compile(model) if subject.endswith("compiled") else model
    options = {} if subject.startswith("qwen3") else {"skip_logits": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = random_ids(shape, device)

    def step() -> None:
        with training_products(subject, shape, device):
            with autocast(device, dtype):
                loss = called(input_ids=ids, labels=ids, use_cache=False, **options).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def run() -> dict[str, float]:
        reset_peak(device)
        seconds = timed(step, device)
        return {"seconds": seconds, "peak_bytes": peak_bytes(device) - before}

    return run


def moe_layer(subject: str, shape: Shape, dtype: str, device: str) -> Run:
    """Forward and backward of one MoE block, router and dispatch included."""
    training_memory(subject, device)
    torch.manual_seed(0)
    block = MoEFeedForward(minimoe_config(shape))
    if subject == "literal loop":
        block.experts = LiteralExperts(shape)  # type: ignore[assignment]
        block.train_dispatch = lambda tokens, expert_ids, weights, experts: experts(tokens, expert_ids, weights)
    block.to(device).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(shape.batch, shape.sequence, shape.hidden, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32

    def step() -> None:
        block.zero_grad()
        x.grad = None
        with training_products(subject, shape, device):
            with autocast(device, dtype):
                y, _ = block(x.to(compute))
            y.backward(gradient.to(y.dtype))

    return repeated(step, device)


def bare_products(shape: Shape, dtype: str, device: str) -> Run:
    """The six matrix products of each expert's forward and backward, over an even split of the rows."""
    training_memory("minimoe", device)
    rows = shape.batch * shape.sequence * shape.k // shape.experts
    kind = {"dtype": torch.bfloat16 if dtype == "bf16" else torch.float32, "device": device}
    x = torch.randn(shape.experts, rows, shape.hidden, **kind)  # type: ignore[call-overload]
    wide = torch.randn(shape.experts, rows, 2 * shape.width, **kind)  # type: ignore[call-overload]
    activated = torch.randn(shape.experts, rows, shape.width, **kind)  # type: ignore[call-overload]
    gate_up = torch.randn(shape.experts, 2 * shape.width, shape.hidden, **kind)  # type: ignore[call-overload]
    down = torch.randn(shape.experts, shape.hidden, shape.width, **kind)  # type: ignore[call-overload]
    outs = [torch.empty_like(t) for t in (wide, x, activated, down, x, gate_up)]

    def step() -> None:
        with training_products("minimoe", shape, device):
            for e in range(shape.experts):
                torch.mm(x[e], gate_up[e].t(), out=outs[0][e])
                torch.mm(activated[e], down[e].t(), out=outs[1][e])
                torch.mm(x[e], down[e], out=outs[2][e])
                torch.mm(x[e].t(), activated[e], out=outs[3][e])
                torch.mm(wide[e], gate_up[e], out=outs[4][e])
                torch.mm(wide[e].t(), x[e], out=outs[5][e])

    return repeated(step, device)


def attention(shape: Shape, dtype: str, device: str, documents: int) -> Run:
    """Forward and backward of one attention block; every row holds so many documents of unequal lengths."""
    training_memory("minimoe", device)
    config = minimoe_config(shape, attn_implementation="sdpa")
    torch.manual_seed(0)
    block, rotary = MiniMoeAttention(config, 0).to(device).train(), MiniMoeRotaryEmbedding(config).to(device)
    x = torch.randn(shape.batch, shape.sequence, shape.hidden, device=device, requires_grad=True)
    positions = torch.arange(shape.sequence, device=device).repeat(shape.batch, 1)
    for row in positions:  # documents begin at random columns
        for start in sorted((torch.randperm(shape.sequence - 1)[: documents - 1] + 1).tolist()):
            row[start:] = torch.arange(shape.sequence - start)
    lengths = document_lengths(positions, None, (shape.batch, shape.sequence))
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    gradient = torch.randn_like(x)

    def step() -> None:
        with training_products("minimoe", shape, device):
            with autocast(device, dtype):
                y, _ = block(x.to(compute), rotary(x, positions), documents=lengths)
            y.backward(gradient.to(y.dtype))

    return repeated(step, device)


def ceilings(device: str) -> Run:
    """What the machine can do: operations a second of a large product, bytes a second of a large copy and sum."""
    size = 2048 if device == "cpu" else 8192
    matrices = {name: torch.randn(size, size, device=device, dtype=dtype) for name, dtype in DTYPES.items()}
    source = torch.randn((64 if device == "cpu" else 1024) << 20, device=device)
    target = torch.empty_like(source)

    def run() -> dict[str, float]:
        with float32_by_onednn(torch.device(device), size):
            figures = {
                n: 2 * size**3 / repeated(partial(torch.mm, m, m), device)()["seconds"] for n, m in matrices.items()
            }
        figures["read"] = source.numel() * 4 / repeated(source.sum, device)()["seconds"]
        figures["copy"] = 2 * source.numel() * 4 / repeated(lambda: target.copy_(source), device)()["seconds"]
        return figures

    return run


def decode(subject: str, shape: Shape, batch: int, device: str) -> Run:
    """64 greedy tokens after 128-token prompts; the model reads all weights it uses for every token."""
    ours = subject.startswith("minimoe")
    weights: WeightsName = "int8" if subject.endswith("int8") else "exact"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = build_model("minimoe" if ours else subject, shape).to(device, dtype).eval()
    ids = torch.randint(3, shape.vocabulary, (batch, 128), device=device)
    new_tokens = 64
    settings = GenerationSection(max_new_tokens=new_tokens, temperature=0, top_p=1, batch_size=batch)
    fast: PackedModel | CompiledModel | None = None  # made once, as Engine does
    if ours:
        fast = CompiledModel(model) if device == "cuda" else PackedModel(model, weights)
    else:
        model.config.output_router_logits = False  # of use in training only
    static = {"cache_implementation": "static"} if device == "cuda" else {}  # transformers then compiles the step

    def complete(count: int) -> None:
        if ours:
            rows = DecodeBatch(model, ids.tolist(), count, settings, [torch.Generator()] * batch, None, fast)
            for _ in range(count):
                rows.step()
        else:
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **static)

    def run() -> dict[str, float]:
        prefill = timed(lambda: complete(1), device)
        seconds = timed(lambda: complete(new_tokens), device) - prefill
        rate = batch * (new_tokens - 1) / seconds
        # Of a batch's rows each reads its own experts at worst; the limit that counts is that of one row.
        itemsize = 1 if weights == "int8" else dtype.itemsize  # of experts; for 8 rows dense matrices are float
        read = itemsize * shape.active_matrix_parameters() * rate / batch
        return {"tokens_per_second": rate, "bytes_per_second": read, "prefill_tokens_per_second": ids.numel() / prefill}

    return run


def rounding(model_dir: str, text: str) -> Run:
    """A trained model's bits per byte on held-out documents, with exact and with int8 weights."""
    engine = Engine.from_pretrained(model_dir, "cpu", torch.float32)
    documents = [json.loads(line)["text"] for line in Path(text).read_text().splitlines()]
    encoded = [engine.encode("") + encode_text(engine.tokenizer, document) for document in documents]
    encoded = [ids[: engine.context_length] for ids in encoded]
    num_bytes = sum(len(engine.tokenizer.decode(ids[1:]).encode()) for ids in encoded)

    def bits_per_byte(weights: WeightsName) -> float:
        packed = PackedModel(engine.model, weights)
        nats = sum(
            float(F.cross_entropy(packed.logits(ids[:-1]), torch.tensor(ids[1:]), reduction="sum")) for ids in encoded
        )
        return nats / math.log(2) / num_bytes

    def run() -> dict[str, float]:
        return {"exact": bits_per_byte("exact"), "int8": bits_per_byte("int8")}

    return run


def data() -> Run:
    """Tokenise some megabytes of text, then read batches of packed rows."""
    words = [w for w in Path(__file__).read_text().split() if w.isalpha()]
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(words, k=200)) for _ in range(4000)]  # some 4.5 MB

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            tokenizer = train_bpe(iter(texts[:500]), 2048)
            config = DataConfig(
                train=(SourceConfig(path=f"{folder}/text.jsonl"),),
                sequence_length=512,
                cache_dir=f"{folder}/cache",
                num_processes=1,
            )
            start = time.perf_counter()
            loader = open_data(config, tokenizer, "pretrain", seed=0).train
            tokenising = time.perf_counter() - start
            start = time.perf_counter()
            for step in range(100):
                loader.batch(step, 8)
            loading = time.perf_counter() - start
        return {
            "tokenised_mb_per_second": sum(map(len, texts)) / 1e6 / tokenising,
            "loader_tokens_per_second": 100 * 8 * 512 / loading,
        }

    return run


JOBS: dict[str, Callable[..., Run]] = {
    job.__name__: job for job in (train_step, moe_layer, bare_products, attention, decode, rounding, data, ceilings)
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("qwen3", "literal loop")  # are as `transformers` trains them; the two settings are of minimoe's loop


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def training_products(subject: str, shape: Shape, device: str) -> contextlib.AbstractContextManager:
    """The library that multiplies float32 in minimoe's training."""
    peer = subject.startswith(PEERS)
    return contextlib.nullcontext() if peer else float32_by_onednn(torch.device(device), shape.hidden)


def training_memory(subject: str, device: str) -> None:
    """What minimoe's training does with memory that was freed."""
    if device == "cpu" and not subject.startswith(PEERS):
        keep_freed_memory()


def random_ids(shape: Shape, device: str) -> Tensor:
    """Token ids (B, S)."""
    return torch.randint(shape.vocabulary, (shape.batch, shape.sequence), device=device)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeated(work: Callable[[], Any], device: str, at_least: float = 0.4) -> Run:
    """Short work is repeated for `at_least` seconds and at least 3 times; a run gives the median."""

    def run() -> dict[str, float]:
        times: list[float] = []
        while sum(times) < at_least or len(times) < 3:
            times.append(timed(work, device))
        return {"seconds": statistics.median(times)}

    return run


def resident_bytes(field: str) -> int:
    """`VmRSS` or its peak `VmHWM` of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def reset_peak(device: str) -> None:
    """Forget the peak so far: memory that only the set-up needed does not count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
