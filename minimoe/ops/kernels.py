"""Kernels of Triton for fused.py, which says what they are for. Importing this module imports Triton.

A program computes a tile of ROWS rows of one expert and COLUMNS columns of its width. Products are summed in float32;
WIDEN converts the factors too, for Triton's interpreter, which cannot multiply bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _own_rows(tile, ends, tile_ends, E: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert of a tile, its first row, and where the expert's rows end; E for a tile behind the last."""
    expert = 0
    for e in range(E):
        expert += (tl.load(tile_ends + e) <= tile).to(tl.int32)
    known = tl.minimum(expert, E - 1)
    first_tile = tl.load(tile_ends + known - 1, mask=known > 0, other=0)
    start = tl.load(ends + known - 1, mask=known > 0, other=0)
    return expert, start + (tile - first_tile) * ROWS, tl.load(ends + known)


@triton.jit
def _gate_and_up(  # type: ignore[no-untyped-def]
    tokens, ids, present, gate_up, expert, columns,
    D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gathered rows times the expert's gate and up: two (ROWS, COLUMNS) float32."""
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    matrix = gate_up + expert.to(tl.int64) * 2 * WIDTH * D
    inside = columns < WIDTH
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < D
        x = tl.load(tokens + ids[:, None] * D + depth[None, :], mask=present[:, None] & deep[None, :], other=0.0)
        place = columns[None, :] * D + depth[:, None]  # the matrix transposed: (DEPTH, COLUMNS)
        mask = deep[:, None] & inside[None, :]
        by_gate = tl.load(matrix + place, mask=mask, other=0.0)
        by_up = tl.load(matrix + WIDTH * D + place, mask=mask, other=0.0)
        if WIDEN:
            x, by_gate, by_up = x.to(tl.float32), by_gate.to(tl.float32), by_up.to(tl.float32)
        gate = tl.dot(x, by_gate, gate)
        up = tl.dot(x, by_up, up)
    return gate, up


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    tokens, token_ids, ends, tile_ends, row_weights, gate_up, activated,
    N, D: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """activated (N, WIDTH) = silu(gate) * up * weight, of tokens (T, D) that are gathered on the way."""
    expert, first, end = _own_rows(tl.program_id(0), ends, tile_ends, E, ROWS)
    if expert < E:
        rows = first + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        present = rows < end
        ids = tl.load(token_ids + rows, mask=present, other=0)
        gate, up = _gate_and_up(
            tokens, ids, present, gate_up, expert, columns, D, WIDTH, ROWS, COLUMNS, DEPTH, WIDEN
        )  # fmt: skip
        weight = tl.load(row_weights + rows, mask=present, other=0.0)
        out = gate * tl.sigmoid(gate) * up * weight[:, None]
        mask = present[:, None] & (columns < WIDTH)[None, :]
        place = rows[:, None] * WIDTH + columns[None, :]
        tl.store(activated + place, out.to(activated.dtype.element_ty), mask=mask)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    tokens, token_ids, ends, tile_ends, row_weights, gate_up, activated, grad_activated, grad_hidden, grad_weights,
    N, D: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The activations again; from their gradient those of gate and up (N, 2 WIDTH), and of the rows' weights (N,), from
    each block of columns its part."""
    expert, first, end = _own_rows(tl.program_id(0), ends, tile_ends, E, ROWS)
    if expert < E:
        rows = first + tl.arange(0, ROWS)
        block = tl.program_id(1)
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        present = rows < end
        ids = tl.load(token_ids + rows, mask=present, other=0)
        gate, up = _gate_and_up(
            tokens, ids, present, gate_up, expert, columns, D, WIDTH, ROWS, COLUMNS, DEPTH, WIDEN
        )  # fmt: skip
        weight = tl.load(row_weights + rows, mask=present, other=0.0)[:, None]
        mask = present[:, None] & (columns < WIDTH)[None, :]
        place = rows[:, None] * WIDTH + columns[None, :]
        grad = tl.load(grad_activated + place, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        kind = activated.dtype.element_ty
        tl.store(activated + place, (silu * up * weight).to(kind), mask=mask)
        tl.store(grad_weights + block * N + rows, tl.sum(grad * silu * up, axis=1), mask=present)
        grad = grad * weight
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        wide = rows[:, None] * (2 * WIDTH) + columns[None, :]
        tl.store(grad_hidden + wide, grad_gate.to(kind), mask=mask)
        tl.store(grad_hidden + wide + WIDTH, (grad * silu).to(kind), mask=mask)
