"""Fused attention for any shape: the forward kernel.

    O = dropout(softmax(scale * Q K^T + mask)) V

A program owns BLOCK_Q queries of one head and walks along the keys in tiles of BLOCK_K, keeping for each row the
largest score so far and the sum of exponentials relative to it, so that no L x S matrix is stored: online softmax
(Milakov and Gimelshein 2018), tiled for attention as FlashAttention-2 does it (Dao 2023, section 3.1). Fused into one
kernel: both products, scaling, causal and given masks, softmax, dropout.

Work of one head: 4 L S E flops (half when causal; E = Ev). Bytes: Q, K, V and O once each, plus 8 a row for the
statistics; K and V are read again by every query tile, from L2 as long as one head's fit there. Unfused, the L x S
scores travel to memory and back at least three times.

The statistics of a row are `row_max` (-inf for a row that may attend to nothing) and `row_sum` (of
exp(score - row_max)). Two numbers rather than their log-sum-exp: under a float mask of finfo.min the sum would drown in
the maximum, and with large scores its digits. A sink is a row's first score, without a value.

Heads wider than a tile (LOOP > 0): a program makes one chunk of columns of the output and computes the scores over all
chunks anew, so Q and K are multiplied once a chunk.
"""

import torch
import triton
import triton.language as tl

from kernels.again import run_kernel
from kernels.attention.arguments import (
    dot_precision,
    for_kernel,
    heads_in_turn,
    is_exact,
    row_strided,
    shape_of,
    strided,
)
from kernels.attention.call import Call
from kernels.attention.layout import is_wide
from kernels.attention.pieces import (
    at_head,
    batch_bounds,
    dot,
    find_queries,
    has_nonfinite,
    keys_to_walk,
    load_rows,
    product_of_rows,
    start_of_tile,
    steps_of_pass,
    store_rows,
    tile_dropout_factors,
)
from kernels.attention.score import CARE, LOG2_E, OPEN, Where, exponent_factor, exponentials, find_head, tile_scores
from kernels.attention.tiles import Tile, column_blocks
from kernels.launch import cdiv, launch_on, settle


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    out,
    row_max,
    row_sum,
    call,
    shape,
    section,
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
    """Output and statistics of BLOCK_Q queries of one head.

    query (B, n_heads, L, E), key (B, n_heads / group, S, E), value (B, n_heads / group, S, EV): `Strided` inputs.
    Packed batch entries follow each other in (1, heads, all rows, E), entry b from call.query_starts[b] and
    call.key_starts[b]. out (B, n_heads, L, EV): output. row_max, row_sum (B, n_heads, L): float32 statistics.
    call: as `for_kernel` gives it. section: heads, or chunks of columns of them, whose tiles of queries are worked on
    in turn. WIDE: offsets inside a tile need 64 bits.
    """
    chunk, b, h, start_q = find_queries(call, shape, section, (EV + BLOCK_EV - 1) // BLOCK_EV, BLOCK_Q)
    bounds = batch_bounds(call, shape, b)
    if call.query_starts is not None:
        if start_q >= bounds.n_queries:
            return
    head = find_head(call, b, h, (b * shape.n_heads + h).to(tl.int32))
    q_rows = at_head(query, b, h, bounds.first_q)
    k_rows = at_head(key, b, h // shape.group, bounds.first_k)
    v_rows = at_head(value, b, h // shape.group, bounds.first_k)
    factor = exponent_factor(call, EXACT)
    unit = 1.0 if EXACT else LOG2_E  # of the running maximum, in natural units

    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if LOOP == 0:
        q = load_rows(q_rows, start_q, bounds.n_queries, 0, BLOCK_Q, E, BLOCK_E, WIDE)
    first_max, first_sum = float("-inf"), 0.0
    if call.sinks is not None:
        sink = tl.load(call.sinks.ptr + b * call.sinks.stride_b + h * call.sinks.stride_h)
        first_max, first_sum = sink * unit, 1.0
    largest = tl.zeros((BLOCK_Q,), tl.float32) + first_max
    total = tl.zeros((BLOCK_Q,), tl.float32) + first_sum
    acc = tl.zeros((BLOCK_Q, BLOCK_EV), tl.float32)

    walk = keys_to_walk(call, bounds, start_q, BLOCK_Q, BLOCK_K)
    for PASS in tl.static_range(3 if call.right is not None or call.attn_mask is not None else 2):
        again = False
        if PASS == CARE:
            again = has_nonfinite(acc)
            largest, total = tl.where(again, first_max, largest), tl.where(again, first_sum, total)
            acc = tl.where(again, 0.0, acc)
        first, last = steps_of_pass(walk, again, PASS)
        for step in range(first, last, BLOCK_K):
            start_k = start_of_tile(walk, step, PASS)
            if LOOP == 0:
                k = load_rows(k_rows, start_k, bounds.n_keys, 0, BLOCK_K, E, BLOCK_E, WIDE, PASS == OPEN)
                products = dot(q, tl.trans(k), None, PRECISION)
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
            v = load_rows(v_rows, start_k, bounds.n_keys, chunk * BLOCK_EV, BLOCK_K, EV, BLOCK_EV, WIDE, PASS == OPEN)
            where = Where(start_q, start_k, di, dj)
            scores, _ = tile_scores(products, call, head, bounds, where, EXACT, WIDE, PASS)
            tile_max = tl.max(scores, 1)
            new_max = tl.maximum(largest, tile_max if EXACT else tile_max * factor)
            pivot = new_max
            if PASS != OPEN or call.attn_mask is not None:
                pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = exponentials(scores, pivot[:, None], factor, EXACT)
            shrink = exponentials(largest, pivot, 1.0, EXACT)
            total = total * shrink + tl.sum(weights, 1)
            largest = new_max
            acc *= shrink[:, None]
            if call.seed is not None:
                weights *= tile_dropout_factors(call, head, start_q, start_k, BLOCK_Q, BLOCK_K, True)
            if PASS == CARE:
                # A weight of zero times NaN is NaN: take such values out, and give NaN to the rows that may see them.
                finite = tl.abs(v) < float("inf")
                if call.attn_mask is None:  # values that all rows may see stay as they are
                    finite = finite | ((start_k >= walk.open_begin) & (start_k < walk.open_end))
                clean = tl.min(finite.to(tl.int32), 1)
                weights = tl.where((scores != float("-inf")) & (clean == 0)[None, :], float("nan"), weights)
                v = tl.where(finite, v, 0.0)
            acc = dot(weights.to(v.dtype), v, acc, PRECISION)

    acc /= tl.where(total == 0.0, 1.0, total)[:, None]  # zero: no key allowed
    out_rows = at_head(out, b, h, bounds.first_q)
    store_rows(out_rows, acc, start_q, bounds.n_queries, chunk * BLOCK_EV, BLOCK_Q, EV, BLOCK_EV)
    if chunk == 0:
        offs_q = start_q + tl.arange(0, BLOCK_Q)
        inside = offs_q < bounds.n_queries
        tl.store(at_head(row_max, b, h, bounds.first_q).ptr + offs_q, largest * (1.0 / unit), mask=inside)
        tl.store(at_head(row_sum, b, h, bounds.first_q).ptr + offs_q, total, mask=inside)


settle(forward_kernel)


def launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    tile: Tile,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
) -> None:
    """Launch the forward kernel.

    Args:
        query: (B, Hq, L, E), any strides; key: (B, Hkv, S, E); value: (B, Hkv, S, Ev). Packed: B = 1, rows of all.
        call: with a scale above 0.
        output: (B, Hq, L, Ev), any strides, written; row_max, row_sum: (B, Hq, L) float32, rows contiguous, written.
    """
    e, ev = query.shape[-1], value.shape[-1]
    shape, sizes = shape_of(query, key, call), column_blocks(e, ev)
    chunks = cdiv(ev, sizes["BLOCK_EV"])
    grid = (cdiv(shape.L, tile.block_q) * chunks * shape.n_heads * shape.batch,)
    if grid[0] == 0:
        return
    section = chunks * heads_in_turn(shape.group, shape.S * (e + ev) * key.itemsize, call, query.device)
    with launch_on(query.device):
        run_kernel(
            forward_kernel,
            grid,
            strided(query, call),
            strided(key, call),
            strided(value, call),
            strided(output, call),
            row_strided(row_max, call),
            row_strided(row_sum, call),
            for_kernel(call),
            shape,
            section,
            EXACT=is_exact(query.dtype, call),
            PRECISION=dot_precision(query.dtype),
            WIDE=is_wide(query, key, value, call.attn_mask),
            **sizes,
            **tile.options(),
        )
