"""A key-value cache that is allocated once and written in place.

`transformers`' `DynamicCache` concatenates at every token, which copies the whole past each time: quadratic
in the length. Here a layer owns a buffer with a length; `update` writes behind the length and returns views.
Layers of other kinds (sliding window, linear attention) stay as `DynamicCache` made them.

Shapes: B batch, H key-value heads, L length used, C capacity, Dh head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers (B, H, C, Dh), of which the first L positions are used."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity  # of the first allocation; the buffer doubles when it is outrun
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers that match the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = _buffer_like(key_states, self.capacity)
        self.values = _buffer_like(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states (B, H, n, Dh) and return views of all states so far (B, H, L + n, Dh)."""
        end = self.length + key_states.shape[-2]
        if not self.is_initialized:
            self.capacity = max(self.capacity, end)
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[-2])
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        # The length moves last: an interrupt in the middle of an update leaves the layer as it was.
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, positions: int) -> None:
        """Make room for more positions; a buffer that is outrun doubles."""
        end = self.length + positions
        if end > self.capacity:
            self._grow(max(end, 2 * self.capacity))

    def get_seq_length(self) -> int:
        """Positions in use."""
        return self.length

    def reset(self) -> None:
        """Forget all positions, keep the buffers."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest positions; `transformers` passes their number negated."""
        self.length -= min(abs(tokens_to_remove), self.length)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def _grow(self, capacity: int) -> None:
        keys, values = self.keys, self.values
        self.keys, self.values = _buffer_like(keys, capacity), _buffer_like(values, capacity)
        self.keys[:, :, : self.length] = keys[:, :, : self.length]
        self.values[:, :, : self.length] = values[:, :, : self.length]
        self.capacity = capacity


class PreallocatedCache(DynamicCache):
    """`DynamicCache` whose full-attention layers are preallocated.

    Args:
        config: the model's config; it tells the kind of every layer.
        capacity: positions to allocate at first, at least.
    """

    def __init__(self, config: Any, capacity: int) -> None:
        super().__init__(config=config)
        capacity = math.ceil(capacity / 128) * 128  # a compiled step is compiled anew for every capacity
        self.layers: list[Any] = [
            PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in self.layers
        ]

    def truncate(self, length: int) -> int:
        """Keep at most the first `length` positions and return how many are left.

        An interrupted forward pass leaves the first layers longer than the last ones: the shortest decides. A
        layer that cannot go back (sliding window, linear attention) makes the whole cache start over.
        """
        lengths = [layer.get_seq_length() if isinstance(layer, PreallocatedLayer) else 0 for layer in self.layers]
        length = min([length, *lengths])
        if length == 0:
            self.reset()
            return 0
        for layer, used in zip(self.layers, lengths, strict=True):
            layer.crop(length - used)
        return length


def _buffer_like(states: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, width = states.shape
    # Zeros, for a compiled step reads the whole buffer: what is masked has weight 0, and 0 * NaN would be NaN.
    return states.new_zeros(batch, heads, capacity, width)
