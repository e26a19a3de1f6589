"""Faster forms of what the model defines in plain torch; the door they stand behind is door.py.

    moe.py         the two dispatch paths; router.py: the router's logits
    fused.py       the two paths on a GPU by kernels of Triton (kernels.py), where MINIMOE_OPS asks for them
    attention.py   causal self-attention; heads.py: norm and rotation of its heads
    norm.py        RMS norm
    loss.py        the language model's loss without its logits
    onednn.py      which library multiplies on a CPU; autocast.py: the dtype of matmuls
    c/             what is compiled from C++; without the folder everything works, slower

A form is never the only owner of a function: tests/test_ops.py checks each against its definition.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from minimoe.ops import attention, fused, loss, moe, norm, router  # noqa: F401  (each adds its forms)
from minimoe.ops.autocast import compute_dtype, without_autocast
from minimoe.ops.door import BACKENDS, FORMS, VARIABLE, Form, accelerated, enabled, using

if find_spec("minimoe.ops.c"):
    from minimoe.ops import c
    from minimoe.ops.c import forms  # noqa: F401

__all__ = [
    "BACKENDS",
    "FORMS",
    "Form",
    "accelerated",
    "compute_dtype",
    "describe",
    "enabled",
    "using",
    "without_autocast",
]


def describe(device: torch.device) -> str:
    """Which forms may stand in on this machine, for a person."""
    if not enabled():
        return f"plain torch, as {VARIABLE} asks"
    if device.type != "cpu" or "c" not in enabled():
        return "torch's"
    reason = c.why_not() if find_spec("minimoe.ops.c") else "minimoe/ops/c is missing"
    return f"torch's, slower than compiled ones: {reason}" if reason else "compiled for this CPU"
