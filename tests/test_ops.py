"""Every form behind the door is the same function as its definition, and declines what it cannot take.

A case makes the arguments of a definition and says which of them want gradients. Each form is run on every case that
suits it, on one thread and on three, and compared with the definition in values and in all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import relative_error, tiny_config, tiny_experts, tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from minimoe.errors import UserError
from minimoe.generation import packed
from minimoe.model import attention, dispatch, losses, norm, router
from minimoe.model.documents import Documents
from minimoe.model.norm import MiniMoeRMSNorm
from minimoe.ops import BACKENDS, FORMS, door, heads, moe, using
from minimoe.ops import norm as norm_forms
from minimoe.ops.onednn import few_sizes, float32_by_onednn
from minimoe.train import optim

CPU = torch.device("cpu")
DEFINITIONS = {
    "replicated": dispatch.replicated,
    "grouped": dispatch.grouped,
    "causal_attention": attention.causal_attention,
    "rms_norm": norm.rms_norm,
    "hidden_loss": losses.hidden_loss,
    "token_logprobs": losses.token_logprobs,
    "router_logits": router.router_logits,
    "orthogonalise": optim.orthogonalise,
    "linear": packed.linear,
    "cached_attention": packed.cached_attention,
    "gather_rows": moe.gather_rows,
    "sum_slots": moe.sum_slots,
    "weighted_swiglu": moe.weighted_swiglu,
    "weighted_swiglu_backward": moe.weighted_swiglu_backward,
    "norm_rows": norm_forms.norm_rows,
    "norm_rows_backward": norm_forms.norm_rows_backward,
    "prepare_heads": heads.prepare_heads,
    "prepare_heads_backward": heads.prepare_heads_backward,
}
# Norm-relative. float32: sums of up to a few hundred products, each rounded to 6e-8, in another order. bf16: forms and
# definitions round inputs, weights and intermediate results to 8 bits (4e-3) in other places, and again backwards.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2}
EXPERTS, HIDDEN = 5, 96


class Case(NamedTuple):
    name: str
    make: Callable[[torch.dtype], tuple[Any, ...]]  # the definition's arguments; tensors that want gradients say so
    autocast: bool = False  # under bf16 autocast; `make` is asked for float32


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_(grad)


def dispatched(route: str, tokens: int, k: int, width: int, grad: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    experts = tiny_experts(EXPERTS, HIDDEN, width, std=0.2)
    if not grad or dtype == torch.bfloat16:
        experts = experts.to(dtype).requires_grad_(grad)
    if route == "all_to_one":
        ids = torch.tensor([[3, *[e for e in range(EXPERTS) if e != 3][: k - 1]]] * tokens)
    else:
        pool = max(3, k) if route == "idle" else EXPERTS
        ids = torch.stack([torch.randperm(pool)[:k] for _ in range(tokens)])
    return randn(tokens, HIDDEN, dtype=dtype, grad=grad), ids, torch.rand(tokens, k).requires_grad_(grad), experts


def decoded(weights: str, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """As the decode engine calls: experts as it packs them."""
    x, ids, slot_weights, experts = dispatched("spread", tokens, 2, 64, False, dtype)
    return x, ids, slot_weights, packed.PackedExperts(experts.gate_up_proj, experts.down_proj, weights)


def attended(lengths: list[int] | None, kv_heads: int, length: int, grad: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, head_dim = 2, 16
    q, k, v = (randn(batch, length, h, head_dim, dtype=dtype, grad=grad) for h in (4, kv_heads, kv_heads))
    norms = [MiniMoeRMSNorm(head_dim, 1e-3).requires_grad_(grad) for _ in range(2)]
    for each in norms:
        nn.init.normal_(each.weight, mean=1.0, std=0.3)
    angles = torch.rand(1, length, head_dim // 2).repeat(1, 1, 2)
    documents = None
    if lengths is not None:
        positions = torch.cat([torch.arange(n) for n in lengths]).view(batch, length)
        documents = Documents(positions, None, (batch, length))
    return q, k, v, *norms, angles.cos(), angles.sin(), 0.3, documents, 0.0


def loss_of(rows: int, grad: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    targets = torch.randint(0, 300, (rows,))
    targets[::3] = losses.IGNORE_INDEX
    head = nn.Linear(16, 300, bias=False).to(dtype).requires_grad_(grad)
    return randn(rows, 16, dtype=dtype, grad=grad), head, targets, rows


def prepared(backward: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    rows, length, kv_heads, group, head_dim = 2, 70, 2, 3, 16
    tokens = rows * length
    q, k, v = (randn(tokens, h * head_dim, dtype=dtype) for h in (kv_heads * group, kv_heads, kv_heads))
    angles = torch.rand(tokens, head_dim // 2).repeat(1, 2)
    inputs = (q, k, v, randn(kv_heads * (group + 1), head_dim), angles.cos(), angles.sin(), 1e-3, length)
    if not backward:
        return inputs
    made = rows * kv_heads
    grads = (randn(made, length * group, head_dim, dtype=dtype), *(randn(made, length, head_dim) for _ in range(2)))
    return *inputs, *grads


def linear_of(weights: str, rows: int, with_norm: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    matrix = packed.PackedMatrix(weights, randn(83, 96, dtype=dtype))
    scaling = packed.PackedNorm(MiniMoeRMSNorm(96, 1e-3)) if with_norm else None
    return randn(rows, 96, dtype=dtype), matrix, scaling, randn(rows, 83, dtype=dtype) if with_norm else None


def cached(masked: bool, new: int, dtype: torch.dtype) -> tuple[Any, ...]:
    keys, values = (randn(2, 3, 40, 16, dtype=dtype)[:, :, :37] for _ in range(2))
    bias = None
    if masked:
        bias = torch.zeros(2, 1, new, 37, dtype=dtype)
        bias[1, ..., :9] = -torch.inf
    return randn(2, 3, new, 2, 16, dtype=dtype), keys, values, bias, 0.3


ROUTES = [
    ("spread", 87, 2),
    ("idle", 87, 2),
    ("all_to_one", 87, 1),
    ("spread", 1, 5),
    ("spread", 87, 5),
    ("spread", 2, 2),
]
DISPATCHED = [
    *(
        Case(
            f"{route} {tokens} x {k}, {'gradients' if grad else 'values'}{', autocast' if autocast else ''}",
            partial(dispatched, route, tokens, k, width, grad),
            autocast,
        )
        for route, tokens, k in ROUTES
        for grad, width, autocast in ((True, 96, False), (True, 24, False), (True, 96, True), (False, 96, False))
    ),
    Case(
        "no tokens",
        lambda dtype: tuple(
            x[:0].detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in dispatched("spread", 3, 2, 96, True, dtype)
        ),
    ),
]
PACKED = [Case(f"packed {w} {n}", partial(decoded, w, n)) for w in ("exact", "int8") for n in (1, 9, 40)]
ATTENDED = [
    Case(
        f"{documents} {kv} heads {length}, {'gradients' if grad else 'values'}{', autocast' if autocast else ''}",
        lambda dtype, a=(lengths, kv, length, grad), autocast=autocast: attended(
            *a, torch.bfloat16 if autocast else dtype
        ),
        autocast,
    )
    for documents, lengths, length in (
        ("rows", None, 300),
        ("documents", [1, 299, 1, 2, 150, 147], 300),
        ("row", [9, 9], 9),
        ("long rows", None, 600),
    )
    for kv in (1, 4)
    for grad, autocast in ((True, False), (True, True), (False, False))
]
CASES: dict[str, list[Case]] = {
    "replicated": [*DISPATCHED, *PACKED],
    "grouped": [*DISPATCHED, *PACKED],
    "causal_attention": ATTENDED,
    "rms_norm": [
        Case("3 x 5 x 16", lambda dtype: (randn(3, 5, 16, grad=True), randn(16, grad=True), 1e-3, dtype)),
        Case("700 x 83", lambda dtype: (randn(700, 83, grad=True), randn(83, grad=True), 1e-3, dtype)),
        Case("values", lambda dtype: (randn(7, 16, dtype=dtype), randn(16), 1e-3, dtype)),
    ],
    "hidden_loss": [
        Case(f"{n} rows{'' if grad else ', values'}", partial(loss_of, n, grad))
        for n in (3, 1500)
        for grad in (True, False)
    ],
    "token_logprobs": [
        Case(f"{n} rows{'' if grad else ', values'}", lambda dtype, n=n, g=grad: (*loss_of(n, g, dtype)[:3], 0.7))
        for n in (3, 1500)
        for grad in (True, False)
    ],
    "router_logits": [
        Case("37 tokens", lambda dtype: (randn(37, 24, dtype=dtype, grad=True), randn(6, 24, grad=True)))
    ],
    "orthogonalise": [
        Case(f"{n} x {r} x {c}", lambda dtype, s=(n, r, c): (randn(*s, dtype=dtype), (3.4445, -4.775, 2.0315), 3))
        for n, r, c in ((4, 48, 32), (3, 33, 17))
    ],
    "linear": [
        Case(f"{w} {n} rows{' normed' if normed else ''}", partial(linear_of, w, n, normed))
        for w in ("exact", "int8")
        for n in (1, 5, 20)
        for normed in (True, False)
    ],
    "cached_attention": [
        Case(f"{new} new{', masked' if masked else ''}", partial(cached, masked, new))
        for new in (1, 4)
        for masked in (True, False)
    ],
    "gather_rows": [Case("rows", lambda dtype: (randn(37, 83, dtype=dtype), torch.randint(37, (90,))))],
    "sum_slots": [
        Case(f"{t} x {k}", lambda dtype, t=t, k=k: (randn(t * k, 83, dtype=dtype), torch.randperm(t * k).view(t, k)))
        for t, k in ((7, 1), (1500, 2), (0, 2))
    ],
    "weighted_swiglu": [
        Case("weighted", lambda dtype: (randn(37, 166, dtype=dtype, scale=4), torch.rand(30))),
        Case("unweighted", lambda dtype: (randn(37, 166, dtype=dtype, scale=4), None)),
        Case("no rows", lambda dtype: (randn(0, 166, dtype=dtype), torch.rand(0))),
    ],
    "weighted_swiglu_backward": [
        Case("rows", lambda dtype: (randn(37, 166, dtype=dtype, scale=4), torch.rand(30), randn(37, 83, dtype=dtype))),
    ],
    "norm_rows": [Case("rows", lambda dtype: (randn(40, 83), randn(83), 1e-3, dtype))],
    "norm_rows_backward": [Case("rows", lambda dtype: (randn(40, 83), randn(83), randn(40, 83, dtype=dtype), 1e-3))],
    "prepare_heads": [Case("heads", partial(prepared, False))],
    "prepare_heads_backward": [Case("heads", partial(prepared, True))],
}


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    """What wants a gradient among the arguments, modules' parameters included."""
    found = [x for x in args if isinstance(x, Tensor)]
    found += [p for x in args if isinstance(x, nn.Module) for p in x.parameters()]
    return [x for x in found if x.requires_grad]


def results(function: Callable[..., Any], args: tuple[Any, ...], autocast: bool) -> list[Tensor]:
    """Values and gradients."""
    wanted = leaves(args)
    with torch.set_grad_enabled(bool(wanted)), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = function(*args)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    if not wanted:
        return outputs
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def compare(name: str, case: Case, dtype: torch.dtype, run: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    args = case.make(torch.float32 if case.autocast else dtype)
    tolerance = TOLERANCE[torch.bfloat16 if case.autocast else dtype]
    with using():
        expected = results(DEFINITIONS[name], args, case.autocast)
    for number, (result, truth) in enumerate(zip(results(run, args, case.autocast), expected, strict=True)):
        assert result.dtype == truth.dtype, number
        assert result.shape == truth.shape, number
        # A router weight's gradient is one dot product, where terms cancel; the others are sums of many.
        assert truth.numel() == 0 or relative_error(result, truth) <= 2 * tolerance, number


FORM_CASES = [
    pytest.param(name, form, case, id=f"{name}-{form.backend}{number}-{case.name}")
    for name, forms in FORMS.items()
    for number, form in enumerate(forms)
    for case in CASES.get(name, ())
]


def suits(form, case: Case, dtype: torch.dtype) -> bool:
    """Whether the form takes the case; CUDA forms are torch's calls, which a CPU can run too."""
    args = case.make(torch.float32 if case.autocast else dtype)
    if form.backend == "cuda":
        return all(not isinstance(x, packed.PackedExperts) for x in args)
    with torch.set_grad_enabled(bool(leaves(args))), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        return form.suits(*args)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("name", "form", "case"), FORM_CASES)
def test_a_form_equals_its_definition_in_values_and_gradients(name, form, case, dtype, threads):
    with float32_by_onednn(CPU, 512):  # as in training; where this CPU has no such thing, forms for it do not suit
        if not (case.autocast and dtype == torch.float32) and suits(form, case, dtype):
            compare(name, case, dtype, form.run)


@pytest.mark.parametrize("name", FORMS)
def test_the_door_gives_the_definitions_results_whatever_stands_behind_it(name):
    for case in CASES[name]:
        for dtype in TOLERANCE:
            compare(name, case, dtype, DEFINITIONS[name])


# Those of meta tensors have no values to compare; tests/test_transformers.py runs them.
_ELSEWHERE = ("meta", "triton")  # Triton's are run by its interpreter, in test_fused.py
NUMBERED = [
    (name, n) for name, forms in FORMS.items() for n, form in enumerate(forms) if form.backend not in _ELSEWHERE
]


@pytest.mark.parametrize(("name", "number"), NUMBERED)
def test_every_form_is_run_by_some_case(name, number):
    form = FORMS[name][number]
    if form.backend == "cpu" and name == "causal_attention" and number == 0 and not _blocks_are_for_this_cpu():
        pytest.skip("attention in blocks needs oneDNN's matmuls, which this CPU lacks for both dtypes")
    if form.backend == "c" and not _compiled_experts_are_for_this_cpu() and name in dispatch.DISPATCHES and number == 1:
        pytest.skip("compiled experts for many rows need AVX-512")
    with float32_by_onednn(CPU, 512):
        taken = [case.name for case in CASES[name] for dtype in TOLERANCE if suits(form, case, dtype)]
    if form.backend == "c":
        from minimoe.ops import c

        if c.why_not() is not None:
            pytest.skip(str(c.why_not()))
    assert taken


def _blocks_are_for_this_cpu() -> bool:
    return torch.backends.mkldnn.is_available()


def _compiled_experts_are_for_this_cpu() -> bool:
    return torch.cpu._is_avx512_supported()


def test_the_routers_form_keeps_half_precision_tokens_for_backward_as_they_are():
    tokens, weight = randn(37, 32, dtype=torch.bfloat16, grad=True), randn(6, 32, grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        FORMS["router_logits"][0].run(tokens, weight)
    assert [x.dtype for x in kept if x.shape == tokens.shape] == [torch.bfloat16]


def test_every_definition_that_has_a_form_is_tested_here():
    assert set(FORMS) == set(DEFINITIONS) == set(CASES)


# ---- strangers ----


class Subclass(torch.Tensor):
    """Any tensor that is more than torch's own: DTensor, quantised, ..."""


def half(x: Tensor) -> Tensor:
    return x.half() if x.is_floating_point() else x


def strided(x: Tensor) -> Tensor:
    """The same values with a stride of two everywhere."""
    return x.detach().repeat_interleave(2, dim=-1)[..., ::2] if x.ndim else x


CHANGES = {
    "float16": half,
    "strided": strided,
    "subclass": lambda x: x.detach().as_subclass(Subclass),
    "meta device": lambda x: x.to("meta"),
}


def changed(change: Callable[[Tensor], Tensor], argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return change(argument)
    if isinstance(argument, packed.PackedExperts):
        for name in ("gate_up_proj", "down_proj"):
            setattr(argument, name, change(getattr(argument, name)))
    if isinstance(argument, nn.Module):
        for name, parameter in list(argument.named_parameters()):
            owner = argument.get_submodule(name.rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
            setattr(owner, name.rpartition(".")[2], change(parameter.data))
    return argument


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FORMS)
def test_compiled_forms_decline_tensors_that_they_cannot_read(name, change):
    for form in FORMS[name]:
        for case in CASES[name]:
            args = tuple(changed(CHANGES[change], x) for x in case.make(torch.float32))
            if any(isinstance(x, Tensor) and x.numel() == 0 for x in args):
                continue  # nothing to read
            if form.backend == "c" and name != "linear":  # whose matrix is the engine's own
                with torch.no_grad():
                    if form.suits(*args):  # then it must be right about it
                        assert change == "strided", case.name
                        compare(name, Case(case.name, lambda dtype, args=args: args), torch.float32, form.run)


@pytest.mark.parametrize("name", [name for name, forms in FORMS.items() if any(f.backend != "c" for f in forms)])
def test_no_form_takes_a_tensor_subclass(name):
    for case in CASES[name]:
        args = tuple(changed(CHANGES["subclass"], x) for x in case.make(torch.float32))
        for form in FORMS[name]:
            assert not form.suits(*args), case.name


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def subclassed(module: nn.Module) -> nn.Module:
    module.__class__ = type("Adapter", (type(module),), {"__module__": "somewhere.else"})
    return module


def replaced(module: nn.Module) -> nn.Module:
    """As offloading does it."""
    module.forward = module.forward
    return module


@pytest.mark.parametrize("change", [hooked, subclassed, replaced])
@pytest.mark.parametrize(("name", "which"), [("causal_attention", 3), ("causal_attention", 4), ("hidden_loss", 1)])
def test_a_module_that_is_more_than_itself_is_called(name, which, change):
    """Its call must count: a form reads its weights only where calling it would do nothing else."""
    called = []
    args = list(next(case for case in CASES[name] if "values" in case.name).make(torch.float32))
    module = change(args[which])
    plain = type(module).forward

    def forward(self, *inputs, **named):
        called.append(1)
        return plain(self, *inputs, **named)

    type(module).forward = forward
    try:
        with float32_by_onednn(CPU, 512):
            DEFINITIONS[name](*args)
    finally:
        type(module).forward = plain
    assert called or change is replaced


@pytest.mark.parametrize("change", [subclassed])
def test_experts_of_another_kind_compute_for_themselves(change):
    tokens, ids, weights, experts = dispatched("spread", 87, 2, 96, True, torch.float32)
    change(experts)
    for form in FORMS["replicated"]:
        assert not form.suits(tokens, ids, weights, experts)


def test_torch_func_goes_around_the_forms():
    x, weight = randn(7, 16), randn(16)
    grad = torch.func.grad(lambda x: norm.rms_norm(x, weight, 1e-3, torch.float32).sum())(x)
    y = x.clone().requires_grad_()
    norm.rms_norm(y, weight, 1e-3, torch.float32).sum().backward()
    assert relative_error(grad, y.grad) <= TOLERANCE[torch.float32]


def normed(x: Tensor) -> Tensor:
    return norm.rms_norm(x, torch.linspace(0.5, 2, 16), 1e-3, torch.float32)


def forward_mode(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(normed(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FOLLOWERS = {
    "forward mode": forward_mode,
    "jit.trace": lambda x: torch.jit.trace(normed, (torch.ones(2, 16),), check_trace=False)(x),
    "make_fx": lambda x: make_fx(normed)(torch.ones_like(x))(x),
    "compiled grad": lambda x: torch.compile(torch.func.grad(lambda x: normed(x).square().sum()), backend="eager")(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("follow", FOLLOWERS.values(), ids=FOLLOWERS)
def test_what_follows_torchs_operators_sees_the_definitions(follow):
    torch._dynamo.reset()
    x = randn(7, 16)
    with using():
        expected = follow(x)
    torch._dynamo.reset()
    assert relative_error(follow(x), expected) <= TOLERANCE[torch.float32]


def test_flops_of_experts_are_counted():
    args = dispatched("spread", 87, 2, 96, False, torch.float32)
    with FlopCounterMode(display=False) as counter:
        dispatch.replicated(*args)
    assert counter.get_total_flops() == 87 * 2 * 2 * 3 * HIDDEN * 96


def test_a_hook_on_all_modules_sees_the_norms_of_attention():
    seen: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        attention.causal_attention(*attended(None, 2, 9, True, torch.float32))
    finally:
        hook.remove()
    assert seen == ["MiniMoeRMSNorm"] * 2


def test_a_layer_can_be_trained_on_what_inference_mode_made():
    with torch.inference_mode():
        x, hidden = randn(7, 16), dispatched("spread", 9, 2, 96, False, torch.float32)[0]
    weight, (_, *rest) = randn(16, grad=True), dispatched("spread", 9, 2, 96, True, torch.float32)
    norm.rms_norm(x, weight, 1e-3, torch.float32).sum().backward()
    dispatch.replicated(hidden, *rest).sum().backward()
    assert weight.grad is not None
    assert rest[-1].down_proj.grad is not None


def test_second_derivatives_are_refused_where_a_form_has_none():
    x = randn(7, 16, grad=True)
    with pytest.raises(RuntimeError, match="MINIMOE_OPS=plain"):
        torch.autograd.grad(normed(x).sum(), x, create_graph=True)
    with using():
        (grad,) = torch.autograd.grad(normed(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), x)[0].any()


@pytest.mark.parametrize("name", list(dispatch.DISPATCHES))
@pytest.mark.parametrize("tokens", [2, 87])
def test_arguments_that_do_not_fit_the_experts_are_left_to_the_definition(name, tokens):
    """A kernel that trusted them would read and write past the ends of memory."""
    x, ids, weights, experts = dispatched("spread", tokens, 2, 96, False, torch.float32)
    others = [(x[:, :64], ids, weights), (x, ids.int(), weights), (x, ids, weights[:1]), (x[:1], ids, weights)]
    for form in FORMS[name]:
        for changed_args in others:
            assert not form.suits(*changed_args, experts)
    expected = DEFINITIONS[name](x, ids, weights, experts)
    assert relative_error(DEFINITIONS[name](x, ids.int(), weights, experts), expected) <= TOLERANCE[torch.float32]


def test_a_norms_weight_of_another_size_is_an_error():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm.rms_norm(randn(3, 16), randn(8), 1e-3, torch.float32)


def test_autocast_leaves_float64_alone_as_in_torch():
    args = dispatched("spread", 9, 2, 96, False, torch.float64)
    with using():
        expected = dispatch.replicated(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(dispatch.replicated(*args), expected) <= 1e-14


def test_a_target_that_is_no_token_is_an_error():
    hidden, head, targets, rows = loss_of(7, True, torch.float32)
    for wrong in (-1, 300):
        targets[1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            losses.hidden_loss(hidden, head, targets, rows)


def test_angles_that_are_learned_get_their_gradients():
    args = attended(None, 2, 9, True, torch.float32)
    args[5].requires_grad_()
    with float32_by_onednn(CPU, 512):
        result = attention.causal_attention(*args).square().sum()
    assert torch.autograd.grad(result, args[5])[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_with_half_precision_norms_are_normed_in_float32(dtype):
    q, k, v, q_norm, k_norm, *others = attended(None, 2, 9, True, torch.float32)
    heads_ = [(300 * x).to(dtype).detach() for x in (q, k, v)]  # their squares are above float16's largest value
    args = (*heads_, q_norm.to(dtype), k_norm.to(dtype), *others)
    with using():
        expected = attention.causal_attention(*args)
    assert relative_error(attention.causal_attention(*args), expected) <= 1e-3


def test_attention_to_a_cache_takes_a_bias_that_rows_share():
    q, keys, values, bias, scaling = cached(True, 1, torch.float32)
    args = (q, keys, values, bias[1:].expand(2, 1, 1, 37), scaling)
    compare("cached_attention", Case("shared", lambda dtype: args), torch.float32, packed.cached_attention)


# ---- the door ----


def test_using_leaves_only_what_it_names_and_the_definition_when_it_names_nothing():
    ran = []
    args = (randn(7, 16), randn(16), 1e-3, torch.float32)
    forms = FORMS["rms_norm"]
    before = list(forms)
    forms[:] = [f._replace(run=lambda *a, f=f: ran.append(f.backend) or f.run(*a)) for f in forms]
    try:
        with using("cuda"):
            norm.rms_norm(*args)
        with using():
            norm.rms_norm(*args)
        assert ran == []
        with using(*BACKENDS):
            norm.rms_norm(*args)
        assert ran == ["cpu"]
    finally:
        forms[:] = before


def test_a_backend_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="not cppu"), using("cppu"):
        pass
    with pytest.raises(UserError, match="unknown backend in MINIMOE_OPS=onednn"):
        door._asked_for("onednn")
    assert door._asked_for("plain") == set()


def test_sizes_are_few_for_onednn_and_exact_for_others():
    sizes = range(1, 8193)
    rounded = [few_sizes(size, CPU, torch.bfloat16) for size in sizes]
    assert all(size <= more < 1.125 * size for size, more in zip(sizes, rounded, strict=True))
    assert all(more - size < max(64, size / 32) for size, more in zip(sizes, rounded, strict=True))
    # 1 to 7; eight from each power of two to the next, 8 to 1024; then 16, and 32 from 2048 on
    assert len(set(rounded)) == 7 + 7 * 8 + 16 + 2 * 32 + 1
    assert few_sizes(0, CPU, torch.bfloat16) == 0
    assert few_sizes(1001, CPU, torch.float32) == few_sizes(1001, torch.device("meta"), torch.bfloat16) == 1001
    groups = [(0, slice(0, 6), slice(0, 6)), (2, slice(6, 20), slice(6, 20))]
    assert moe.groups_of_rows([6, 6, 20], CPU, torch.float32) == (groups, 20)
    assert moe.groups_of_rows([1000, 1003], CPU, torch.bfloat16)[1] == 1024  # the first slice ends last


def test_training_keeps_no_copies_of_tokens_for_backward():
    tokens, ids, weights, experts = dispatched("spread", 37, 2, 24, True, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        experts(tokens, ids, weights)
    assert (37, HIDDEN) in kept
    assert (74, HIDDEN) not in kept  # nor of results


def test_a_tokens_gradient_in_bf16_is_rounded_once_not_for_every_slot():
    torch.manual_seed(0)
    rows, places = randn(37 * 5, 24, dtype=torch.bfloat16), torch.randperm(37 * 5).view(37, 5)
    assert torch.equal(moe.sum_slots(rows, places), rows.double()[places].sum(1).bfloat16())


# ---- one graph ----


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "accelerated"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_the_model_is_one_graph_and_exports(training, plain):
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1, moe_intermediate_size=64, attn_implementation="sdpa").train(training)
    ids = torch.randint(3, 97, (2, 24))
    positions = torch.cat((torch.arange(9), torch.arange(15))).repeat(2, 1)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            outputs = self.model(input_ids=ids, labels=ids, position_ids=positions, skip_logits=True, use_cache=False)
            return outputs.loss

    with using() if plain else nullcontext(), torch.set_grad_enabled(training):
        expected = Loss()(ids, positions)
        compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")(ids, positions)
        exported = torch.export.export(Loss(), (ids, positions)).module()(ids, positions)
        for loss in (compiled, exported):
            assert relative_error(loss, expected) <= TOLERANCE[torch.float32]
        if training:
            gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (compiled, expected)]
            for gradient, truth in zip(*gradients, strict=True):
                assert relative_error(gradient, truth) <= 1e-5  # through all layers and back


def test_the_tiny_arguments_of_attention_are_what_the_model_passes():
    """The cases above stand for real calls."""
    seen = SimpleNamespace(args=None)
    forms = FORMS["causal_attention"]
    form = forms[-1]._replace(suits=lambda *args: setattr(seen, "args", args) or False)
    forms.insert(0, form)
    try:
        model = tiny_model(num_hidden_layers=1, attn_implementation="sdpa")
        model(input_ids=torch.randint(3, 97, (2, 8)), use_cache=False)
    finally:
        forms.remove(form)
    given = attended(None, 2, 8, False, torch.float32)
    assert [type(x) for x in seen.args] == [type(x) for x in given]
    assert [x.ndim for x in seen.args if isinstance(x, Tensor)] == [x.ndim for x in given if isinstance(x, Tensor)]
    assert tiny_config().head_dim is not None
