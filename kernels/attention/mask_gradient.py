"""Gradient of a float attention mask, for every way the mask can be broadcast.

    dmask[b, h, i, j] = dS[b, h, i, j], summed over the axes along which the mask has size 1

with dS as in general_backward.py. A program owns one tile of the mask's gradient and walks whatever was broadcast onto
it (batch entries, heads, query tiles, key tiles), recomputing dS tile by tile: no atomics, and no L x S buffer when the
mask itself is smaller.

Work of one head: 4 L S E flops (two products; E = Ev), on top of the backward's. Bytes: Q, K, V and dO are read once a
tile of the mask; the mask is read and its gradient written once.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.pieces import (
    Shape,
    at_head,
    batch_bounds,
    dot,
    keys_to_walk,
    load_rows,
    load_statistics,
    product_of_rows,
    tile_dropout_factors,
)
from kernels.attention.score import CARE, Where, exponentials, find_head, score_gradient, tile_scores
from kernels.attention.tiles import Tile
from kernels.launch import cdiv, settle


@triton.jit
def mask_kernel(
    query,
    key,
    value,
    grad,
    statistics,
    dmask,
    call,
    shape,
    SUM_B: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_L: tl.constexpr,
    SUM_S: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of a tile of the float mask: dS summed over the axes along which the mask was broadcast (SUM_*).

    dmask: as the mask, size 1 along the summed axes. A program that sums over an axis walks all of it. The rest as in
    query_kernel.
    """
    pid = tl.program_id(0)
    n_tiles_q = 1 if SUM_L else tl.cdiv(shape.L, BLOCK_Q)
    n_tiles_k = 1 if SUM_S else tl.cdiv(shape.S, BLOCK_K)
    n_mask_heads = 1 if SUM_H else shape.n_heads
    tile_k = pid % n_tiles_k
    tile_q = pid // n_tiles_k % n_tiles_q
    mask_h = pid // n_tiles_k // n_tiles_q % n_mask_heads
    mask_b = pid // n_tiles_k // n_tiles_q // n_mask_heads
    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)

    n_walked_heads = shape.n_heads if SUM_H else 1
    for walked in range(0, (shape.batch if SUM_B else 1) * n_walked_heads):
        b = (mask_b + walked // n_walked_heads).to(tl.int64)
        h = (mask_h + walked % n_walked_heads).to(tl.int64)
        bounds = batch_bounds(call, shape, b)
        head = find_head(call, b, h, (b * shape.n_heads + h).to(tl.int32))
        q_rows, grad_rows = at_head(query, b, h, 0), at_head(grad, b, h, 0)
        k_rows, v_rows = at_head(key, b, h // shape.group, 0), at_head(value, b, h // shape.group, 0)
        first_row = b * statistics.stride_b + h * statistics.stride_h
        for start_q in range(tile_q * BLOCK_Q, shape.L if SUM_L else (tile_q + 1) * BLOCK_Q, BLOCK_Q):
            if LOOP == 0:
                q = load_rows(q_rows, start_q, bounds.n_queries, 0, BLOCK_Q, E, BLOCK_E, WIDE)
                do = load_rows(grad_rows, start_q, bounds.n_queries, 0, BLOCK_Q, EV, BLOCK_EV, WIDE)
            pivot, inverse, delta = load_statistics(
                statistics, first_row, start_q, bounds.n_queries, BLOCK_Q, EXACT, False
            )
            walk = keys_to_walk(call, bounds, start_q, BLOCK_Q, BLOCK_K)
            begin, end = walk.begin, walk.end
            if not SUM_S:
                begin = tl.maximum(begin, tile_k * BLOCK_K)
                end = tl.minimum(end, (tile_k + 1) * BLOCK_K)
            for start_k in range(begin, end, BLOCK_K):
                if LOOP == 0:
                    k = load_rows(k_rows, start_k, bounds.n_keys, 0, BLOCK_K, E, BLOCK_E, WIDE)
                    v = load_rows(v_rows, start_k, bounds.n_keys, 0, BLOCK_K, EV, BLOCK_EV, WIDE)
                    products = dot(q, tl.trans(k), None, PRECISION)
                    dp = dot(do, tl.trans(v), None, PRECISION)
                else:
                    products = product_of_rows(
                        q_rows,
                        start_q,
                        bounds.n_queries,
                        k_rows,
                        start_k,
                        bounds.n_keys,
                        BLOCK_Q,
                        BLOCK_K,
                        E,
                        LOOP,
                        PRECISION,
                        WIDE,
                    )
                    dp = product_of_rows(
                        grad_rows,
                        start_q,
                        bounds.n_queries,
                        v_rows,
                        start_k,
                        bounds.n_keys,
                        BLOCK_Q,
                        BLOCK_K,
                        EV,
                        LOOP,
                        PRECISION,
                        WIDE,
                    )
                where = Where(start_q, start_k, di, dj)
                scores, capped = tile_scores(products, call, head, bounds, where, EXACT, WIDE, CARE)
                weights = exponentials(scores, pivot[:, None], 1.0, EXACT) * inverse[:, None]
                if call.seed is not None:
                    dp *= tile_dropout_factors(call, head, start_q, start_k, BLOCK_Q, BLOCK_K, True)
                total += score_gradient(weights, dp, delta[:, None], scores, capped, call, False, CARE)

    rows = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    dmask_ptr = at_head(dmask, mask_b.to(tl.int64), mask_h.to(tl.int64), 0).ptr
    dtype: tl.constexpr = dmask_ptr.dtype.element_ty
    if SUM_L and SUM_S:
        tl.store(dmask_ptr, tl.sum(total).to(dtype))
    elif SUM_L:
        tl.store(dmask_ptr + cols.to(tl.int64) * dmask.stride_col, tl.sum(total, 0).to(dtype), mask=cols < shape.S)
    elif SUM_S:
        tl.store(dmask_ptr + rows.to(tl.int64) * dmask.stride_row, tl.sum(total, 1).to(dtype), mask=rows < shape.L)
    else:
        pointers = dmask_ptr + rows[:, None].to(tl.int64) * dmask.stride_row
        pointers += cols[None, :].to(tl.int64) * dmask.stride_col
        tl.store(pointers, total.to(dtype), mask=(rows[:, None] < shape.L) & (cols[None, :] < shape.S))


settle(mask_kernel)


def summed_axes(dmask: torch.Tensor) -> dict[str, bool]:
    """The SUM_* flags: along an axis of size 1 the mask was broadcast (or need not be: the sum of one is the same)."""
    return {f"SUM_{axis}": size == 1 for axis, size in zip("BHLS", dmask.shape)}


def mask_grid(dmask: torch.Tensor, shape: Shape, tile: Tile) -> tuple[int]:
    """One program a tile of the mask's gradient (Bm, Hm, Lm, Sm): key tiles fastest, then query tiles, heads, batch."""
    tiles_q = 1 if dmask.shape[2] == 1 else cdiv(shape.L, tile.block_q)
    tiles_k = 1 if dmask.shape[3] == 1 else cdiv(shape.S, tile.block_k)
    return (tiles_k * tiles_q * dmask.shape[1] * dmask.shape[0],)
