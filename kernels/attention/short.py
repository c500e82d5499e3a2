"""Fused attention for short sequences: many heads a program. The forward kernel, and the pieces its backward shares.

    O = dropout(softmax(scale * Q K^T + mask)) V

for L and S up to 64. A head is then a few KiB, and what counts is bytes: a program takes HEADS x PACK key heads with
all their query heads, in batched products, and holds all their scores, so that the softmax needs no second look.
Sequences of up to 8 stand PACK = 16 // length behind one another in tiles of 16 rows, the least that a matrix
instruction takes; of their scores only the blocks on the diagonal count.

Work of one head: 4 L S E flops (E = Ev), on tiles rounded up. Bytes: Q, K, V and O, once each. No statistics are
written: the backward (short_backward.py) computes the softmax again.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.attention.general import flags, head_stride, mask_kind, mask_strides, numbers, pointers, positive_scale
from kernels.attention.pieces import (
    CARE, FLOAT_MASK, LOG2_E, NO_BAND, NO_MASK, bend, dot, dropout_factors, powers, restrict, zero_nonfinite,
)  # fmt: skip
from kernels.attention.rules import Extras, Rules
from kernels.attention.tiles import block_of, choose_short_tile
from kernels.launch import cdiv, launch_on


@triton.jit
def split(row, length, PACK: tl.constexpr):
    """Which of its tile's sequences a row belongs to, and its place there."""
    part = row * 0
    if PACK > 1:
        part = row // length
    return part, row - part * length


@triton.jit
def locate(row, length, n_sequences, n_kv_heads, HEADS: tl.constexpr, PACK: tl.constexpr):
    """Of the rows of this program's tiles: part and place (see `split`), batch entry, key head, whether they are there.

    row: (1, ROWS, 1). Rows that are not there are told a batch entry and a head that are.
    """
    part, place = split(row, length, PACK)
    tile = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None, None]
    sequence = tile * PACK + part
    inside = (sequence < n_sequences) & (place < length) & (part < PACK)
    sequence = tl.minimum(sequence, n_sequences - 1)
    return part, place, sequence // n_kv_heads, sequence % n_kv_heads, inside


@triton.jit
def pointers_of(ptr, b, h, place, stride_b, stride_h, stride_row, stride_col, BLOCK: tl.constexpr):
    """Where the entries of tiles (HEADS, ROWS, BLOCK) of a tensor (B, H, rows, columns) stand. 64 bits to the head."""
    col = tl.arange(0, BLOCK)[None, None, :]
    return ptr + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) + (place * stride_row + col * stride_col)


@triton.jit
def within(inside, N: tl.constexpr, BLOCK: tl.constexpr):
    """Which entries of tiles (HEADS, ROWS, BLOCK) are there, of rows that are `inside` with N columns."""
    if N % BLOCK != 0:
        inside = inside & (tl.arange(0, BLOCK)[None, None, :] < N)
    return inside


@triton.jit
def products(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b (acc None: a b) of each tile, (HEADS, M, K) and (HEADS, K, N).

    A single tile as an ordinary product: of a batch each warp computes tiles of its own, of a single one all the same.
    """
    if a.shape[0] == 1:
        left, right = tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2]))
        found = tl.reshape(dot(left, right, None, PRECISION), (1, a.shape[1], b.shape[2]))
        return found if acc is None else acc + found
    return dot(a, b, acc, PRECISION)


@triton.jit
def keys_in_use(key_lengths_ptr, b, S, HAS_LENGTHS: tl.constexpr):
    """How many keys the batch entries b have."""
    n_keys = b * 0 + S
    if HAS_LENGTHS:
        n_keys = tl.maximum(tl.minimum(n_keys, tl.load(key_lengths_ptr + b).to(tl.int32)), 0)
    return n_keys


@triton.jit
def survey(
    L, S, n_sequences, n_kv_heads, key_lengths_ptr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """What this program's tiles hold.

    Returns:
        Of the rows of queries, (HEADS, BLOCK_L, 1): place, batch entry, key head, whether there. Of the rows of keys
        likewise, and whether in use. Of the columns of scores: the keys' places (1, 1, BLOCK_S), and whether they are
        of one sequence with a query. Then keys in use and the places' offset, by query.
    """
    part, i, b, h_kv, inside = locate(
        tl.arange(0, BLOCK_L)[None, :, None], L, n_sequences, n_kv_heads, HEADS, PACK
    )
    _part, row, b_row, h_row, there = locate(
        tl.arange(0, BLOCK_S)[None, :, None], S, n_sequences, n_kv_heads, HEADS, PACK
    )
    part_of_key, j = split(tl.arange(0, BLOCK_S)[None, None, :], S, PACK)
    together = (part == part_of_key) & (part_of_key < PACK)
    n_keys = keys_in_use(key_lengths_ptr, b, S, HAS_LENGTHS)
    used = there & (row < keys_in_use(key_lengths_ptr, b_row, S, HAS_LENGTHS))
    offset = 0
    if BOTTOM_RIGHT:
        offset = n_keys - L
    return i, b, h_kv, inside, row, b_row, h_row, there, used, j, together, n_keys, offset


@triton.jit
def short_scores(
    q, k, b, h, i, j, together, n_queries, n_keys, offset, left, right, scale, softcap,
    slopes_ptr, stride_ab, mask_ptr, stride_mb, stride_mh, stride_ml, stride_ms,
    BAND: tl.constexpr, MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (HEADS, BLOCK_L, BLOCK_S), -inf where a query may not attend; those after the soft cap alone; the factor
    of both, see the top of pieces.py.

    b, h, i: batch entry, head and place of each query; j: place of each key; together: whether of one sequence.
    """
    IS_PRODUCT: tl.constexpr = not (HAS_SOFTCAP or HAS_ALIBI or MASK == FLOAT_MASK)
    factor = scale * LOG2_E if IS_PRODUCT else LOG2_E
    capped = products(q, tl.permute(k, (0, 2, 1)), None, PRECISION)
    if not IS_PRODUCT:
        capped = bend(capped * scale, 0, 0, i, j, offset, softcap, 0.0, HAS_SOFTCAP, False)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + b * stride_ab + h)
    scores = bend(capped, 0, 0, i, j, offset, softcap, slope, False, HAS_ALIBI)
    if MASK != NO_MASK:
        mask_ptr += b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    scores = restrict(
        scores, 0, 0, i, j, n_queries, n_keys, offset, left, right, mask_ptr, stride_ml, stride_ms, BAND, MASK, False,
        CARE,
    )  # fmt: skip
    if PACK > 1:
        scores = tl.where(together, scores, float("-inf"))
    return scores, capped, factor


@triton.jit
def exponentials(scores, factor, MASK: tl.constexpr):
    """exp(score - the row's largest), and their sum a row, 1 where a query may attend to nothing."""
    row_max = tl.max(scores, 2)[:, :, None]
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max if MASK == FLOAT_MASK else row_max * factor)
    weights = powers(scores, pivot, factor, MASK == FLOAT_MASK)
    row_sum = tl.sum(weights, 2)[:, :, None]
    return weights, tl.where(row_sum == 0.0, 1.0, row_sum)


@triton.jit
def short_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, out_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_ob, stride_oh, stride_ol, stride_oe,
    stride_ab,
    n_sequences, n_kv_heads, group, L, S, left, right, scale, softcap, drop_below, keep_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of the queries of HEADS * PACK key heads.

    q_ptr (B, n_kv_heads * group, L, E), k_ptr (B, n_kv_heads, S, E), v_ptr (B, n_kv_heads, S, EV): inputs.
    out_ptr (B, n_kv_heads * group, L, EV): output. n_sequences: B * n_kv_heads. The rest as in forward_kernel.
    """
    i, b, h_kv, inside, row, b_row, h_row, _there, used, j, together, n_keys, offset = survey(
        L, S, n_sequences, n_kv_heads, key_lengths_ptr, BLOCK_L, BLOCK_S, HEADS, PACK, BOTTOM_RIGHT, HAS_LENGTHS
    )
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    k_ptrs = pointers_of(k_ptr, b_row, h_row, row, stride_kb, stride_kh, stride_ks, stride_ke, BLOCK_E)
    v_ptrs = pointers_of(v_ptr, b_row, h_row, row, stride_vb, stride_vh, stride_vs, stride_ve, BLOCK_EV)
    k = tl.load(k_ptrs, mask=within(used, E, BLOCK_E), other=0.0)
    v = tl.load(v_ptrs, mask=within(used, EV, BLOCK_EV), other=0.0)
    if BAND != NO_BAND or MASK != NO_MASK or PACK > 1:
        # A weight of zero times NaN is NaN: take such values out, and give NaN to the rows that may see them.
        finite = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 2)[:, None, :]
        v = zero_nonfinite(v)

    for member in range(0, group):
        h = h_kv * group + member
        q_ptrs = pointers_of(q_ptr, b, h, i, stride_qb, stride_qh, stride_ql, stride_qe, BLOCK_E)
        q = tl.load(q_ptrs, mask=within(inside, E, BLOCK_E), other=0.0)
        scores, _capped, factor = short_scores(
            q, k, b, h, i, j, together, L, n_keys, offset, left, right, scale, softcap, slopes_ptr, stride_ab,
            mask_ptr, stride_mb, stride_mh, stride_ml, stride_ms,
            BAND, MASK, HAS_SOFTCAP, HAS_ALIBI, PACK, PRECISION,
        )  # fmt: skip
        weights, row_sum = exponentials(scores, factor, MASK)
        if HAS_DROPOUT:
            weights *= dropout_factors(seed, i, j, b * (n_kv_heads * group) + h, drop_below, keep_scale, PACK > 1)
        if BAND != NO_BAND or MASK != NO_MASK or PACK > 1:
            weights = tl.where((scores != float("-inf")) & (finite == 0), float("nan"), weights)
        out = products(weights.to(v.dtype), v, None, PRECISION) / row_sum
        out_ptrs = pointers_of(out_ptr, b, h, i, stride_ob, stride_oh, stride_ol, stride_oe, BLOCK_EV)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=within(inside, EV, BLOCK_EV))


def short_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None, extras: Extras
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...], tuple[int, ...]]:
    """Pointers; their strides; numbers of sequences, key heads, query heads for each, queries and keys."""
    n_kv_heads = key.shape[1]
    strides = (*query.stride(), *key.stride(), *value.stride(), *mask_strides(extras.attn_mask))
    shape = (query.shape[0] * n_kv_heads, n_kv_heads, query.shape[1] // n_kv_heads, query.shape[2], key.shape[2])
    return (query, key, value, *pointers(seed, extras)[:4]), strides, shape


def short_options(
    kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None,
    extras: Extras, rules: Rules,
) -> dict[str, Any]:  # fmt: skip
    """Sizes of tiles, compile-time switches and warps of a launch."""
    n_queries, n_keys, e, ev = query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    switches = flags(query, seed, extras, rules, False)
    del switches["PACKED"], switches["WIDE"], switches["EXACT"]
    tile = choose_short_tile(kernel, max(n_queries, n_keys), max(e, ev), query.element_size())
    return {
        "E": e, "EV": ev, "BLOCK_E": block_of(e), "BLOCK_EV": block_of(ev), "BLOCK_L": block_of(n_queries),
        "BLOCK_S": block_of(n_keys), "MASK": mask_kind(extras.attn_mask), **switches, **tile.options(),
    }  # fmt: skip


def launch_short_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None, extras: Extras,
    rules: Rules, output: torch.Tensor,
) -> None:  # fmt: skip
    """Launch the forward kernel. Arguments as of `launch_forward` in general.py, of a call that is short."""
    query, rules = positive_scale(query, rules)
    inputs, strides, shape = short_inputs(query, key, value, seed, extras)
    options = short_options("forward", query, key, value, seed, extras, rules)
    grid = (cdiv(shape[0], options["HEADS"] * options["PACK"]),)  # key heads fastest, then batch entries
    with launch_on(query.device):
        short_forward_kernel[grid](
            *inputs, output, *strides, *output.stride(), head_stride(extras.alibi_slopes), *shape, *numbers(rules),
            **options,
        )  # fmt: skip
