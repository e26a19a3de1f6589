"""Faster forms in C++ for what a CPU does much faster in one pass than in several of torch's calls.

Every function is pure, runs on the CPU without gradients, and is the operator of its name too, see `operator`. Shape
letters: T tokens, N rows, D hidden, I expert width, E experts, k experts per token, H and K heads of queries and keys,
d values each, B sequences. "float" is float32 or bfloat16, alike for all arguments that are; computing is in float32.

Callers ask `why_not` whether they can be had, and guarantee what the decorators say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimoe.ops.c.library import run
from minimoe.ops.c.library import why_not as why_not
from minimoe.ops.c.operator import operator

PANEL = 32  # columns that a thread of `grouped_swiglu` multiplies at a time, WIDE in tiles.h


# Rows of tokens


@operator(gate_up="float N,2I", weights="f32 M")
def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, each row times its weight, zeros for rows without one.

    Args:
        gate_up: (N, 2I), gate first.
        weights: (M,) float32, M <= N, of the first rows; None for 1 each.

    Returns:
        (N, I).
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    weighted = rows if weights is None else weights.shape[0]
    run("swiglu", gate_up.dtype, 2 * rows * width, (gate_up, weights, out), rows, weighted, width)
    return out


@operator(gate_up="float N,2I", weights="f32 M", grad="float N,I")
def swiglu_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output of `swiglu` again, and the gradients of gate_up (N, 2I) and weights (M,), from the output's (N, I)."""
    rows, width = grad.shape
    activated, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    grad_weights = torch.empty_like(weights)
    tensors = (gate_up, weights, grad, activated, grad_gate_up, grad_weights)
    run("swiglu_backward", grad.dtype, 2 * rows * width, tensors, rows, weights.shape[0], width)
    return activated, grad_gate_up, grad_weights


@operator(rows="float T,D", ids="int64 N <T")
def gather_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """rows[ids]: (T, D), (N,) -> (N, D)."""
    count, width = ids.shape[0], rows.shape[1]
    out = rows.new_empty(count, width)
    run("gather_rows", rows.dtype, count * width, (rows, ids, out), count, width)
    return out


@operator(rows="float N,D", places="int64 T,k <N")
def sum_slots(rows: Tensor, places: Tensor) -> Tensor:
    """The sum over s of rows[places[t, s]], added up in float32: (N, D), (T, k) -> (T, D)."""
    (tokens, slots), width = places.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    run("sum_slots", rows.dtype, tokens * slots * width, (rows, places, out), tokens, slots, width)
    return out


# Norm and heads


@operator(x="f32 *,D", weight="f32 D")
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in `dtype`; x (..., D) and weight (D,) float32."""
    out, size, width = torch.empty_like(x, dtype=dtype), x.numel(), x.shape[-1]
    run("rms_norm", dtype, size, (x, weight, out), eps, size // width, width)
    return out


@operator(x="f32 *,D", weight="f32 D", grad="float *,D")
def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, float32, from that of the output."""
    grad_x, grad_weight, size, width = torch.empty_like(x), torch.empty_like(weight), x.numel(), x.shape[-1]
    tensors = (x, weight, grad, grad_x, grad_weight)
    run("rms_norm_backward", grad.dtype, size, tensors, eps, size // width, width)
    return grad_x, grad_weight


@operator(q="float T,Q rows", k="float T,V rows", v="float T,V rows", gains="f32 G,d", cos="f32 T,d", sin="f32 T,d")
def heads(
    q: Tensor, k: Tensor, v: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, eps: float, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated heads of C rows of n = `length` tokens, in the order of attention's matmuls.

    Args:
        q, k, v: (C * n, H * d) and (C * n, K * d), what the projections gave. Rows may be apart, as in a slice of them.
        gains: (H + K, d) float32, the weights of the norms.
        cos, sin: (C * n, d) float32, of each token's position.
        eps: of the norms.

    Returns:
        q (C * K, n * R, d) with R = H / K, by position, then head of the group; k and v (C * K, n, d).
    """
    tokens, _, kv_heads, group, head_dim = sizes = _head_sizes(q, k, gains, length)
    sequences = tokens // length * kv_heads
    results = (
        q.new_empty(sequences, length * group, head_dim),
        q.new_empty(sequences, length, head_dim),
        q.new_empty(sequences, length, head_dim),
    )
    strides = (q.stride(0), k.stride(0), v.stride(0))
    work = tokens * (gains.shape[0] + kv_heads) * head_dim
    run("heads", q.dtype, work, (q, k, v, gains, cos, sin, *results), eps, *strides, *sizes)
    return results


@operator(
    q="float T,Q rows",
    k="float T,V rows",
    v="float T,V rows",
    gains="f32 G,d",
    cos="f32 T,d",
    sin="f32 T,d",
    grad_q="float S,X,d",
    grad_k="f32 S,n,d",
    grad_v="f32 S,n,d",
)
def heads_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gains: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    length: int,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, and of the gains, from those of the results, in float32 of k and v."""
    tokens, _, kv_heads, group, head_dim = sizes = _head_sizes(q, k, gains, length)
    if grad_q.numel() != q.numel() or grad_k.numel() != k.numel() or grad_k.shape[1] != length:
        raise ValueError(f"gradients {tuple(grad_q.shape)} and {tuple(grad_k.shape)} are not of {tokens} tokens' heads")
    results = (
        q.new_empty(tokens, kv_heads * group * head_dim),
        q.new_empty(tokens, kv_heads * head_dim),
        q.new_empty(tokens, kv_heads * head_dim),
        torch.empty_like(gains),
    )
    work = tokens * (gains.shape[0] + kv_heads) * head_dim
    tensors = (q, k, gains, cos, sin, grad_q, grad_k, grad_v, *results)
    run("heads_backward", q.dtype, work, tensors, eps, q.stride(0), k.stride(0), *sizes)
    return results


def _head_sizes(q: Tensor, k: Tensor, gains: Tensor, length: int) -> tuple[int, int, int, int, int]:
    """T, n, K, R and d."""
    (tokens, keys), (normed, head_dim) = k.shape, gains.shape
    kv_heads = keys // head_dim
    group = q.shape[1] // keys
    if keys != kv_heads * head_dim or q.shape[1] != group * keys or normed != (group + 1) * kv_heads or head_dim % 2:
        raise ValueError(f"widths {q.shape[1]} and {keys} are not those of {normed} heads of {head_dim}")
    if tokens % length:
        raise ValueError(f"{tokens} tokens are not rows of {length}")
    return tokens, length, kv_heads, group, head_dim


# Experts of many tokens


@operator(
    tokens="float T,D", ids="int64 N <T", weights="f32 N", gate_up="f32 E,2I,D", down="f32 E,D,I", ends="int64 E ends:N"
)
def grouped_swiglu(
    tokens: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """SwiGLU experts over rows sorted by expert, each times its weight, with matmuls in the tokens' dtype.

    Args:
        tokens: (T, D).
        ids: (N,) int64, the token of each row.
        weights: (N,) float32.
        gate_up, down: (E, 2I, D), gate first, and (E, D, I), float32; D and I are multiples of PANEL.
        ends: (E,) int64, where each expert's rows end.

    Returns:
        The pre-activations (N, 2I), for backward, and the results (N, D).
    """
    (experts, inputs, width), rows = down.shape, ids.shape[0]
    _need_panels(inputs, width)
    hidden, out = tokens.new_empty(rows, 2 * width), tokens.new_empty(rows, inputs)
    tensors = (tokens, ids, weights, gate_up, down, ends, hidden, out)
    run("grouped_swiglu", tokens.dtype, rows * inputs * width, tensors, experts, inputs, width)
    return hidden, out


@operator(
    tokens="float T,D",
    ids="int64 N <T",
    weights="f32 N",
    gate_up="f32 E,2I,D",
    down="f32 E,D,I",
    ends="int64 E ends:N",
    hidden="float N,2I",
    grad="float N,D",
)
def grouped_swiglu_backward(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ends: Tensor,
    hidden: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows (N, D) in the tokens' dtype, and of weights, gate_up and down in float32.

    Args:
        hidden: (N, 2I), the pre-activations.
        grad: (N, D), of the results.
    """
    (experts, inputs, width), rows = down.shape, ids.shape[0]
    _need_panels(inputs, width)
    results = (torch.empty_like(grad), torch.empty_like(weights), torch.empty_like(gate_up), torch.empty_like(down))
    tensors = (tokens, ids, weights, gate_up, down, ends, hidden, grad, *results)
    run("grouped_swiglu_backward", tokens.dtype, rows * inputs * width, tensors, experts, inputs, width)
    return results


def _need_panels(inputs: int, width: int) -> None:
    if inputs % PANEL or width % PANEL:
        raise ValueError(f"experts of {inputs} inputs and width {width} are not in panels of {PANEL}")


# Few rows, as fast as memory is read: decoding


def _float32(x: Tensor) -> Tensor:  # asks first: calls that do nothing are a share of a small call's time
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


@operator(matrix="weight O,D", scales="f32 O", x="any N,D", norm_weight="f32 D", add="f32 N,O")
def linear_few(
    matrix: Tensor,
    scales: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    add: Tensor | None = None,
) -> Tensor:
    """x @ matrix.T, times the scales, plus `add`; the matrix is read once for all rows.

    Args:
        matrix: (out, D) float32, bfloat16 or int8.
        scales: (out,) float32, of int8.
        x: (N, D).
        norm_weight, eps: (D,) float32, for the RMS norm of x in its place.
        add: (N, out) float32.

    Returns:
        (N, out) float32.
    """
    outputs, inputs = matrix.shape
    x = _float32(x)
    rows = x.shape[0]
    out = x.new_empty(rows, outputs)
    tensors = (matrix, scales, x, norm_weight, add, out)
    run("linear_few", matrix.dtype, rows * outputs * inputs, tensors, eps, rows, inputs, outputs)
    return out


@operator(
    gate_up="weight E,2I,D",
    gate_up_scales="f32 E,2I",
    down="weight E,D,I",
    down_scales="f32 E,D",
    x="any T,D",
    ids="int64 T,k <E",
    weights="f32 T,k",
)
def experts_few(
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """The sum over s of weights[t, s] * down[e] @ swiglu(gate_up[e] @ x[t]), where e is ids[t, s].

    Args:
        gate_up, down: (E, 2I, D), gate first, and (E, D, I), float32, bfloat16 or int8.
        gate_up_scales, down_scales: (E, 2I) and (E, D) float32, of int8.
        x: (T, D).
        ids, weights: (T, k) int64 and float32.

    Returns:
        (T, D) float32.
    """
    (experts, inputs, width), (tokens, slots) = down.shape, ids.shape
    x = _float32(x)
    out = torch.empty_like(x)
    tensors = (gate_up, gate_up_scales, down, down_scales, x, ids, weights, out)
    sizes = (experts, tokens, slots, inputs, width)
    run("experts_few", down.dtype, tokens * slots * inputs * width, tensors, *sizes)
    return out


@operator(q="float B,K,G,d", keys="float B,K,L,d cache", values="float B,K,L,d cache", bias="f32 B,L")
def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a head to all positions of a cache.

    Args:
        q: (B, K, G, d), the G heads of each key head.
        keys, values: (B, K, L, d), the first L positions of larger buffers.
        bias: (B, L) float32, added to the scores, or None.

    Returns:
        (B, K, G, d).
    """
    batch, kv_heads, group, head_dim = q.shape
    sequences, length = batch * kv_heads, keys.shape[2]
    out = torch.empty_like(q)
    sizes = (sequences, kv_heads, group, length, keys.stride(1), head_dim)
    work = 2 * sequences * group * length * head_dim
    run("attend", q.dtype, work, (q, keys, values, bias, out), scale, *sizes)
    return out


# Optimizer


@operator(matrices="bf16 N,R,C")
def newton_schulz(matrices: Tensor, a: float, b: float, c: float, steps: int) -> Tensor:
    """Each matrix over its norm, then `steps` times x <- x (a + b x^T x + c (x^T x)^2); one thread a matrix.

    Args:
        matrices: (N, rows, columns) bfloat16; no more columns than rows is fastest.
    """
    count, rows, columns = matrices.shape
    out = torch.empty_like(matrices)
    work = count * rows * columns * columns
    run("newton_schulz", matrices.dtype, work, (matrices, out), a, b, c, steps, count, rows, columns)
    return out
