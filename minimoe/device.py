"""Which device to compute on, and what its hardware can do."""

from __future__ import annotations

import torch

from minimoe.errors import UserError


def pick_device(name: str, where: str = "") -> torch.device:
    """`auto` (CUDA, then Apple's GPU, then the CPU), or a device by its name in torch.

    Args:
        where: the option that names it, for the message.

    Raises:
        UserError: this machine does not have it.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    try:
        if not present.get(name):  # one of several, a rarer kind, or nothing
            torch.ones(1, device=name).item()  # "meta" exists, but computes nothing
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        known = ", ".join(kind for kind, there in present.items() if there)
        raise UserError(
            f"device {name!r} is not available here", where=where, fix=f"use auto or one of: {known}"
        ) from None


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself; emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
