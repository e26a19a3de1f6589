"""`run.json`: what is known of a run when it starts, for the report and for whoever finds the folder later."""

from __future__ import annotations

import importlib.metadata
import json
import lzma
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minimoe.data.loader import Validation
from minimoe.model.config import num_parameters, with_defaults
from minimoe.model.costs import training_flops
from minimoe.train.files import FACTS_FILE

if TYPE_CHECKING:
    from minimoe.train.loop import Run

_PACKAGES = ("minimoe", "torch", "transformers", "tokenizers", "datasets", "accelerate", "peft")
_COMPRESSED_BYTES = 1 << 20  # of held-out text at most: xz -9 takes half a second for them


def write_facts(run: Run, folder: Path) -> None:
    """Write the file."""
    architecture = with_defaults(vars(run.model.config))
    total, active = (num_parameters(architecture, active=choice) for choice in (False, True))
    facts = {
        "stage": run.config.stage,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "parameters": {
            "total": total,
            "active": active,
            "trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        },
        "architecture": {key: architecture[key] for key in _SHOWN},
        "moe_layers": list(range(architecture["first_k_dense_replace"], architecture["num_hidden_layers"])),
        "flops_per_token": training_flops(architecture, run.config.data.sequence_length),
        "total_steps": run.total_steps,
        "rows_per_epoch": run.data.train.rows_per_epoch,
        "documents": dict(run.data.counts),
        "references": references(run.data.validation, run.tokenizer, run.config.encoding),
        "environment": environment(run.accelerator.device) | {"processes": run.accelerator.num_processes},
    }
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


_SHOWN = (
    "vocab_size hidden_size num_hidden_layers num_experts num_experts_per_tok moe_intermediate_size n_shared_experts "
    "scoring_func router_type num_zero_computation_experts router_bias_update_rate router_aux_loss_coef".split()
)


def environment(device: torch.device) -> dict[str, Any]:
    """What the run was computed by."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Name of the CPU, where the system has one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def references(validation: Any, tokenizer: Any, encoding: str) -> dict[str, float]:
    """What simple models reach on the held-out documents of pretraining, to see a loss beside.

    Returns:
        unigram_loss: nats per token, of a model that knows how frequent each of these tokens is and nothing else.
        xz_bits_per_byte: of `xz -9` on the first MB of the text.
    """
    if encoding != "pretrain" or not isinstance(validation, Validation):
        return {}
    documents, size = validation.packing.documents, 0
    pieces: list[np.ndarray] = []
    for index in range(len(documents)):
        pieces.append(documents.read(index, 0, min(int(documents.lengths[index]), _COMPRESSED_BYTES))[0])
        size += documents.num_bytes(index)
        if size >= _COMPRESSED_BYTES:
            break
    shares = np.bincount(np.concatenate(pieces)).astype(np.float64)
    shares = shares[shares > 0] / shares.sum()
    text = "".join(tokenizer.batch_decode([piece.tolist() for piece in pieces], skip_special_tokens=True))
    data = text.encode()[:_COMPRESSED_BYTES]
    return {
        "unigram_loss": float(-(shares * np.log(shares)).sum()),
        "xz_bits_per_byte": 8 * len(lzma.compress(data, preset=9)) / max(len(data), 1),
    }
