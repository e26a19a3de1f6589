"""The door: where a faster form of a definition may stand in for it.

The model defines every function in plain torch. A form computes the same function, in values and in gradients, for some
arguments on some hardware. Which one runs is asked here and nowhere else: the first that suits, else the definition.

`MINIMOE_OPS=plain` runs the definitions themselves; `MINIMOE_OPS=cpu,cuda` leaves out what is compiled from C++.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from minimoe.errors import UserError

BACKENDS = {
    "c": "compiled from our C++ for this CPU",
    "cpu": "torch's calls, arranged for a CPU",
    "cuda": "torch's calls, arranged for a GPU",
    "triton": "our Triton kernels for a GPU; used only where they are asked for, as no GPU has run them yet",
    "meta": "shapes alone, for tensors without values",
}
OPTIONAL = {"triton"}  # only where `MINIMOE_OPS` or `using` names it
VARIABLE = "MINIMOE_OPS"
P = ParamSpec("P")
R = TypeVar("R")


class Form(NamedTuple):
    """A faster way to compute a definition."""

    backend: str  # of BACKENDS
    suits: Callable[..., bool]  # can it take these arguments, and is it faster for them?
    run: Callable[..., Any]  # takes the definition's arguments, gives its result


FORMS: dict[str, list[Form]] = defaultdict(list)  # by the definition's name; the first that suits stands in


def _asked_for(text: str) -> set[str]:
    """The backends that `MINIMOE_OPS` allows."""
    if not text:
        return set(BACKENDS)
    names = {name.strip() for name in text.split(",")} - {"plain"}
    if not names <= set(BACKENDS):
        fix = f"set it to plain, or to some of {', '.join(BACKENDS)}, separated by commas"
        raise UserError(f"unknown backend in {VARIABLE}={text}", fix=fix)
    return names


_allowed = _asked_for(os.environ.get(VARIABLE, ""))
_enabled = set(_allowed) if os.environ.get(VARIABLE) else _allowed - OPTIONAL


def accelerated(definition: Callable[P, R]) -> Callable[P, R]:
    """Let a faster form stand in for `definition` if there is one for the arguments."""
    forms = FORMS[definition.__name__]

    @wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for form in () if _followed() else forms:
            if form.backend in _enabled and form.suits(*args, **kwargs):
                return form.run(*args, **kwargs)
        return definition(*args, **kwargs)

    return call


def _followed() -> bool:
    """Whether something follows torch's operators one by one, and would miss what a form does without them: torch.func
    while torch compiles, else forward-mode differentiation, `torch.jit.trace`, or a TorchDispatchMode (`make_fx`,
    FlopCounterMode)."""
    if torch.compiler.is_compiling():
        return _within_torch_func()
    return forward_ad._current_level >= 0 or _num_dispatch_modes() > 0 or _tracing_state() is not None


_num_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


@torch.compiler.assume_constant_result
def _within_torch_func() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def using(*backends: str) -> Iterator[None]:
    """Only these backends meanwhile; with none of them, the definitions run themselves.

    It holds for the whole process, and allows nothing that `MINIMOE_OPS` leaves out.

    Raises:
        ValueError: no such backend.
    """
    if not BACKENDS.keys() >= set(backends):
        raise ValueError(f"backends are {', '.join(BACKENDS)}, not {', '.join(backends)}")
    before = set(_enabled)
    asked = set(backends)
    _enabled.intersection_update(asked)
    _enabled.update(asked & OPTIONAL & _allowed)
    try:
        yield
    finally:
        _enabled.clear()
        _enabled.update(before)


def enabled() -> frozenset[str]:
    """The backends that may stand in now."""
    return frozenset(_enabled)


# ---- what several forms ask of their arguments ----


def ordinary(*tensors: Tensor) -> bool:
    """Whether these are tensors as torch makes them: no DTensor, no quantised or other subclass, no torch.func wrapper,
    and where gradients are recorded, none of inference mode, which backward could not keep.

    While torch compiles or exports a model, its tensors are stand-ins of torch's own.
    """
    if torch.compiler.is_compiling():
        return all(type(x).__module__ in _TORCHS_OWN for x in tensors)
    recorded = torch.is_grad_enabled()
    for x in tensors:  # a loop, as this is asked hundreds of times a step
        if (type(x) is not Tensor and type(x) is not nn.Parameter) or _is_wrapped(x):
            return False
        if recorded and x.is_inference():
            return False
    return True


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_TORCHS_OWN = {"torch", "torch.nn.parameter", "torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor"}


def untouched(module: Any, name: str) -> bool:
    """Whether a form may read the module's weights instead of calling it: it is the project's or torch's class `name`
    itself, no adapter, subclass or engine stands in for it, and no hook watches it."""
    kind = type(module)
    if kind.__name__ != name or not kind.__module__.startswith(("minimoe.", "torch.nn.modules.")):
        return False
    own = vars(module)
    for hooks in _HOOKS:
        if own.get(hooks):
            return False
    return "forward" not in own and not torch_module._has_any_global_hook()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether backward will want the gradient of one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of a form, of which there is no derivative.

    Raises:
        RuntimeError: it is asked for (`create_graph=True`). torch's own `once_differentiable` only notices that if
            autograd happens to pass by; else this form's part would be missing from a second derivative.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"faster forms have no second derivatives; set {VARIABLE}=plain, or compute within minimoe.ops.using()"
            )
        return once(ctx, *grads)

    return call
