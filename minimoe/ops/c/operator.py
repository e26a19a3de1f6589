"""Python functions over C++ as operators of torch: `torch.ops.minimoe.<name>`.

In eager mode a call of the function runs it directly: a dispatch through torch takes longer than the rest of a small
call. Under `torch.compile` and `torch.export` the function is one node of the graph, its operator. This is registered
by `torch.library.Library` (`custom_op` costs several times as much per call), with the function itself for the CPU and
for meta tensors, whose results it allocates without computing them.

Direct callers guarantee the layout of the arguments. A graph may bring others, so that the operator checks them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("minimoe", "DEF")
_DTYPES = {
    "float": (torch.float32, torch.bfloat16),
    "weight": (torch.float32, torch.bfloat16, torch.int8),
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "int64": (torch.int64,),
}


def operator(**layouts: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as the operator of its name.

    Args:
        layouts: of each tensor argument a dtype of `_DTYPES` and a shape: `gate_up="float N,2I"`. Arguments of the same
            dtype name have the same dtype, and a letter stands for the same size everywhere (`*` for any leading
            dimensions). Tensors are contiguous, but for `rows`, whose rows are, and `cache`, the first positions of a
            larger buffer. `<N` are indices below that size, `ends:N` where groups of N rows end. `any` is free in dtype
            and strides.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name, signature = function.__name__, inspect.signature(function)

        def checked(*args: Any, **kwargs: Any) -> R:
            _check(name, layouts, signature.bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, checked, "CPU")
        LIBRARY.impl(name, function, "Meta")
        registered = getattr(torch.ops.minimoe, name)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if is_compiling():
                return registered(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return register


def _check(name: str, layouts: dict[str, str], arguments: dict[str, Any]) -> None:
    """Raise ValueError for an argument that is not laid out as the function needs it."""
    known: dict[str, Any] = {}  # dtypes, sizes and strides that arguments have in common
    for argument, layout in layouts.items():
        x = arguments.get(argument)
        if x is not None and not _fits(x, *layout.split(), known=known):
            raise ValueError(f"{name}: {argument} must be {layout!r}, not {x.dtype} {tuple(x.shape)} {x.stride()}")


def _fits(x: Tensor, dtype: str, shape: str, rule: str = "contiguous", *, known: dict[str, Any]) -> bool:
    letters = shape.removeprefix("*,").split(",")
    leading, sizes = tuple(x.shape[: -len(letters)]), x.shape[-len(letters) :]
    if len(sizes) < len(letters) or leading != (known.setdefault("*", leading) if shape[0] == "*" else ()):
        return False
    for letter, size in zip(letters, sizes, strict=True):
        factor = int(letter[:-1] or 1)
        if size % factor or known.setdefault(letter[-1], size // factor) != size // factor:
            return False
    if dtype == "any":
        return True
    if x.dtype not in _DTYPES[dtype] or x.dtype != known.setdefault(dtype, x.dtype):
        return False
    if rule == "rows":
        return x.stride(-1) == 1 or x.numel() == 0
    if rule == "cache":
        stride = known.setdefault("cache", x.stride(1))
        return x.stride() == (x.shape[1] * stride, stride, x.shape[3], 1)
    if rule[0] == "<":
        return x.is_contiguous() and (x.numel() == 0 or 0 <= int(x.min()) <= int(x.max()) < known[rule[1:]])
    if rule.startswith("ends:"):
        return x.is_contiguous() and int(x[-1]) == known[rule[5:]] and int(x.diff(prepend=x.new_zeros(1)).min()) >= 0
    return x.is_contiguous()
