"""Fused attention for any shape: the backward kernels.

With P = softmax(scale Q K^T + mask), D the dropout mask over 1 - p, and dO the gradient of the output,

    dV = (D P)^T dO        dP = D (dO V^T)        delta = rowsum(dO O) = rowsum(P dP)
    dS = P (dP - delta)    dQ = scale dS K        dK = scale dS^T Q

(FlashAttention-2, Dao 2023, section 3.1). P is recomputed from the saved statistics, tile by tile. Each output has one
owner: dQ a program per query tile, dK and dV a program per key tile, which walks the query heads of its group. So there
are no atomics, and repeated runs agree bit for bit. The mask's gradient: mask_gradient.py.

Work of one head: 14 L S E flops for dQ, dK and dV (7 products; half when causal, E = Ev). Bytes: Q, K, V, O, dO read
and dQ, dK, dV written once, and 12 a row for statistics and delta.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.general import (
    LOG2_E,
    NO_MASK,
    dot,
    dot_precision,
    is_wide,
    keep_scale,
    kept,
    load_rows,
    load_statistics,
    mask_arguments,
    mask_kind,
    restrict,
    store_rows,
    tile_arguments,
    tile_strides,
    zero_nonfinite,
)
from kernels.attention.mask_gradient import mask_grid, mask_kernel, summed_axes
from kernels.attention.tiles import block_of, choose_tile
from kernels.launch import launch_on

DELTA_ROWS = 16  # rows a program of the delta kernel


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
        out_ptr + b * stride_ob + h * stride_oh, start_q, L, stride_ol, stride_oe, BLOCK_Q, EV, BLOCK_EV, True
    )
    grad = load_rows(
        grad_ptr + b * stride_gb + h * stride_gh, start_q, L, stride_gl, stride_ge, BLOCK_Q, EV, BLOCK_EV, True
    )
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + head.to(tl.int64) * L + offs_q, delta, mask=offs_q < L)


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, row_max_ptr, row_sum_ptr, delta_ptr, grad_ptr, dq_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_dqb, stride_dqh, stride_dql, stride_dqe,
    n_heads, group, L, S, scale, dq_scale, dropout_p, keep_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_Q queries of one head. grad_ptr (B, n_heads, L, EV): dO. The rest as in forward_kernel."""
    n_tiles = tl.cdiv(L, BLOCK_Q)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    head = pid // n_tiles
    if IS_CAUSAL:
        tile = n_tiles - 1 - tile
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    h_kv = h // group
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    if MASK != NO_MASK:
        mask_ptr += b * stride_mb + h * stride_mh

    start_q = tile * BLOCK_Q
    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, start_q, L, stride_ql, stride_qe, BLOCK_Q, E, BLOCK_E, WIDE)
    grad = load_rows(
        grad_ptr + b * stride_gb + h * stride_gh, start_q, L, stride_gl, stride_ge, BLOCK_Q, EV, BLOCK_EV, WIDE
    )
    stats = head.to(tl.int64) * L
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    pivot, inverse_sum, delta = load_statistics(row_max_ptr + stats, row_sum_ptr + stats, delta_ptr + stats, offs_q, L)
    dq = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    end = tl.minimum(S, (tile + 1) * BLOCK_Q) if IS_CAUSAL else S
    open_end = (tl.minimum(S, tile * BLOCK_Q + 1) if IS_CAUSAL else S) // BLOCK_K * BLOCK_K
    if MASK != NO_MASK:
        open_end = 0
    for CHECKED in tl.static_range(2):
        for start_k in range(open_end if CHECKED else 0, end if CHECKED else open_end, BLOCK_K):
            k = load_rows(k_ptr, start_k, S, stride_ks, stride_ke, BLOCK_K, E, BLOCK_E, WIDE)
            v = load_rows(v_ptr, start_k, S, stride_vs, stride_ve, BLOCK_K, EV, BLOCK_EV, WIDE)
            scores = dot(q, tl.trans(k), None, PRECISION) * scale
            if CHECKED:
                scores = restrict(
                    scores, start_q, start_k, di, dj, L, S, mask_ptr, stride_ml, stride_ms, IS_CAUSAL, MASK, WIDE
                )
            weights = tl.exp2(scores - pivot[:, None]) * inverse_sum[:, None]
            dp = dot(grad, tl.trans(v), None, PRECISION)
            if HAS_DROPOUT:
                dp = tl.where(kept(seed, start_q + di, start_k + dj, head, dropout_p), dp * keep_scale, 0.0)
            ds = weights * (dp - delta[:, None])
            if CHECKED:
                ds = tl.where(scores == float("-inf"), 0.0, ds)  # dp is NaN where a forbidden value is
            if CHECKED and (IS_CAUSAL or MASK != NO_MASK):
                k = zero_nonfinite(k)  # as is a forbidden key; an allowed one has made ds NaN already
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)

    store_rows(
        dq_ptr + b * stride_dqb + h * stride_dqh, dq * dq_scale, start_q, L, stride_dql, stride_dqe, BLOCK_Q, E, BLOCK_E
    )


@triton.jit
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, row_max_ptr, row_sum_ptr, delta_ptr, grad_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_dkb, stride_dkh, stride_dks, stride_dke,
    stride_dvb, stride_dvh, stride_dvs, stride_dve,
    n_heads, group, L, S, scale, dk_scale, dropout_p, keep_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_K keys of one key head, summed over the `group` query heads that share it.

    Works on transposed scores (BLOCK_K, BLOCK_Q): so the weights are the left operand of both products as they are.
    """
    n_tiles = tl.cdiv(S, BLOCK_K)
    pid = tl.program_id(0)
    tile = pid % n_tiles  # the first key tiles see the most queries: already the longest first
    n_kv_heads = n_heads // group
    b = (pid // n_tiles // n_kv_heads).to(tl.int64)
    h_kv = (pid // n_tiles % n_kv_heads).to(tl.int64)
    start_k = tile * BLOCK_K
    di, dj = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_K)[:, None]
    k = load_rows(k_ptr + b * stride_kb + h_kv * stride_kh, start_k, S, stride_ks, stride_ke, BLOCK_K, E, BLOCK_E, WIDE)
    v = load_rows(
        v_ptr + b * stride_vb + h_kv * stride_vh, start_k, S, stride_vs, stride_ve, BLOCK_K, EV, BLOCK_EV, WIDE
    )
    dk = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_EV), tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    # Queries [first, open_start) need a look, queries [open_start, L) may attend to every key of the tile. Keys beyond
    # S need none: their rows of dK and dV are not stored.
    first = tl.minimum(L, tile * BLOCK_K // BLOCK_Q * BLOCK_Q) if IS_CAUSAL else 0
    open_start = tl.minimum(L, tl.cdiv((tile + 1) * BLOCK_K - 1, BLOCK_Q) * BLOCK_Q) if IS_CAUSAL else 0
    if MASK != NO_MASK:
        open_start = L
    for member in range(0, group):
        h = h_kv * group + member
        head = b * n_heads + h
        stats = head * L
        q_head = q_ptr + b * stride_qb + h * stride_qh
        grad_head = grad_ptr + b * stride_gb + h * stride_gh
        mask_head = mask_ptr
        if MASK != NO_MASK:
            mask_head = mask_ptr + b * stride_mb + h * stride_mh
        for CHECKED in tl.static_range(2):
            for start_q in range(first if CHECKED else open_start, open_start if CHECKED else L, BLOCK_Q):
                offs_q = start_q + tl.arange(0, BLOCK_Q)
                q = load_rows(q_head, start_q, L, stride_ql, stride_qe, BLOCK_Q, E, BLOCK_E, WIDE)
                grad = load_rows(grad_head, start_q, L, stride_gl, stride_ge, BLOCK_Q, EV, BLOCK_EV, WIDE)
                pivot, inverse_sum, delta = load_statistics(
                    row_max_ptr + stats, row_sum_ptr + stats, delta_ptr + stats, offs_q, L
                )
                scores = dot(k, tl.trans(q), None, PRECISION) * scale
                if CHECKED:
                    scores = restrict(
                        scores, start_q, start_k, di, dj, L, S, mask_head, stride_ml, stride_ms, IS_CAUSAL, MASK, WIDE
                    )
                weights = tl.exp2(scores - pivot[None, :]) * inverse_sum[None, :]
                dp = dot(v, tl.trans(grad), None, PRECISION)
                if HAS_DROPOUT:
                    keep = kept(seed, start_q + di, start_k + dj, head.to(tl.int32), dropout_p)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                    dropped = tl.where(keep, weights, 0.0)
                else:
                    dropped = weights
                dv = dot(dropped.to(grad.dtype), grad, dv, PRECISION)
                ds = weights * (dp - delta[None, :])
                if CHECKED:
                    ds = tl.where(scores == float("-inf"), 0.0, ds)
                dk = dot(ds.to(q.dtype), q, dk, PRECISION)

    dk *= dk_scale
    if HAS_DROPOUT:
        dv *= keep_scale
    store_rows(dk_ptr + b * stride_dkb + h_kv * stride_dkh, dk, start_k, S, stride_dks, stride_dke, BLOCK_K, E, BLOCK_E)
    store_rows(
        dv_ptr + b * stride_dvb + h_kv * stride_dvh, dv, start_k, S, stride_dvs, stride_dve, BLOCK_K, EV, BLOCK_EV
    )


def launch_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dmask: torch.Tensor | None,
) -> None:
    """Launch the backward kernels.

    Args:
        grad: (B, Hq, L, Ev), gradient of the output, any strides.
        query, key, value, attn_mask, seed, dropout_p, is_causal, scale: as given to the forward.
        output, row_max, row_sum: what the forward wrote.
        dq, dk, dv, dmask: gradients to write, any strides, shaped as their tensors; None where not wanted. dk and dv
            come together.
    """
    batch, n_heads, n_queries, e = query.shape
    n_kv_heads, n_keys, ev = value.shape[1:]
    mask_ptr, *mask_strides = mask_arguments(attn_mask)
    strides = (*query.stride(), *key.stride(), *value.stride(), *mask_strides, *grad.stride())
    about = tile_arguments(query, value, seed)
    options = {
        "E": e, "EV": ev, "BLOCK_E": block_of(e), "BLOCK_EV": block_of(ev), "IS_CAUSAL": is_causal,
        "HAS_DROPOUT": seed is not None, "PRECISION": dot_precision(query.dtype),
        "WIDE": is_wide(*tile_strides(query, key, value, attn_mask, grad)),
    }  # fmt: skip
    if query.numel() == 0:  # no query asks: keys, values and mask get nothing
        for unasked in (dk, dv, dmask):
            if unasked is not None:
                unasked.zero_()
        return
    group = n_heads // max(n_kv_heads, 1)
    delta = torch.empty_like(row_max)
    inputs = (query, key, value, mask_ptr, seed, row_max, row_sum, delta, grad)
    numbers = (dropout_p, keep_scale(dropout_p))
    with launch_on(query.device):
        delta_kernel[(triton.cdiv(n_queries, DELTA_ROWS) * batch * n_heads,)](  # rows fastest, then heads, batch
            output, grad, delta, *output.stride(), *grad.stride(), n_heads, n_queries,
            EV=ev, BLOCK_EV=block_of(ev), BLOCK_Q=DELTA_ROWS,
        )  # fmt: skip
        if dq is not None and dq.numel():
            tile = choose_tile("query", *about)
            query_kernel[(triton.cdiv(n_queries, tile.block_q) * batch * n_heads,)](  # query tiles fastest
                *inputs, dq, *strides, *dq.stride(),
                n_heads, group, n_queries, n_keys, scale * LOG2_E.value, scale, *numbers,
                MASK=mask_kind(attn_mask), **options, **tile.options(),
            )  # fmt: skip
        if dk is not None and dv is not None and dk.numel():
            tile = choose_tile("key_value", *about)
            key_value_kernel[(triton.cdiv(n_keys, tile.block_k) * batch * n_kv_heads,)](  # key tiles fastest
                *inputs, dk, dv, *strides, *dk.stride(), *dv.stride(),
                n_heads, group, n_queries, n_keys, scale * LOG2_E.value, scale, *numbers,
                MASK=mask_kind(attn_mask), **options, **tile.options(),
            )  # fmt: skip
        if dmask is not None and dmask.numel():
            tile = choose_tile("mask", *about)
            mask_kernel[mask_grid(dmask, n_queries, n_keys, tile)](
                *inputs, dmask, *strides, *dmask.stride(),
                batch, n_heads, group, n_queries, n_keys, scale * LOG2_E.value, *numbers,
                **summed_axes(dmask), **options, **tile.options(),
            )  # fmt: skip
