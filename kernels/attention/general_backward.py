"""Fused attention for any shape: the backward kernels.

With P = softmax(scale Q K^T + mask), D the dropout mask over 1 - p, and dO the gradient of the output,

    dV = (D P)^T dO        dP = D (dO V^T)        delta = rowsum(dO O) = rowsum(P dP)
    dS = P (dP - delta)    dQ = scale dS K        dK = scale dS^T Q

(FlashAttention-2, Dao 2023, section 3.1). With a soft cap, dS is times 1 - tanh^2 for dQ and dK. A gradient of the
log-sum-exp is taken off delta. P is recomputed from the saved statistics, tile by tile. Each output has one owner: dQ a
program per query tile, dK and dV a program per key tile, which walks the query heads of its group. So there are no
atomics, and repeated runs agree bit for bit. The mask's gradient: mask_gradient.py.

Heads wider than a tile (LOOP > 0): a program makes one chunk of columns and computes scores and dP over all anew.

Work of one head: 14 L S E flops for dQ, dK and dV (7 products; half when causal, E = Ev). Bytes: Q, K, V, O, dO read
and dQ, dK, dV written once, and 12 a row for statistics and delta.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.choice import is_wide
from kernels.attention.general import (
    batch_strides, flags, head_stride, heads_in_turn, lengths, mask_kind, mask_strides, numbers, pointers,
    tile_arguments,
)  # fmt: skip
from kernels.attention.mask_gradient import mask_grid, mask_kernel, summed_axes
from kernels.attention.pieces import (
    LOG2_E, NO_BAND, NO_MASK, batch_bounds, bend, cap_slope, dot, find_work, kept, key_range, load_rows,
    load_statistics, product_of_rows, query_range, restrict, store_rows, zero_nonfinite,
)  # fmt: skip
from kernels.attention.rules import Extras, Rules
from kernels.attention.tiles import block_of, choose_tile, column_blocks
from kernels.launch import cdiv, launch_on


DELTA_ENTRIES = 4096  # of a tile of the delta kernel


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr,
    stride_ob, stride_oh, stride_ol, stride_oe,
    stride_gb, stride_gh, stride_gl, stride_ge,
    n_heads, L,
    EV: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta_ptr (B, n_heads, L): float32 row sums of out_ptr times grad_ptr, both (B, n_heads, L, EV)."""
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
    tl.store(delta_ptr + head.to(tl.int64) * L + offs_q, delta, mask=offs_q < L)


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, query_starts_ptr, key_starts_ptr,
    row_max_ptr, row_sum_ptr, delta_ptr, grad_ptr, dq_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_sb, stride_sh, stride_ab,
    stride_dqb, stride_dqh, stride_dql, stride_dqe,
    n_heads, group, L, S, left, right, scale, softcap, dropout_p, keep_scale, section, dq_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
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
        slope = tl.load(slopes_ptr + b * stride_ab + h) * LOG2_E
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if LOOP == 0:
        q = load_rows(q_ptr, start_q, n_queries, stride_ql, stride_qe, 0, BLOCK_Q, E, BLOCK_E, WIDE)
        grad = load_rows(grad_ptr, start_q, n_queries, stride_gl, stride_ge, 0, BLOCK_Q, EV, BLOCK_EV, WIDE)
    stats = b * stride_sb + h * stride_sh + first_q
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    pivot, inverse_sum, delta = load_statistics(
        row_max_ptr + stats, row_sum_ptr + stats, delta_ptr + stats, offs_q, n_queries
    )
    dq = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)

    begin, end, open_end = key_range(start_q, n_keys, offset, left, right, BLOCK_Q, BLOCK_K, BAND)
    if MASK != NO_MASK:
        open_end = begin
    for CHECKED in tl.static_range(2):
        for start_k in range(open_end if CHECKED else begin, end if CHECKED else open_end, BLOCK_K):
            k = load_rows(k_ptr, start_k, n_keys, stride_ks, stride_ke, start_e, BLOCK_K, E, BLOCK_E, WIDE)
            if LOOP == 0:
                v = load_rows(v_ptr, start_k, n_keys, stride_vs, stride_ve, 0, BLOCK_K, EV, BLOCK_EV, WIDE)
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
            scores = bend(scores * scale, start_q, start_k, di, dj, offset, softcap, slope, HAS_SOFTCAP, False)
            if HAS_SOFTCAP:
                slope_of_cap = cap_slope(scores, softcap)
            scores = bend(scores, start_q, start_k, di, dj, offset, softcap, slope, False, HAS_ALIBI)
            if CHECKED:
                scores = restrict(
                    scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right,
                    mask_ptr, stride_ml, stride_ms, BAND, MASK, WIDE,
                )  # fmt: skip
            weights = tl.exp2(scores - pivot[:, None]) * inverse_sum[:, None]
            if HAS_DROPOUT:
                dp = tl.where(kept(seed, start_q + di, start_k + dj, head, dropout_p), dp * keep_scale, 0.0)
            ds = weights * (dp - delta[:, None])
            if HAS_SOFTCAP:
                ds *= slope_of_cap
            if CHECKED:
                ds = tl.where(scores == float("-inf"), 0.0, ds)  # dp is NaN where a forbidden value is
            if CHECKED and (BAND != NO_BAND or MASK != NO_MASK):
                k = zero_nonfinite(k)  # as is a forbidden key; an allowed one has made ds NaN already
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)

    dq_ptr += b * stride_dqb + h * stride_dqh + first_q * stride_dql
    store_rows(dq_ptr, dq * dq_scale, start_q, n_queries, stride_dql, stride_dqe, start_e, BLOCK_Q, E, BLOCK_E)


@triton.jit
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, query_starts_ptr, key_starts_ptr,
    row_max_ptr, row_sum_ptr, delta_ptr, grad_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_sb, stride_sh, stride_ab,
    stride_dkb, stride_dkh, stride_dks, stride_dke,
    stride_dvb, stride_dvh, stride_dvs, stride_dve,
    n_heads, group, L, S, left, right, scale, softcap, dropout_p, keep_scale, section, dk_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
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

    # Queries [begin, open_begin) need a look, queries [open_begin, end) may attend to every key of the tile. Keys past
    # the end need none: their rows of dK and dV are zeroed or not stored.
    begin, open_begin, end = query_range(start_k, n_queries, n_keys, offset, left, right, BLOCK_Q, BLOCK_K, BAND)
    if MASK != NO_MASK:
        open_begin = end
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
            slope = tl.load(slopes_ptr + b * stride_ab + h) * LOG2_E
        for CHECKED in tl.static_range(2):
            for start_q in range(begin if CHECKED else open_begin, open_begin if CHECKED else end, BLOCK_Q):
                offs_q = start_q + tl.arange(0, BLOCK_Q)
                q = load_rows(q_head, start_q, n_queries, stride_ql, stride_qe, start_col, BLOCK_Q, E, BLOCK_E, WIDE)
                grad = load_rows(
                    grad_head, start_q, n_queries, stride_gl, stride_ge, start_col, BLOCK_Q, EV, BLOCK_EV, WIDE
                )
                pivot, inverse_sum, delta = load_statistics(
                    row_max_ptr + stats, row_sum_ptr + stats, delta_ptr + stats, offs_q, n_queries
                )
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
                scores = bend(scores * scale, start_q, start_k, di, dj, offset, softcap, slope, HAS_SOFTCAP, False)
                if HAS_SOFTCAP:
                    slope_of_cap = cap_slope(scores, softcap)
                scores = bend(scores, start_q, start_k, di, dj, offset, softcap, slope, False, HAS_ALIBI)
                if CHECKED:
                    scores = restrict(
                        scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right,
                        mask_head, stride_ml, stride_ms, BAND, MASK, WIDE,
                    )  # fmt: skip
                weights = tl.exp2(scores - pivot[None, :]) * inverse_sum[None, :]
                if HAS_DROPOUT:
                    keep = kept(seed, start_q + di, start_k + dj, head.to(tl.int32), dropout_p)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                    dropped = tl.where(keep, weights, 0.0)
                else:
                    dropped = weights
                dv = dot(dropped.to(grad.dtype), grad, dv, PRECISION)
                ds = weights * (dp - delta[None, :])
                if HAS_SOFTCAP:
                    ds *= slope_of_cap
                if CHECKED:
                    ds = tl.where(scores == float("-inf"), 0.0, ds)
                dk = dot(ds.to(q.dtype), q, dk, PRECISION)

    dk *= dk_scale
    if HAS_DROPOUT:
        dv *= keep_scale
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
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
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
        row_max, row_sum: what the forward wrote. delta: (B, Hq, L) float32, see `launch_delta`.
        dq, dk, dv, dmask: gradients to write, any strides, shaped as their tensors; None where not wanted. dk and dv
            come together.
    """
    n_heads, n_kv_heads = query.shape[1], value.shape[1]
    batch, n_queries, n_keys = lengths(query, key, extras, rules)
    if query.numel() == 0:  # no query asks: keys, values and mask get nothing
        for unasked in (dk, dv, dmask):
            if unasked is not None:
                unasked.zero_()
        return
    strides = (
        *(stride for x in (query, key, value) for stride in batch_strides(x, extras)),
        *mask_strides(extras.attn_mask), *batch_strides(grad, extras), *batch_strides(row_max, extras)[:2],
        head_stride(extras.alibi_slopes),
    )  # fmt: skip
    about = tile_arguments(query, value, seed, n_queries)
    wide = is_wide(query, key, value, extras.attn_mask, grad)
    sizes = column_blocks(query.shape[-1], value.shape[-1])
    options = {**sizes, **flags(query, seed, extras, rules, wide)}
    group = n_heads // max(n_kv_heads, 1)
    inputs = (query, key, value, *pointers(seed, extras), row_max, row_sum, delta, grad)
    shape = (n_heads, group, n_queries, n_keys, *numbers(rules))
    width = (query.shape[-1] + value.shape[-1]) * query.itemsize  # bytes of a row of both
    with launch_on(query.device):
        if dq is not None and dq.numel():
            tile = choose_tile("query", *about)
            chunks = cdiv(query.shape[-1], sizes["BLOCK_E"])
            query_kernel[(cdiv(n_queries, tile.block_q) * chunks * batch * n_heads,)](
                *inputs, dq, *strides, *batch_strides(dq, extras), *shape,
                chunks * heads_in_turn(group, n_keys * width, rules, query.device), rules.scale,
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


def launch_delta(output: torch.Tensor, grad: torch.Tensor, delta: torch.Tensor) -> None:
    """Write delta (B, H, L), the float32 row sums of output times grad, both (B, H, L, Ev) of any strides."""
    batch, n_heads, n_rows, ev = output.shape
    if delta.numel() == 0:
        return
    block = block_of(ev)
    rows = max(1, min(16, DELTA_ENTRIES // block))
    with launch_on(output.device):
        delta_kernel[(cdiv(n_rows, rows) * batch * n_heads,)](  # rows fastest, then heads, batch
            output, grad, delta, *output.stride(), *grad.stride(), n_heads, n_rows,
            EV=ev, BLOCK_EV=block, BLOCK_Q=rows,
        )  # fmt: skip
