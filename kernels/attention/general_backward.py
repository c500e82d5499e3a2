"""Fused attention for any shape: the backward kernels.

With P = softmax(scale Q K^T + mask), D the dropout mask over 1 - p, and dO the gradient of the output,

    dV = (D P)^T dO        dP = D (dO V^T)        delta = rowsum(dO O) = rowsum(P dP)
    dS = P (dP - delta)    dQ = scale dS K        dK = scale dS^T Q

(FlashAttention-2, Dao 2023, section 3.1). With a soft cap, dS is times 1 - tanh^2 for dQ and dK. A gradient of the
log-sum-exp is taken off delta. P is recomputed tile by tile, from a pivot a row: its log-sum-exp in base 2, or, if
EXACT (pieces.py), its largest score in natural units, and beside it 1 over its sum; the delta kernel makes them of the
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

from kernels.attention.choice import is_wide
from kernels.attention.general import (
    batch_strides, flags, head_stride, heads_in_turn, is_exact, lengths, mask_kind, mask_strides, numbers, pointers,
    positive_scale, tile_arguments,
)  # fmt: skip
from kernels.attention.mask_gradient import mask_grid, mask_kernel, summed_axes
from kernels.attention.pieces import (
    CARE, LOG2_E, NO_BAND, NO_MASK, OPEN, batch_bounds, bend, cap_slope, dot, find_work, is_spoilt,
    key_range, load_rows, load_statistics, open_to_all, powers, product_of_rows, query_range, restrict, start_of_tile,
    store_rows, tile_dropout_factors, tiles_of_pass, zero_nonfinite,
)  # fmt: skip
from kernels.attention.rules import Extras, Rules
from kernels.attention.tiles import block_of, choose_tile, column_blocks
from kernels.launch import cdiv, launch_on


DELTA_ENTRIES = 4096  # of a tile of the delta kernel


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, row_max_ptr, row_sum_ptr, grad_lse_ptr, zeros_ptr, pivot_ptr, inverse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_ol, stride_oe,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_lb, stride_lh, stride_ll,
    n_heads, L,
    EV: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_Q: tl.constexpr, EXACT: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """What the other kernels ask of a row, (B, n_heads, L) float32, so that none of them computes it in a loop.

    delta_ptr: row sums of out_ptr times grad_ptr, both (B, n_heads, L, EV), less grad_lse_ptr (B, n_heads, L), the
    gradient of the log-sum-exp. pivot_ptr, inverse_ptr: see the top of this page; a row that may attend to nothing has
    the pivot inf, so that its weights are 0. row_max_ptr, row_sum_ptr: what the forward wrote. zeros_ptr (B, n_heads,
    L, EV): float32, where another kernel will add, set to 0.
    """
    n_tiles = tl.cdiv(L, BLOCK_Q)
    pid = tl.program_id(0)
    head = pid // n_tiles
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    start_q = (pid % n_tiles) * BLOCK_Q
    out = load_rows(
        out_ptr + b * stride_ob + h * stride_oh, start_q, L, stride_ol, stride_oe, 0, BLOCK_Q, EV, BLOCK_EV, True
    )
    grad = load_rows(
        grad_ptr + b * stride_gb + h * stride_gh, start_q, L, stride_gl, stride_ge, 0, BLOCK_Q, EV, BLOCK_EV, True
    )
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    inside = offs_q < L
    if HAS_LSE:
        lse_ptrs = grad_lse_ptr + b * stride_lb + h * stride_lh + offs_q.to(tl.int64) * stride_ll
        delta -= tl.load(lse_ptrs, mask=inside, other=0.0)
    row = head.to(tl.int64) * L + offs_q
    tl.store(delta_ptr + row, delta, mask=inside)
    if HAS_ZEROS:
        zeros = tl.zeros((BLOCK_Q, BLOCK_EV), tl.float32)
        store_rows(zeros_ptr + head.to(tl.int64) * L * EV, zeros, start_q, L, EV, 1, 0, BLOCK_Q, EV, BLOCK_EV)
    row_max = tl.load(row_max_ptr + row, mask=inside, other=0.0)
    row_sum = tl.load(row_sum_ptr + row, mask=inside, other=1.0)
    empty = (row_sum == 0.0) | (row_max == float("-inf"))  # the latter with a sink of -inf
    if EXACT:
        tl.store(inverse_ptr + row, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum)), mask=inside)
        pivot = row_max
    else:
        pivot = row_max * LOG2_E + tl.log2(tl.where(empty, 1.0, row_sum))
    tl.store(pivot_ptr + row, tl.where(empty, float("inf"), pivot), mask=inside)


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, query_starts_ptr, key_starts_ptr,
    pivot_ptr, inverse_ptr, delta_ptr, grad_ptr, dq_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_sb, stride_sh, stride_ab,
    stride_dqb, stride_dqh, stride_dql, stride_dqe,
    n_heads, group, L, S, left, right, scale, softcap, drop_below, keep_scale, section, dq_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_Q queries of one head. grad_ptr (B, n_heads, L, EV): dO. The rest as in forward_kernel."""
    chunks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    n_tiles = tl.cdiv(L, BLOCK_Q)
    head, tile = find_work(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, section)
    start_e = head % chunks * BLOCK_E
    head //= chunks
    if BAND != NO_BAND:
        tile = n_tiles - 1 - tile
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    h_kv = h // group
    start_q = tile * BLOCK_Q
    first_q, first_k, n_queries, n_keys, offset = batch_bounds(
        b, L, S, key_lengths_ptr, query_starts_ptr, key_starts_ptr, HAS_LENGTHS, PACKED, BOTTOM_RIGHT
    )
    if PACKED:
        if start_q >= n_queries:
            return
    q_ptr += b * stride_qb + h * stride_qh + first_q * stride_ql
    k_ptr += b * stride_kb + h_kv * stride_kh + first_k * stride_ks
    v_ptr += b * stride_vb + h_kv * stride_vh + first_k * stride_vs
    grad_ptr += b * stride_gb + h * stride_gh + first_q * stride_gl
    if MASK != NO_MASK:
        mask_ptr += b * stride_mb + h * stride_mh
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + b * stride_ab + h)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    IS_PRODUCT: tl.constexpr = not (HAS_SOFTCAP or HAS_ALIBI or EXACT)
    factor = scale * LOG2_E if IS_PRODUCT else LOG2_E

    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if LOOP == 0:
        q = load_rows(q_ptr, start_q, n_queries, stride_ql, stride_qe, 0, BLOCK_Q, E, BLOCK_E, WIDE)
        grad = load_rows(grad_ptr, start_q, n_queries, stride_gl, stride_ge, 0, BLOCK_Q, EV, BLOCK_EV, WIDE)
    stats = b * stride_sb + h * stride_sh + first_q
    pivot, inverse, delta = load_statistics(
        pivot_ptr + stats, inverse_ptr + stats, delta_ptr + stats, start_q, n_queries, BLOCK_Q, EXACT, False
    )
    dq = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)

    begin, end, open_begin, open_end = key_range(start_q, n_keys, offset, left, right, BLOCK_Q, BLOCK_K, BAND)
    open_begin, open_end = open_to_all(begin, open_begin, open_end, start_q + BLOCK_Q <= n_queries, MASK)
    for PASS in tl.static_range(3 if BAND != NO_BAND or MASK != NO_MASK else 2):
        again = False
        if PASS == CARE:
            again = is_spoilt(dq)
            dq = tl.where(again, 0.0, dq)
        first, last = tiles_of_pass(begin, end, open_begin, open_end, again, PASS)
        for place in range(first, last, BLOCK_K):
            start_k = start_of_tile(place, begin, open_begin, open_end, PASS)
            k = load_rows(
                k_ptr, start_k, n_keys, stride_ks, stride_ke, start_e, BLOCK_K, E, BLOCK_E, WIDE, PASS == OPEN
            )
            if LOOP == 0:
                v = load_rows(
                    v_ptr, start_k, n_keys, stride_vs, stride_ve, 0, BLOCK_K, EV, BLOCK_EV, WIDE, PASS == OPEN
                )
                scores = dot(q, tl.trans(k), None, PRECISION)
                dp = dot(grad, tl.trans(v), None, PRECISION)
            else:
                scores = product_of_rows(
                    q_ptr, start_q, n_queries, stride_ql, stride_qe, k_ptr, start_k, n_keys, stride_ks, stride_ke,
                    BLOCK_Q, BLOCK_K, E, LOOP, PRECISION, WIDE,
                )  # fmt: skip
                dp = product_of_rows(
                    grad_ptr, start_q, n_queries, stride_gl, stride_ge, v_ptr, start_k, n_keys, stride_vs, stride_ve,
                    BLOCK_Q, BLOCK_K, EV, LOOP, PRECISION, WIDE,
                )  # fmt: skip
            if not IS_PRODUCT:
                scores = bend(scores * scale, start_q, start_k, di, dj, offset, softcap, slope, HAS_SOFTCAP, False)
            if HAS_SOFTCAP:
                slope_of_cap = cap_slope(scores, softcap)
            scores = bend(scores, start_q, start_k, di, dj, offset, softcap, slope, False, HAS_ALIBI)
            scores = restrict(
                scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right,
                mask_ptr, stride_ml, stride_ms, BAND, MASK, WIDE, PASS,
            )  # fmt: skip
            weights = powers(scores, pivot[:, None], factor, EXACT)
            if EXACT:
                weights *= inverse[:, None]
            if HAS_DROPOUT:
                dp *= tile_dropout_factors(
                    seed, start_q, start_k, head, drop_below, keep_scale, BLOCK_Q, BLOCK_K, True
                )
            ds = weights * (dp - delta[:, None])
            if HAS_SOFTCAP:
                ds *= slope_of_cap
            if PASS == CARE:
                ds = tl.where(scores == float("-inf"), 0.0, ds)  # dp is NaN where a forbidden value is
                k = zero_nonfinite(k)  # as is a forbidden key; an allowed one has made ds NaN already
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)

    dq_ptr += b * stride_dqb + h * stride_dqh + first_q * stride_dql
    store_rows(dq_ptr, dq * dq_scale, start_q, n_queries, stride_dql, stride_dqe, start_e, BLOCK_Q, E, BLOCK_E)


@triton.jit
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, query_starts_ptr, key_starts_ptr,
    pivot_ptr, inverse_ptr, delta_ptr, grad_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_sb, stride_sh, stride_ab,
    stride_dkb, stride_dkh, stride_dks, stride_dke,
    stride_dvb, stride_dvh, stride_dvs, stride_dve,
    n_heads, group, L, S, left, right, scale, softcap, drop_below, keep_scale, section, dk_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_K keys of one key head, summed over the `group` query heads that share it.

    Works on transposed scores (BLOCK_K, BLOCK_Q): so the weights are the left operand of both products as they are.
    """
    chunks: tl.constexpr = (max(E, EV) + BLOCK_E - 1) // BLOCK_E if LOOP else 1
    n_tiles = tl.cdiv(S, BLOCK_K)
    # The first key tiles see the most queries: the longest come first as they are.
    head_kv, tile = find_work(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, section)
    start_col = head_kv % chunks * BLOCK_E
    head_kv //= chunks
    n_kv_heads = n_heads // group
    b = (head_kv // n_kv_heads).to(tl.int64)
    h_kv = (head_kv % n_kv_heads).to(tl.int64)
    start_k = tile * BLOCK_K
    first_q, first_k, n_queries, n_keys, offset = batch_bounds(
        b, L, S, key_lengths_ptr, query_starts_ptr, key_starts_ptr, HAS_LENGTHS, PACKED, BOTTOM_RIGHT
    )
    n_rows = S
    if PACKED:
        n_rows = (tl.load(key_starts_ptr + b + 1) - first_k).to(tl.int32)
        if start_k >= n_rows:
            return
    k_ptr += b * stride_kb + h_kv * stride_kh + first_k * stride_ks
    v_ptr += b * stride_vb + h_kv * stride_vh + first_k * stride_vs
    di, dj = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_K)[:, None]
    if LOOP == 0:
        k = load_rows(k_ptr, start_k, n_keys, stride_ks, stride_ke, 0, BLOCK_K, E, BLOCK_E, WIDE)
        v = load_rows(v_ptr, start_k, n_keys, stride_vs, stride_ve, 0, BLOCK_K, EV, BLOCK_EV, WIDE)
    dk = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_EV), tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    IS_PRODUCT: tl.constexpr = not (HAS_SOFTCAP or HAS_ALIBI or EXACT)
    factor = scale * LOG2_E if IS_PRODUCT else LOG2_E

    # Keys past the end need no look: their rows of dK and dV are zeroed or not stored.
    begin, end, open_begin, open_end = query_range(
        start_k, n_queries, n_keys, offset, left, right, BLOCK_Q, BLOCK_K, BAND
    )
    open_begin, open_end = open_to_all(begin, open_begin, open_end, start_k + BLOCK_K <= n_keys, MASK)
    for PASS in tl.static_range(3 if BAND != NO_BAND or MASK != NO_MASK else 2):
        again = False
        if PASS == CARE:
            again = is_spoilt(dk)
            dk, dv = tl.where(again, 0.0, dk), tl.where(again, 0.0, dv)
        first, last = tiles_of_pass(begin, end, open_begin, open_end, again, PASS)
        for member in range(0, group):
            h = h_kv * group + member
            head = b * n_heads + h
            stats = b * stride_sb + h * stride_sh + first_q
            q_head = q_ptr + b * stride_qb + h * stride_qh + first_q * stride_ql
            grad_head = grad_ptr + b * stride_gb + h * stride_gh + first_q * stride_gl
            mask_head = mask_ptr
            if MASK != NO_MASK:
                mask_head = mask_ptr + b * stride_mb + h * stride_mh
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(slopes_ptr + b * stride_ab + h)
            for place in range(first, last, BLOCK_Q):
                start_q = start_of_tile(place, begin, open_begin, open_end, PASS)
                q = load_rows(
                    q_head, start_q, n_queries, stride_ql, stride_qe, start_col, BLOCK_Q, E, BLOCK_E, WIDE,
                    PASS == OPEN,
                )  # fmt: skip
                grad = load_rows(
                    grad_head, start_q, n_queries, stride_gl, stride_ge, start_col, BLOCK_Q, EV, BLOCK_EV, WIDE,
                    PASS == OPEN,
                )  # fmt: skip
                pivot, inverse, delta = load_statistics(
                    pivot_ptr + stats, inverse_ptr + stats, delta_ptr + stats, start_q, n_queries,
                    BLOCK_Q, EXACT, PASS == OPEN,
                )  # fmt: skip
                if LOOP == 0:
                    scores = dot(k, tl.trans(q), None, PRECISION)
                    dp = dot(v, tl.trans(grad), None, PRECISION)
                else:
                    scores = product_of_rows(
                        k_ptr, start_k, n_keys, stride_ks, stride_ke, q_head, start_q, n_queries, stride_ql, stride_qe,
                        BLOCK_K, BLOCK_Q, E, LOOP, PRECISION, WIDE,
                    )  # fmt: skip
                    dp = product_of_rows(
                        v_ptr, start_k, n_keys, stride_vs, stride_ve, grad_head, start_q, n_queries,
                        stride_gl, stride_ge, BLOCK_K, BLOCK_Q, EV, LOOP, PRECISION, WIDE,
                    )  # fmt: skip
                if not IS_PRODUCT:
                    scores = bend(scores * scale, start_q, start_k, di, dj, offset, softcap, slope, HAS_SOFTCAP, False)
                if HAS_SOFTCAP:
                    slope_of_cap = cap_slope(scores, softcap)
                scores = bend(scores, start_q, start_k, di, dj, offset, softcap, slope, False, HAS_ALIBI)
                scores = restrict(
                    scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right,
                    mask_head, stride_ml, stride_ms, BAND, MASK, WIDE, PASS,
                )  # fmt: skip
                weights = powers(scores, pivot[None, :], factor, EXACT)
                if EXACT:
                    weights *= inverse[None, :]
                dropped = weights
                if HAS_DROPOUT:
                    factors = tile_dropout_factors(
                        seed, start_q, start_k, head.to(tl.int32), drop_below, keep_scale, BLOCK_K, BLOCK_Q, False
                    )
                    dp *= factors
                    dropped = weights * factors
                if PASS == CARE:  # a query that is not finite has no number for a weight, nor for those it has not
                    dropped = tl.where(scores == float("-inf"), 0.0, dropped)
                dv = dot(dropped.to(grad.dtype), grad, dv, PRECISION)
                ds = weights * (dp - delta[None, :])
                if HAS_SOFTCAP:
                    ds *= slope_of_cap
                if PASS == CARE:
                    ds = tl.where(scores == float("-inf"), 0.0, ds)
                dk = dot(ds.to(q.dtype), q, dk, PRECISION)

    dk *= dk_scale
    if HAS_LENGTHS:  # keys that are not in use
        used = dj < n_keys - start_k
        dk, dv = tl.where(used, dk, 0.0), tl.where(used, dv, 0.0)
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + first_k * stride_dks
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + first_k * stride_dvs
    store_rows(dk_ptr, dk, start_k, n_rows, stride_dks, stride_dke, start_col, BLOCK_K, E, BLOCK_E)
    store_rows(dv_ptr, dv, start_k, n_rows, stride_dvs, stride_dve, start_col, BLOCK_K, EV, BLOCK_EV)


def launch_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor | None,
    extras: Extras,
    rules: Rules,
    pivot: torch.Tensor,
    inverse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dmask: torch.Tensor | None,
) -> None:
    """Launch the backward kernels.

    Args:
        grad: (B, Hq, L, Ev), gradient of the output, any strides.
        query, key, value, seed, extras, rules: as given to the forward.
        pivot, inverse, delta: (B, Hq, L) float32, what `launch_delta` wrote.
        dq, dk, dv, dmask: gradients to write, any strides, shaped as their tensors; None where not wanted. dk and dv
            come together.
    """
    dq_scale = rules.scale
    query, rules = positive_scale(query, rules)
    n_heads, n_kv_heads = query.shape[1], value.shape[1]
    batch, n_queries, n_keys = lengths(query, key, extras, rules)
    if query.numel() == 0:  # no query asks: keys, values and mask get nothing
        for unasked in (dk, dv, dmask):
            if unasked is not None:
                unasked.zero_()
        return
    strides = (
        *(stride for x in (query, key, value) for stride in batch_strides(x, extras)),
        *mask_strides(extras.attn_mask), *batch_strides(grad, extras), *batch_strides(pivot, extras)[:2],
        head_stride(extras.alibi_slopes),
    )  # fmt: skip
    about = tile_arguments(query, value, seed, extras, rules, n_queries)
    wide = is_wide(query, key, value, extras.attn_mask, grad)
    sizes = column_blocks(query.shape[-1], value.shape[-1])
    options = {**sizes, **flags(query, seed, extras, rules, wide)}
    group = n_heads // max(n_kv_heads, 1)
    inputs = (query, key, value, *pointers(seed, extras), pivot, inverse, delta, grad)
    shape = (n_heads, group, n_queries, n_keys, *numbers(rules))
    width = (query.shape[-1] + value.shape[-1]) * query.itemsize  # bytes of a row of both
    with launch_on(query.device):
        if dq is not None and dq.numel():
            tile = choose_tile("query", *about)
            chunks = cdiv(query.shape[-1], sizes["BLOCK_E"])
            query_kernel[(cdiv(n_queries, tile.block_q) * chunks * batch * n_heads,)](
                *inputs, dq, *strides, *batch_strides(dq, extras), *shape,
                chunks * heads_in_turn(group, n_keys * width, rules, query.device), dq_scale,
                MASK=mask_kind(extras.attn_mask), **options, **tile.options(),
            )  # fmt: skip
        if dk is not None and dv is not None and dk.numel():
            tile = choose_tile("key_value", *about)
            chunks = cdiv(max(query.shape[-1], value.shape[-1]), sizes["BLOCK_E"]) if sizes["LOOP"] else 1
            key_value_kernel[(cdiv(n_keys, tile.block_k) * chunks * batch * n_kv_heads,)](
                *inputs, dk, dv, *strides, *batch_strides(dk, extras), *batch_strides(dv, extras), *shape,
                chunks * heads_in_turn(1, group * n_queries * width, rules, query.device), rules.scale,
                MASK=mask_kind(extras.attn_mask), **options, **tile.options(),
            )  # fmt: skip
        if dmask is not None and dmask.numel():
            tile = choose_tile("mask", *about)
            mask_kernel[mask_grid(dmask, n_queries, n_keys, tile)](
                *inputs, dmask, *strides, *dmask.stride(), batch, *shape,
                **summed_axes(dmask), **options, **tile.options(),
            )  # fmt: skip


def launch_delta(
    output: torch.Tensor, grad: torch.Tensor, row_max: torch.Tensor, row_sum: torch.Tensor,
    grad_lse: torch.Tensor | None, zeros: torch.Tensor | None, extras: Extras,
) -> torch.Tensor:  # fmt: skip
    """Pivot, inverse and delta (3, B, H, L) float32, as the backward kernels take them (`delta_kernel`).

    Args:
        output, grad: (B, H, L, Ev), any strides. row_max, row_sum: (B, H, L) float32, contiguous, what the forward
            wrote. grad_lse: (B, H, L) float32, the gradient of the log-sum-exp. zeros: (B, H, L, Ev) float32,
            contiguous, set to 0.
    """
    batch, n_heads, n_rows, ev = output.shape
    found = row_max.new_empty((3, *row_max.shape))
    if row_max.numel():
        block = block_of(ev)
        rows = max(1, min(16, DELTA_ENTRIES // block))
        with launch_on(output.device):
            delta_kernel[(cdiv(n_rows, rows) * batch * n_heads,)](  # rows fastest, then heads, batch
                output, grad, row_max, row_sum, grad_lse, zeros, *found, *output.stride(), *grad.stride(),
                *((0, 0, 0) if grad_lse is None else grad_lse.stride()), n_heads, n_rows,
                EV=ev, BLOCK_EV=block, BLOCK_Q=rows, EXACT=is_exact(output.dtype, extras), HAS_LSE=grad_lse is not None,
                HAS_ZEROS=zeros is not None,
            )  # fmt: skip
    return found
