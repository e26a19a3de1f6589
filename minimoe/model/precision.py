"""Which number format matrix products run in, and which library multiplies on a CPU.

torch has MKL for float32 and oneDNN for bf16. oneDNN multiplies float32 too, large matrices 1.05 to 1.4 times as fast
as MKL where that was measured (an AMD CPU with AVX-512), but it builds and keeps a kernel for every new size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minimoe.device import has_bf16 as has_bf16  # its owner is minimoe/device.py


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """Autocast's dtype on this device when autocast is on, else `default`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else default


def to_compute_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before a matrix product; it does not look inside an `autograd.Function`."""
    return tuple(tensor.to(compute_dtype(tensor.device, tensor.dtype)) for tensor in tensors)


@contextmanager
def float32_by_onednn(device: torch.device, width: int) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices meanwhile, for training a model of this hidden size, where that pays.

    torch has no such switch but the one that permits lower precision. A CPU without AMX has none to offer: its products
    stay float32, as the tests check. With AMX, or where oneDNN is not for AVX-512, MKL goes on.
    """
    exact = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    before = torch.get_float32_matmul_precision()
    # In smaller models what oneDNN saves is less than finding a kernel costs, some 15 us a product.
    if device.type == "cpu" and exact and width >= 256 and torch.backends.mkldnn.is_available():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def onednn_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch hands products to oneDNN."""
    if device.type != "cpu":
        return False
    return dtype == torch.bfloat16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium")


def few_sizes(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows to compute for `size` of them: as many, but for oneDNN one of few numbers.

    Building a kernel for a new number of rows takes about as long as a small product, and as kernels lie among the
    activations, memory that cannot be used again grows by hundreds of megabytes. So numbers are rounded up to one of
    eight between a power of two and the next; above 1024, where groups differ less in size, of 16, above 2048 of 32.
    """
    if not onednn_multiplies(device, dtype):
        return size
    octave = 1 << size.bit_length() >> 1  # the power of two below
    multiple = min(octave >> 3 or 1, max(octave >> 5, 64))
    return -(-size // multiple) * multiple
