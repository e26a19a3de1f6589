"""Which library multiplies matrices on a CPU, and the sizes it likes.

torch has MKL for float32 and oneDNN for bf16. oneDNN multiplies float32 too, large matrices faster than MKL does on a
CPU with AVX-512, but it builds and keeps a kernel for every new size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALLEST_WIDTH = 256  # in narrower models, finding a kernel costs more than oneDNN saves


@contextmanager
def float32_by_onednn(device: torch.device, width: int) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices meanwhile, for training a model of this hidden size, if that is faster.

    torch has no such switch but the one that permits lower precision. A CPU without AMX has none to offer: its matmuls
    stay float32, which the tests check. With AMX, or without AVX-512, MKL goes on.
    """
    before = torch.get_float32_matmul_precision()
    faster = pays(width, torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported())
    if device.type == "cpu" and faster and torch.backends.mkldnn.is_available():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pays(width: int, avx512: bool, amx: bool) -> bool:
    """Whether oneDNN multiplies float32 faster on such a CPU, and in float32."""
    return avx512 and not amx and width >= _SMALLEST_WIDTH


def onednn_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch hands matmuls of this dtype to oneDNN."""
    if device.type != "cpu":
        return False
    return dtype == torch.bfloat16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium")


def few_sizes(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows to compute for `size` of them: as many, but for oneDNN one of few sizes.

    Building a kernel for a new size takes about as long as a small matmul, and as kernels lie among the activations,
    memory that cannot be used again grows by hundreds of megabytes. So sizes are rounded up to one of eight between a
    power of two and the next; above 1024, where groups differ less in size, of 16, above 2048 of 32.
    """
    if not onednn_multiplies(device, dtype):
        return size
    octave = 1 << size.bit_length() >> 1  # the power of two below
    multiple = min(octave >> 3 or 1, max(octave >> 5, 64))
    return -(-size // multiple) * multiple
