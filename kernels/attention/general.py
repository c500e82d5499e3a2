"""Fused attention for any shape: the forward kernel, and the pieces its backward shares.

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

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.attention.choice import is_wide
from kernels.attention.pieces import (
    BOOL_MASK, BOTH_BANDS, CARE, FLOAT_MASK, LOG2_E, NO_BAND, NO_MASK, OPEN, UPPER_BAND, batch_bounds, bend, dot,
    find_work, is_spoilt, key_range, load_rows, open_to_all, powers, product_of_rows, restrict, start_of_tile,
    store_rows, tile_dropout_factors, tiles_of_pass,
)  # fmt: skip
from kernels.attention.rules import FAR, Extras, Rules
from kernels.attention.tiles import choose_tile, column_blocks, what_is_asked
from kernels.backend import INTERPRETED
from kernels.launch import capability, cdiv, l2_bytes, launch_on


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, query_starts_ptr, key_starts_ptr,
    sinks_ptr, out_ptr, row_max_ptr, row_sum_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_ob, stride_oh, stride_ol, stride_oe,
    stride_sb, stride_sh, stride_ab, stride_zb,
    n_heads, group, L, S, left, right, scale, softcap, drop_below, keep_scale, section,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Output and statistics of BLOCK_Q queries of one head.

    q_ptr (B, n_heads, L, E), k_ptr (B, n_heads / group, S, E), v_ptr (B, n_heads / group, S, EV): inputs. PACKED: the
    batch entries follow each other in (1, heads, all rows, E), entry b from query_starts_ptr[b] and key_starts_ptr[b].
    mask_ptr (B, n_heads, L, S): bytes or floats by MASK; strides are 0 along broadcast axes.
    seed_ptr (1,): int64 seed of the dropout. key_lengths_ptr (B,): keys in use. slopes_ptr, sinks_ptr (B,
    n_heads): float32, natural units. Each is read when its flag is set.
    out_ptr (B, n_heads, L, EV): output; row_max_ptr, row_sum_ptr (B, n_heads, L): float32 statistics, rows contiguous.
    scale: factor of Q K^T, above 0, with a soft cap over the cap. drop_below: see `dropout_factor`; keep_scale: 1 over
    the probability of keeping a weight. section: heads, or chunks of columns of them, whose tiles of queries are worked
    on in turn.
    """
    chunks: tl.constexpr = (EV + BLOCK_EV - 1) // BLOCK_EV
    n_tiles = tl.cdiv(L, BLOCK_Q)
    head, tile = find_work(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, section)
    start_v = head % chunks * BLOCK_EV
    head //= chunks  # over batch and heads
    if BAND != NO_BAND:
        tile = n_tiles - 1 - tile  # the longest rows first, so that no straggler starts last
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
    if MASK != NO_MASK:
        mask_ptr += b * stride_mb + h * stride_mh
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + b * stride_ab + h)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    IS_PRODUCT: tl.constexpr = not (HAS_SOFTCAP or HAS_ALIBI or EXACT)
    factor = scale * LOG2_E if IS_PRODUCT else LOG2_E
    unit = 1.0 if EXACT else LOG2_E  # of row_max, in natural units

    di, dj = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if LOOP == 0:
        q = load_rows(q_ptr, start_q, n_queries, stride_ql, stride_qe, 0, BLOCK_Q, E, BLOCK_E, WIDE)
    first_max, first_sum = float("-inf"), 0.0
    if HAS_SINKS:
        first_max, first_sum = tl.load(sinks_ptr + b * stride_zb + h) * unit, 1.0
    row_max = tl.zeros((BLOCK_Q,), tl.float32) + first_max
    row_sum = tl.zeros((BLOCK_Q,), tl.float32) + first_sum
    acc = tl.zeros((BLOCK_Q, BLOCK_EV), tl.float32)

    begin, end, open_begin, open_end = key_range(start_q, n_keys, offset, left, right, BLOCK_Q, BLOCK_K, BAND)
    open_begin, open_end = open_to_all(begin, open_begin, open_end, start_q + BLOCK_Q <= n_queries, MASK)
    for PASS in tl.static_range(3 if BAND != NO_BAND or MASK != NO_MASK else 2):
        again = False
        if PASS == CARE:
            again = is_spoilt(acc)
            row_max, row_sum = tl.where(again, first_max, row_max), tl.where(again, first_sum, row_sum)
            acc = tl.where(again, 0.0, acc)
        first, last = tiles_of_pass(begin, end, open_begin, open_end, again, PASS)
        for place in range(first, last, BLOCK_K):
            start_k = start_of_tile(place, begin, open_begin, open_end, PASS)
            if LOOP == 0:
                k = load_rows(
                    k_ptr, start_k, n_keys, stride_ks, stride_ke, 0, BLOCK_K, E, BLOCK_E, WIDE, PASS == OPEN
                )
                scores = dot(q, tl.trans(k), None, PRECISION)
            else:
                scores = product_of_rows(
                    q_ptr, start_q, n_queries, stride_ql, stride_qe, k_ptr, start_k, n_keys, stride_ks, stride_ke,
                    BLOCK_Q, BLOCK_K, E, LOOP, PRECISION, WIDE,
                )  # fmt: skip
            v = load_rows(
                v_ptr, start_k, n_keys, stride_vs, stride_ve, start_v, BLOCK_K, EV, BLOCK_EV, WIDE, PASS == OPEN
            )
            if not IS_PRODUCT:
                scores = bend(scores * scale, start_q, start_k, di, dj, offset, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
            scores = restrict(
                scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right,
                mask_ptr, stride_ml, stride_ms, BAND, MASK, WIDE, PASS,
            )  # fmt: skip
            tile_max = tl.max(scores, 1)
            new_max = tl.maximum(row_max, tile_max if EXACT else tile_max * factor)
            pivot = new_max
            if PASS != OPEN or MASK != NO_MASK:
                pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = powers(scores, pivot[:, None], factor, EXACT)
            shrink = powers(row_max, pivot, 1.0, EXACT)
            row_sum = row_sum * shrink + tl.sum(weights, 1)
            row_max = new_max
            acc *= shrink[:, None]
            if HAS_DROPOUT:
                weights *= tile_dropout_factors(
                    seed, start_q, start_k, head, drop_below, keep_scale, BLOCK_Q, BLOCK_K, True
                )
            if PASS == CARE:
                # A weight of zero times NaN is NaN: take such values out, and give NaN to the rows that may see them.
                finite = tl.abs(v) < float("inf")
                if MASK == NO_MASK:  # values that all rows may see stay as they are
                    finite = finite | ((start_k >= open_begin) & (start_k < open_end))
                clean = tl.min(finite.to(tl.int32), 1)
                weights = tl.where((scores != float("-inf")) & (clean == 0)[None, :], float("nan"), weights)
                v = tl.where(finite, v, 0.0)
            acc = dot(weights.to(v.dtype), v, acc, PRECISION)

    acc /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # zero: no key allowed
    out_ptr += b * stride_ob + h * stride_oh + first_q * stride_ol
    store_rows(out_ptr, acc, start_q, n_queries, stride_ol, stride_oe, start_v, BLOCK_Q, EV, BLOCK_EV)
    if start_v == 0:
        offs_q = start_q + tl.arange(0, BLOCK_Q)
        stats = b * stride_sb + h * stride_sh + first_q
        tl.store(row_max_ptr + stats + offs_q, row_max * (1.0 / unit), mask=offs_q < n_queries)
        tl.store(row_sum_ptr + stats + offs_q, row_sum, mask=offs_q < n_queries)


def mask_kind(attn_mask: torch.Tensor | None) -> int:
    """NO_MASK, BOOL_MASK or FLOAT_MASK."""
    if attn_mask is None:
        return NO_MASK.value
    return BOOL_MASK.value if attn_mask.dtype == torch.bool else FLOAT_MASK.value


def is_exact(dtype: torch.dtype, extras: Extras) -> bool:
    """Whether a row's largest score is subtracted before anything else: EXACT, see the top of pieces.py."""
    return dtype == torch.float32 or mask_kind(extras.attn_mask) == FLOAT_MASK.value


def mask_strides(attn_mask: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a mask of four axes, each full or of size 1 (stride 0: broadcast)."""
    if attn_mask is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))


def pointers(seed: torch.Tensor | None, extras: Extras) -> tuple[torch.Tensor | None, ...]:
    """The kernels' optional tensors, in their order."""
    mask = extras.attn_mask
    mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
    return mask, seed, extras.key_lengths, extras.alibi_slopes, extras.query_starts, extras.key_starts


def numbers(rules: Rules) -> tuple[float, ...]:
    """left, right, scale, softcap, drop_below and keep_scale as the kernels take them."""
    scale = rules.scale / rules.softcap if rules.softcap else rules.scale
    left, right = (FAR if side is None else side for side in (rules.left, rules.right))
    keep = 1.0 / (1.0 - rules.dropout_p) if rules.dropout_p < 1.0 else 0.0  # at probability 1 it keeps none
    drop_below = min(round(rules.dropout_p * 2**32), 2**32 - 1) - 2**31
    return left, right, scale, rules.softcap, drop_below, keep


def positive_scale(query: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, Rules]:
    """The same scores with a scale above 0, which kernels count on: its sign, or its being 0, goes into the query."""
    if rules.scale > 0.0:
        return query, rules
    return query * (-1.0 if rules.scale else 0.0), rules._replace(scale=-rules.scale or 1.0)


def flags(query: torch.Tensor, seed: torch.Tensor | None, extras: Extras, rules: Rules, wide: bool) -> dict[str, Any]:
    """The compile-time switches that all kernels share."""
    band = BOTH_BANDS if rules.left is not None else UPPER_BAND if rules.right is not None else NO_BAND
    return {
        "BAND": band.value,
        "BOTTOM_RIGHT": rules.bottom_right,
        "PACKED": extras.query_starts is not None,
        "HAS_LENGTHS": extras.key_lengths is not None,
        "HAS_SOFTCAP": bool(rules.softcap),
        "HAS_ALIBI": extras.alibi_slopes is not None,
        "HAS_DROPOUT": seed is not None,
        "EXACT": is_exact(query.dtype, extras),
        "PRECISION": dot_precision(query.dtype),
        "WIDE": wide,
    }


def heads_in_turn(group: int, shared_bytes: int, rules: Rules, device: torch.device) -> int:
    """Query heads that are worked on in turn, a tile of each.

    The longest tiles of all heads first would keep every multiprocessor busy to the end; one head after the other finds
    what its tiles share in L2. So: as many heads as have theirs there, or where all tiles are as long, one group.

    Args:
        group: query heads that share a key head.
        shared_bytes: what the tiles of a key head share, keys and values or queries and gradients.
    """
    is_causal = rules.right is not None and rules.left is None
    return group * max(1, l2_bytes(device) // 2 // max(shared_bytes, 1)) if is_causal else group


def lengths(query: torch.Tensor, key: torch.Tensor, extras: Extras, rules: Rules) -> tuple[int, int, int]:
    """Batch entries, and the most queries and keys of one."""
    if extras.query_starts is None:
        return query.shape[0], query.shape[2], key.shape[2]
    return extras.query_starts.shape[0] - 1, rules.max_queries, rules.max_keys


def batch_strides(x: torch.Tensor, extras: Extras) -> tuple[int, ...]:
    """Strides of x (B, H, L, E); 0 from one packed sequence to the next, which starts where the kernels look it up."""
    return x.stride() if extras.query_starts is None else (0, *x.stride()[1:])


def tile_arguments(
    query: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None, extras: Extras, rules: Rules, n_queries: int
) -> tuple[int, int, int, int, str]:
    """What `choose_tile` asks about a call."""
    head_size = max(query.shape[-1], value.shape[-1])
    asked = what_is_asked(
        rules.right is not None, rules.left is not None, extras.attn_mask is not None, bool(rules.softcap),
        extras.alibi_slopes is not None, seed is not None,
    )  # fmt: skip
    return head_size, query.element_size(), n_queries, capability(query.device), asked


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 products follow torch.get_float32_matmul_precision().

    "widen": to float32 first, since Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        return "widen"
    if dtype != torch.float32:
        return "ieee"  # says nothing of 16-bit inputs
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # PyTorch's newer setting, a precision a device, was used: it refuses the older question
        exact = torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    return "ieee" if exact else "tf32"


def launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor | None,
    extras: Extras,
    rules: Rules,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
) -> None:
    """Launch the forward kernel.

    Args:
        query: (B, Hq, L, E), any strides; key: (B, Hkv, S, E); value: (B, Hkv, S, Ev). Packed: B = 1, rows of all.
        seed: int64 (1,), the dropout's seed; None without dropout.
        output: (B, Hq, L, Ev), any strides, written; row_max, row_sum: (B, Hq, L) float32, rows contiguous, written.
    """
    query, rules = positive_scale(query, rules)
    n_heads, e, ev = query.shape[1], query.shape[-1], value.shape[-1]
    batch, n_queries, n_keys = lengths(query, key, extras, rules)
    tile = choose_tile("forward", *tile_arguments(query, value, seed, extras, rules, n_queries))
    sizes = column_blocks(e, ev)
    chunks, group = cdiv(ev, sizes["BLOCK_EV"]), n_heads // max(key.shape[1], 1)
    grid = (cdiv(n_queries, tile.block_q) * chunks * n_heads * batch,)
    if grid[0] == 0:
        return
    strides = (*batch_strides(query, extras), *batch_strides(key, extras), *batch_strides(value, extras))
    with launch_on(query.device):
        forward_kernel[grid](
            query, key, value, *pointers(seed, extras), extras.sinks, output, row_max, row_sum,
            *strides, *mask_strides(extras.attn_mask), *batch_strides(output, extras),
            *batch_strides(row_max, extras)[:2], head_stride(extras.alibi_slopes), head_stride(extras.sinks),
            n_heads, group, n_queries, n_keys, *numbers(rules),
            chunks * heads_in_turn(group, n_keys * (e + ev) * key.itemsize, rules, query.device),
            MASK=mask_kind(extras.attn_mask), HAS_SINKS=extras.sinks is not None, **sizes, **tile.options(),
            **flags(query, seed, extras, rules, is_wide(query, key, value, extras.attn_mask)),
        )  # fmt: skip


def head_stride(x: torch.Tensor | None) -> int:
    """Stride of slopes or sinks (B or 1, Hq) from one batch entry to the next."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)
