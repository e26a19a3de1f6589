"""Which number format matrix products run in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """Autocast's dtype on this device when autocast is on, else `default`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else default


def to_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before a matrix product; it does not look inside an `autograd.Function`."""
    return tuple(tensor.to(compute_dtype(tensor.device, tensor.dtype)) for tensor in tensors)


def few_sizes(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows to compute for `size` of them: as many, but in bf16 on a CPU one of few numbers.

    There torch builds and keeps a kernel for every new number of rows. That takes about as long as a small product,
    and as kernels lie among the activations, memory that cannot be used again grows by hundreds of megabytes. So
    numbers are rounded up to one of eight between a power of two and the next.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return size
    multiple = 1 << size.bit_length() >> 4 or 1
    return -(-size // multiple) * multiple


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself; emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
