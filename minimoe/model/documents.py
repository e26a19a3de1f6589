"""Packed documents: which tokens of a batch belong together, and the masks that follow.

Several documents may share a row and must not see each other. B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Documents:
    """The documents of a batch of whole rows, found from positions that restart and a padding mask.

    A document starts at column 0, wherever a position is not its left neighbour's plus one, and wherever padding begins
    or ends. So padding is a document of its own, and nothing real attends to it.

    Args:
        position_ids: (B or 1, S) or None.
        attention_mask: (B, S), nonzero for real tokens, or None; one of the two is given.
        shape: (B, S).
    """

    def __init__(self, position_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int]) -> None:
        if attention_mask is not None and attention_mask.shape[1] != shape[1]:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit input {shape}")
        given = [x for x in (position_ids, attention_mask) if x is not None]
        starts = torch.zeros(shape, dtype=torch.bool, device=given[0].device)
        starts[:, 0] = True
        if position_ids is not None:
            starts[:, 1:] |= position_ids.diff(dim=1) != 1
        if attention_mask is not None:
            starts[:, 1:] |= attention_mask.bool().diff(dim=1)
        self.ids = starts.flatten().cumsum(0).sub(1).view(shape)  # (B, S) int64, counted along the B*S tokens from 0
        self._lengths: list[int] | None = None
        self._mask: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Lengths of the documents in the order of the B*S tokens. Synchronises with a GPU."""
        if self._lengths is None:
            self._lengths = self.ids.flatten().bincount().tolist()
        return self._lengths

    @property
    def mask(self) -> Tensor:
        """(B, 1, S, S) bool: a query sees the earlier keys of its own document."""
        if self._mask is None:
            self._mask = (self.ids[:, :, None] == self.ids[:, None]).tril()[:, None]
        return self._mask

    def mask_function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same for `transformers`, which adds what is causal and makes the mask that its attention needs."""
        ids = self.ids

        def same_document(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            # A static cache has more keys than the prompt has tokens; causality cuts those off.
            return ids[batch_idx, q_idx] == ids[batch_idx, kv_idx.clamp(max=ids.shape[1] - 1)]

        return same_document
