"""Decoding on a GPU as one graph: the same function as the model's forward, captured once and replayed for each token.

A step for a few rows is hundreds of kernels of microseconds, which take the host longer to launch than the device to
compute. `torch.compile` fuses and records them. For that the shapes must not change from step to step: the graph sees
the whole buffers of the cache, and their length as a tensor (`transformers`' `StaticLayer`).

B rows, n tokens fed a row, L positions in the cache, C capacity of its buffers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from minimoe.generation.cache import PreallocatedCache, PreallocatedLayer
from minimoe.model.language_model import MiniMoeForCausalLM


def why_not_compiled(model: Any) -> str | None:
    """What keeps decoding from being compiled; None when nothing does."""
    if type(model) is not MiniMoeForCausalLM:
        return f"{type(model).__name__} is not {MiniMoeForCausalLM.__name__}"
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, and a graph of kernels saves time on a GPU only"
    if model.dtype != torch.bfloat16:  # others synchronise to read the groups' sizes, which a graph cannot hold
        return f"its weights are {model.dtype}, not {torch.bfloat16}"
    widths = (model.config.hidden_size, model.config.moe_intermediate_size)
    if any(width % 8 for width in widths):  # neither can the kernels that leave the sizes on the device
        return f"hidden_size {widths[0]} and moe_intermediate_size {widths[1]} are not both multiples of 8"
    return None


class CompiledModel:
    """The model with a compiled step for single tokens; prompts run as they are.

    Args:
        options: for `torch.compile`; by default kernels are fused, recorded once and replayed.
    """

    def __init__(self, model: MiniMoeForCausalLM, **options: Any) -> None:
        self._model = model
        self._step = torch.compile(self._forward, fullgraph=True, **(options or {"mode": "reduce-overhead"}))
        self._static = Cache(layers=[])
        self._length: int | None = None  # of the static cache

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, cache: PreallocatedCache, mask: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, n) -> logits (B, V) of the last of each row; arguments as of `PackedModel.__call__`."""
        if input_ids.shape[1] > 1 or not cache.is_initialized:  # a prompt, of one token too
            return self._forward(input_ids, None if mask is None else position_ids, cache, mask)
        layers: list[PreallocatedLayer] = cache.layers
        for layer in layers:
            layer.reserve(1)
        length = self._share_buffers(layers)
        if mask is not None:
            mask = F.pad(mask, (0, layers[0].capacity - mask.shape[1]), value=1)
        positions = position_ids.clone(memory_format=torch.contiguous_format)  # strides are part of a shape here
        torch.compiler.cudagraph_mark_step_begin()
        self._length = None  # not known should the step be interrupted
        logits = self._step(input_ids, positions, self._static, mask)
        self._length = length + 1
        for layer in layers:
            layer.length = self._length
        return logits

    def _forward(self, input_ids: Tensor, position_ids: Tensor | None, cache: Cache, mask: Tensor | None) -> Tensor:
        outputs = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]

    def _share_buffers(self, layers: list[PreallocatedLayer]) -> int:
        """Let the static cache be another view of these layers, at their length, which is returned."""
        mine: list[StaticLayer] = self._static.layers
        if [id(x.keys) for x in mine] != [id(x.keys) for x in layers]:
            self._static, self._length = Cache(layers=[_static_layer(layer) for layer in layers]), None
        if self._length != layers[0].length:
            for layer in self._static.layers:
                layer.cumulative_length.fill_(layers[0].length)
        return layers[0].length


def _static_layer(layer: PreallocatedLayer) -> StaticLayer:
    """The same buffers as a layer whose length is a tensor and whose `update` returns all C positions."""
    static = StaticLayer(max_cache_len=layer.capacity)
    static.keys, static.values = layer.keys, layer.values
    static.dtype, static.device = layer.dtype, layer.device
    static.cumulative_length = torch.zeros((), dtype=torch.long, device=layer.device)
    static.is_initialized = True
    for tensor in (static.keys, static.values, static.cumulative_length):
        torch._dynamo.mark_static_address(tensor)  # written in place by the graph
    return static
