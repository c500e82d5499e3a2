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
    CARE, FLOAT_MASK, batch_bounds, bend, dot, key_range, load_rows, load_statistics, powers, product_of_rows, restrict,
    tile_dropout_factors,
)  # fmt: skip
from kernels.attention.tiles import Tile
from kernels.launch import cdiv


@triton.jit
def mask_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, query_starts_ptr, key_starts_ptr,
    pivot_ptr, inverse_ptr, delta_ptr, grad_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_sb, stride_sh, stride_ab,
    stride_dmb, stride_dmh, stride_dml, stride_dms,
    n_batch, n_heads, group, L, S, left, right, scale, softcap, drop_below, keep_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_L: tl.constexpr, SUM_S: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the float mask: dS summed over the axes along which the mask was broadcast (SUM_*).

    dmask_ptr: as the mask, size 1 along the summed axes. A program that sums over an axis walks all of it.
    """
    pid = tl.program_id(0)
    n_tiles_q = 1 if SUM_L else tl.cdiv(L, BLOCK_Q)
    n_tiles_k = 1 if SUM_S else tl.cdiv(S, BLOCK_K)
    n_mask_heads = 1 if SUM_H else n_heads
    tile_k = pid % n_tiles_k
    tile_q = pid // n_tiles_k % n_tiles_q
    mask_h = pid // n_tiles_k // n_tiles_q % n_mask_heads
    mask_b = pid // n_tiles_k // n_tiles_q // n_mask_heads
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)

    n_walked_heads = n_heads if SUM_H else 1
    for walked in range(0, (n_batch if SUM_B else 1) * n_walked_heads):
        b = (mask_b + walked // n_walked_heads).to(tl.int64)
        h = (mask_h + walked % n_walked_heads).to(tl.int64)
        h_kv = h // group
        head = b * n_heads + h
        stats = b * stride_sb + h * stride_sh
        q_head = q_ptr + b * stride_qb + h * stride_qh
        k_head = k_ptr + b * stride_kb + h_kv * stride_kh
        v_head = v_ptr + b * stride_vb + h_kv * stride_vh
        grad_head = grad_ptr + b * stride_gb + h * stride_gh
        mask_head = mask_ptr + b * stride_mb + h * stride_mh
        first_q, first_k, n_queries, n_keys, offset = batch_bounds(
            b, L, S, key_lengths_ptr, query_starts_ptr, key_starts_ptr, HAS_LENGTHS, PACKED, BOTTOM_RIGHT
        )
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + b * stride_ab + h)
        for start_q in range(tile_q * BLOCK_Q, L if SUM_L else (tile_q + 1) * BLOCK_Q, BLOCK_Q):
            if LOOP == 0:
                q = load_rows(q_head, start_q, n_queries, stride_ql, stride_qe, 0, BLOCK_Q, E, BLOCK_E, WIDE)
                grad = load_rows(grad_head, start_q, n_queries, stride_gl, stride_ge, 0, BLOCK_Q, EV, BLOCK_EV, WIDE)
            pivot, inverse, delta = load_statistics(
                pivot_ptr + stats, inverse_ptr + stats, delta_ptr + stats, start_q, n_queries, BLOCK_Q, EXACT, False,
            )  # fmt: skip
            begin, end, _, _ = key_range(start_q, n_keys, offset, left, right, BLOCK_Q, BLOCK_K, BAND)
            if not SUM_S:
                begin = tl.maximum(begin, tile_k * BLOCK_K)
                end = tl.minimum(end, (tile_k + 1) * BLOCK_K)
            for start_k in range(begin, end, BLOCK_K):
                if LOOP == 0:
                    k = load_rows(k_head, start_k, n_keys, stride_ks, stride_ke, 0, BLOCK_K, E, BLOCK_E, WIDE)
                    v = load_rows(v_head, start_k, n_keys, stride_vs, stride_ve, 0, BLOCK_K, EV, BLOCK_EV, WIDE)
                    scores = dot(q, tl.trans(k), None, PRECISION)
                    dp = dot(grad, tl.trans(v), None, PRECISION)
                else:
                    scores = product_of_rows(
                        q_head, start_q, n_queries, stride_ql, stride_qe, k_head, start_k, n_keys, stride_ks, stride_ke,
                        BLOCK_Q, BLOCK_K, E, LOOP, PRECISION, WIDE,
                    )  # fmt: skip
                    dp = product_of_rows(
                        grad_head, start_q, n_queries, stride_gl, stride_ge, v_head, start_k, n_keys,
                        stride_vs, stride_ve, BLOCK_Q, BLOCK_K, EV, LOOP, PRECISION, WIDE,
                    )  # fmt: skip
                scores = bend(scores * scale, start_q, start_k, di, dj, offset, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
                scores = restrict(
                    scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right,
                    mask_head, stride_ml, stride_ms, BAND, FLOAT_MASK, WIDE, CARE,
                )  # fmt: skip
                weights = powers(scores, pivot[:, None], 1.0, EXACT) * inverse[:, None]
                if HAS_DROPOUT:
                    dp *= tile_dropout_factors(
                        seed, start_q, start_k, head.to(tl.int32), drop_below, keep_scale, BLOCK_Q, BLOCK_K, True
                    )
                total += tl.where(scores == float("-inf"), 0.0, weights * (dp - delta[:, None]))

    rows = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    dmask_ptr += mask_b.to(tl.int64) * stride_dmb + mask_h.to(tl.int64) * stride_dmh
    if SUM_L and SUM_S:
        tl.store(dmask_ptr, tl.sum(total).to(dmask_ptr.dtype.element_ty))
    elif SUM_L:
        tl.store(
            dmask_ptr + cols.to(tl.int64) * stride_dms, tl.sum(total, 0).to(dmask_ptr.dtype.element_ty), mask=cols < S
        )
    elif SUM_S:
        tl.store(
            dmask_ptr + rows.to(tl.int64) * stride_dml, tl.sum(total, 1).to(dmask_ptr.dtype.element_ty), mask=rows < L
        )
    else:
        tl.store(
            dmask_ptr + rows[:, None].to(tl.int64) * stride_dml + cols[None, :].to(tl.int64) * stride_dms,
            total.to(dmask_ptr.dtype.element_ty),
            mask=(rows[:, None] < L) & (cols[None, :] < S),
        )


def summed_axes(dmask: torch.Tensor) -> dict[str, bool]:
    """The SUM_* flags: along an axis of size 1 the mask was broadcast (or need not be: the sum of one is the same)."""
    return {f"SUM_{axis}": size == 1 for axis, size in zip("BHLS", dmask.shape)}


def mask_grid(dmask: torch.Tensor, n_queries: int, n_keys: int, tile: Tile) -> tuple[int]:
    """One program a tile of the mask's gradient (Bm, Hm, Lm, Sm): key tiles fastest, then query tiles, heads, batch."""
    tiles_q = 1 if dmask.shape[2] == 1 else cdiv(n_queries, tile.block_q)
    tiles_k = 1 if dmask.shape[3] == 1 else cdiv(n_keys, tile.block_k)
    return (tiles_k * tiles_q * dmask.shape[1] * dmask.shape[0],)
