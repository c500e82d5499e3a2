"""Fused attention for any shape: the backward kernels.

With P = softmax(scale Q K^T + mask), D the dropout mask over 1 - p, and dO the gradient of the output,

    dV = (D P)^T dO        dP = D (dO V^T)        delta = rowsum(dO O) = rowsum(P dP)
    dS = P (dP - delta)    dQ = scale dS K        dK = scale dS^T Q

(FlashAttention-2, Dao 2023, section 3.1). With a soft cap, dS is times 1 - tanh^2 for dQ and dK. A gradient of the
log-sum-exp is taken off delta. P is recomputed tile by tile, from a pivot a row: its log-sum-exp in base 2, or, if
EXACT (score.py), its largest score in natural units, and beside it 1 over its sum; the delta kernel makes them of the
saved statistics. Each output has one owner: dQ a program per query tile, dK and dV a program per key tile, which walks
the query heads of its group. So there are no atomics, and repeated runs agree bit for bit. The mask's gradient:
mask_gradient.py.

Heads wider than a tile (LOOP > 0): a program makes one chunk of columns and computes scores and dP over all anew.

Work of one head: 14 L S E flops for dQ, dK and dV (7 products; half when causal, E = Ev). Bytes: Q, K, V, O, dO read
and dQ, dK, dV written once, and 12 a row for statistics and delta.
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
from kernels.attention.mask_gradient import mask_grid, mask_kernel, summed_axes
from kernels.attention.pieces import (
    Statistics,
    Strided,
    at_head,
    batch_bounds,
    dot,
    find_queries,
    find_work,
    has_nonfinite,
    keys_to_walk,
    load_rows,
    load_statistics,
    product_of_rows,
    queries_to_walk,
    start_of_tile,
    steps_of_pass,
    store_rows,
    tile_dropout_factors,
    zero_nonfinite,
)
from kernels.attention.plan import Plan
from kernels.attention.score import (
    CARE,
    LOG2_E,
    OPEN,
    Where,
    exponent_factor,
    exponentials,
    find_head,
    score_gradient,
    tile_scores,
)
from kernels.attention.tiles import block_of, column_blocks
from kernels.launch import cdiv, launch_on, settle

DELTA_ENTRIES = 4096  # of a tile of the delta kernel


@triton.jit
def delta_kernel(
    out,
    grad,
    row_max_ptr,
    row_sum_ptr,
    grad_lse,
    zeros_ptr,
    found,
    n_heads,
    L,
    EXACT: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """What the other kernels ask of a row, (B, n_heads, L) float32, so that none of them computes it in a loop.

    found: `Statistics` to write. Its delta: row sums of out times grad, both (B, n_heads, L, EV), less grad_lse (B,
    n_heads, L), the gradient of the log-sum-exp. Its pivot and inverse: see the top of this page; a row that may attend
    to nothing has the pivot inf, so that its weights are 0. row_max_ptr, row_sum_ptr: what the forward wrote. zeros_ptr
    (B, n_heads, L, EV): float32, where another kernel will add, set to 0. None for either where there is none.
    """
    n_tiles = tl.cdiv(L, BLOCK_Q)
    pid = tl.program_id(0)
    head = pid // n_tiles
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    start_q = (pid % n_tiles) * BLOCK_Q
    out_tile = load_rows(at_head(out, b, h, 0), start_q, L, 0, BLOCK_Q, EV, BLOCK_EV, True)
    grad_tile = load_rows(at_head(grad, b, h, 0), start_q, L, 0, BLOCK_Q, EV, BLOCK_EV, True)
    delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    inside = offs_q < L
    if grad_lse is not None:
        lse_ptrs = at_head(grad_lse, b, h, 0).ptr + offs_q.to(tl.int64) * grad_lse.stride_row
        delta -= tl.load(lse_ptrs, mask=inside, other=0.0)
    row = head.to(tl.int64) * L + offs_q
    tl.store(found.delta_ptr + row, delta, mask=inside)
    if zeros_ptr is not None:
        zeros = Strided(zeros_ptr + head.to(tl.int64) * L * EV, 0, 0, EV, 1)
        store_rows(zeros, tl.zeros((BLOCK_Q, BLOCK_EV), tl.float32), start_q, L, 0, BLOCK_Q, EV, BLOCK_EV)
    row_max = tl.load(row_max_ptr + row, mask=inside, other=0.0)
    row_sum = tl.load(row_sum_ptr + row, mask=inside, other=1.0)
    empty = (row_sum == 0.0) | (row_max == float("-inf"))  # the latter with a sink of -inf
    if EXACT:
        tl.store(found.inverse_ptr + row, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum)), mask=inside)
        pivot = row_max
    else:
        pivot = row_max * LOG2_E + tl.log2(tl.where(empty, 1.0, row_sum))
    tl.store(found.pivot_ptr + row, tl.where(empty, float("inf"), pivot), mask=inside)


@triton.jit
def query_kernel(
    query,
    key,
    value,
    grad,
    statistics,
    dq,
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
    """dq (B, n_heads, L, E) of BLOCK_Q queries of one head. grad (B, n_heads, L, EV): dO. The rest: forward_kernel."""
    chunk, b, h, start_q = find_queries(call, shape, section, (E + BLOCK_E - 1) // BLOCK_E, BLOCK_Q)
    bounds = batch_bounds(call, shape, b)
    if call.query_starts is not None:
        if start_q >= bounds.n_queries:
            return
    head = find_head(call, b, h, (b * shape.n_heads + h).to(tl.int32))
    q_rows = at_head(query, b, h, bounds.first_q)
    grad_rows = at_head(grad, b, h, bounds.first_q)
    k_rows = at_head(key, b, h // shape.group, bounds.first_k)
    v_rows = at_head(value, b, h // shape.group, bounds.first_k)
    factor = exponent_factor(call, EXACT)

    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if LOOP == 0:
        q = load_rows(q_rows, start_q, bounds.n_queries, 0, BLOCK_Q, E, BLOCK_E, WIDE)
        do = load_rows(grad_rows, start_q, bounds.n_queries, 0, BLOCK_Q, EV, BLOCK_EV, WIDE)
    first_row = b * statistics.stride_b + h * statistics.stride_h + bounds.first_q
    pivot, inverse, delta = load_statistics(statistics, first_row, start_q, bounds.n_queries, BLOCK_Q, EXACT, False)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)

    walk = keys_to_walk(call, bounds, start_q, BLOCK_Q, BLOCK_K)
    for PASS in tl.static_range(3 if call.right is not None or call.attn_mask is not None else 2):
        again = False
        if PASS == CARE:
            again = has_nonfinite(acc)
            acc = tl.where(again, 0.0, acc)
        first, last = steps_of_pass(walk, again, PASS)
        for step in range(first, last, BLOCK_K):
            start_k = start_of_tile(walk, step, PASS)
            k = load_rows(k_rows, start_k, bounds.n_keys, chunk * BLOCK_E, BLOCK_K, E, BLOCK_E, WIDE, PASS == OPEN)
            if LOOP == 0:
                v = load_rows(v_rows, start_k, bounds.n_keys, 0, BLOCK_K, EV, BLOCK_EV, WIDE, PASS == OPEN)
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
            scores, capped = tile_scores(products, call, head, bounds, where, EXACT, WIDE, PASS)
            weights = exponentials(scores, pivot[:, None], factor, EXACT)
            if EXACT:
                weights *= inverse[:, None]
            if call.seed is not None:
                dp *= tile_dropout_factors(call, head, start_q, start_k, BLOCK_Q, BLOCK_K, True)
            ds = score_gradient(weights, dp, delta[:, None], scores, capped, call, True, PASS)
            if PASS == CARE:
                k = zero_nonfinite(k)  # a key that may be attended to has made ds NaN already
            acc = dot(ds.to(k.dtype), k, acc, PRECISION)

    dq_rows = at_head(dq, b, h, bounds.first_q)
    store_rows(dq_rows, acc * call.scale, start_q, bounds.n_queries, chunk * BLOCK_E, BLOCK_Q, E, BLOCK_E)


@triton.jit
def key_value_kernel(
    query,
    key,
    value,
    grad,
    statistics,
    dk,
    dv,
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
    """dk and dv of BLOCK_K keys of one key head, summed over the query heads that share it.

    Works on transposed scores (BLOCK_K, BLOCK_Q): so the weights are the left operand of both products as they are.
    """
    chunks: tl.constexpr = (max(E, EV) + BLOCK_E - 1) // BLOCK_E if LOOP else 1
    n_tiles = tl.cdiv(shape.S, BLOCK_K)
    # The first key tiles see the most queries: the longest come first as they are.
    head_kv, tile = find_work(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, section)
    start_col = head_kv % chunks * BLOCK_E
    head_kv //= chunks
    n_kv_heads = shape.n_heads // shape.group
    b = (head_kv // n_kv_heads).to(tl.int64)
    h_kv = (head_kv % n_kv_heads).to(tl.int64)
    start_k = tile * BLOCK_K
    bounds = batch_bounds(call, shape, b)
    n_rows = shape.S
    if call.query_starts is not None:
        n_rows = (tl.load(call.key_starts.ptr + b + 1) - bounds.first_k).to(tl.int32)
        if start_k >= n_rows:
            return
    k_rows = at_head(key, b, h_kv, bounds.first_k)
    v_rows = at_head(value, b, h_kv, bounds.first_k)
    di, dj = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_K)[:, None]
    if LOOP == 0:
        k = load_rows(k_rows, start_k, bounds.n_keys, 0, BLOCK_K, E, BLOCK_E, WIDE)
        v = load_rows(v_rows, start_k, bounds.n_keys, 0, BLOCK_K, EV, BLOCK_EV, WIDE)
    acc_k = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    acc_v = tl.zeros((BLOCK_K, BLOCK_EV), tl.float32)
    factor = exponent_factor(call, EXACT)

    # Keys past the end need no look: their rows of dK and dV are zeroed or not stored.
    walk = queries_to_walk(call, bounds, start_k, BLOCK_Q, BLOCK_K)
    for PASS in tl.static_range(3 if call.right is not None or call.attn_mask is not None else 2):
        again = False
        if PASS == CARE:
            again = has_nonfinite(acc_k)
            acc_k, acc_v = tl.where(again, 0.0, acc_k), tl.where(again, 0.0, acc_v)
        first, last = steps_of_pass(walk, again, PASS)
        for member in range(0, shape.group):
            h = h_kv * shape.group + member
            head = find_head(call, b, h, (b * shape.n_heads + h).to(tl.int32))
            q_rows = at_head(query, b, h, bounds.first_q)
            grad_rows = at_head(grad, b, h, bounds.first_q)
            first_row = b * statistics.stride_b + h * statistics.stride_h + bounds.first_q
            for step in range(first, last, BLOCK_Q):
                start_q = start_of_tile(walk, step, PASS)
                q = load_rows(q_rows, start_q, bounds.n_queries, start_col, BLOCK_Q, E, BLOCK_E, WIDE, PASS == OPEN)
                do = load_rows(
                    grad_rows, start_q, bounds.n_queries, start_col, BLOCK_Q, EV, BLOCK_EV, WIDE, PASS == OPEN
                )
                pivot, inverse, delta = load_statistics(
                    statistics, first_row, start_q, bounds.n_queries, BLOCK_Q, EXACT, PASS == OPEN
                )
                if LOOP == 0:
                    products = dot(k, tl.trans(q), None, PRECISION)
                    dp = dot(v, tl.trans(do), None, PRECISION)
                else:
                    products = product_of_rows(
                        k_rows,
                        start_k,
                        bounds.n_keys,
                        q_rows,
                        start_q,
                        bounds.n_queries,
                        BLOCK_K,
                        BLOCK_Q,
                        E,
                        LOOP,
                        PRECISION,
                        WIDE,
                    )
                    dp = product_of_rows(
                        v_rows,
                        start_k,
                        bounds.n_keys,
                        grad_rows,
                        start_q,
                        bounds.n_queries,
                        BLOCK_K,
                        BLOCK_Q,
                        EV,
                        LOOP,
                        PRECISION,
                        WIDE,
                    )
                where = Where(start_q, start_k, di, dj)
                scores, capped = tile_scores(products, call, head, bounds, where, EXACT, WIDE, PASS)
                weights = exponentials(scores, pivot[None, :], factor, EXACT)
                if EXACT:
                    weights *= inverse[None, :]
                dropped = weights
                if call.seed is not None:
                    factors = tile_dropout_factors(call, head, start_q, start_k, BLOCK_K, BLOCK_Q, False)
                    dp *= factors
                    dropped = weights * factors
                if PASS == CARE:  # a query that is not finite has no number for a weight, nor for those it has not
                    dropped = tl.where(scores == float("-inf"), 0.0, dropped)
                acc_v = dot(dropped.to(do.dtype), do, acc_v, PRECISION)
                ds = score_gradient(weights, dp, delta[None, :], scores, capped, call, True, PASS)
                acc_k = dot(ds.to(q.dtype), q, acc_k, PRECISION)

    acc_k *= call.scale
    if call.key_lengths is not None:  # keys that are not in use
        used = dj < bounds.n_keys - start_k
        acc_k, acc_v = tl.where(used, acc_k, 0.0), tl.where(used, acc_v, 0.0)
    store_rows(at_head(dk, b, h_kv, bounds.first_k), acc_k, start_k, n_rows, start_col, BLOCK_K, E, BLOCK_E)
    store_rows(at_head(dv, b, h_kv, bounds.first_k), acc_v, start_k, n_rows, start_col, BLOCK_K, EV, BLOCK_EV)


settle(delta_kernel, query_kernel, key_value_kernel)


def launch_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    plan: Plan,
    statistics: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dmask: torch.Tensor | None,
) -> None:
    """Launch the backward kernels.

    Args:
        grad: (B, Hq, L, Ev), gradient of the output, any strides.
        query, key, value, call: as given to the forward.
        plan: whose tiles they take.
        statistics: (3, B, Hq, L) float32, what `launch_delta` found.
        dq, dk, dv, dmask: gradients to write, any strides, shaped as their tensors; None where not wanted. dk and dv
            come together.
    """
    if query.numel() == 0:  # no query asks: keys, values and mask get nothing
        for unasked in (dk, dv, dmask):
            if unasked is not None:
                unasked.zero_()
        return
    e, ev = query.shape[-1], value.shape[-1]
    shape, sizes = shape_of(query, key, call), column_blocks(e, ev)
    pivot, inverse, delta = statistics.unbind()
    _, stride_b, stride_h, *_ = row_strided(pivot, call)
    inputs = (
        strided(query, call),
        strided(key, call),
        strided(value, call),
        strided(grad, call),
        Statistics(pivot, inverse, delta, stride_b, stride_h),
    )
    asked = for_kernel(call)
    options = {
        **sizes,
        "EXACT": is_exact(query.dtype, call),
        "PRECISION": dot_precision(query.dtype),
        "WIDE": is_wide(query, key, value, call.attn_mask, grad),
    }
    width = (e + ev) * query.itemsize  # bytes of a row of both
    with launch_on(query.device):
        if dq is not None and dq.numel():
            tile = plan.tile("query")
            chunks = cdiv(e, sizes["BLOCK_E"])
            section = chunks * heads_in_turn(shape.group, shape.S * width, call, query.device)
            run_kernel(
                query_kernel,
                (cdiv(shape.L, tile.block_q) * chunks * shape.batch * shape.n_heads,),
                *inputs,
                strided(dq, call),
                asked,
                shape,
                section,
                **options,
                **tile.options(),
            )
        if dk is not None and dv is not None and dk.numel():
            tile = plan.tile("key_value")
            chunks = cdiv(max(e, ev), sizes["BLOCK_E"]) if sizes["LOOP"] else 1
            section = chunks * heads_in_turn(1, shape.group * shape.L * width, call, query.device)
            run_kernel(
                key_value_kernel,
                (cdiv(shape.S, tile.block_k) * chunks * shape.batch * key.shape[1],),
                *inputs,
                strided(dk, call),
                strided(dv, call),
                asked,
                shape,
                section,
                **options,
                **tile.options(),
            )
        if dmask is not None and dmask.numel():
            tile = plan.tile("mask")
            run_kernel(
                mask_kernel,
                mask_grid(dmask, shape, tile),
                *inputs,
                strided(dmask, call),
                asked,
                shape,
                **summed_axes(dmask),
                **options,
                **tile.options(),
            )


def launch_delta(
    output: torch.Tensor,
    grad: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    grad_lse: torch.Tensor | None,
    zeros: torch.Tensor | None,
    call: Call,
) -> torch.Tensor:
    """Pivot, inverse and delta (3, B, H, L) float32, as the backward kernels take them (`delta_kernel`).

    Args:
        output, grad: (B, H, L, Ev), any strides. row_max, row_sum: (B, H, L) float32, contiguous, what the forward
            wrote. grad_lse: (B, H, L) float32, the gradient of the log-sum-exp. zeros: (B, H, L, Ev) float32,
            contiguous, set to 0.
    """
    batch, n_heads, n_rows, ev = output.shape
    found = row_max.new_empty((3, *row_max.shape))
    pivot, inverse, delta = found.unbind()
    if row_max.numel():
        block = block_of(ev)
        rows = max(1, min(16, DELTA_ENTRIES // block))
        with launch_on(output.device):
            run_kernel(
                delta_kernel,
                (cdiv(n_rows, rows) * batch * n_heads,),  # rows fastest, then heads, batch
                Strided(output, *output.stride()),
                Strided(grad, *grad.stride()),
                row_max,
                row_sum,
                grad_lse if grad_lse is None else strided(grad_lse.unsqueeze(3), Call()),
                zeros,
                Statistics(pivot, inverse, delta, 0, 0),
                n_heads,
                n_rows,
                EXACT=is_exact(output.dtype, call),
                EV=ev,
                BLOCK_EV=block,
                BLOCK_Q=rows,
            )
    return found
