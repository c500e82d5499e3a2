"""Fused attention for any shape: the forward kernel, and the pieces its backward shares.

    O = dropout(softmax(scale * Q K^T + mask)) V

A program owns BLOCK_Q queries of one head and walks along the keys in tiles of BLOCK_K, keeping for each row the
largest score so far and the sum of exponentials relative to it, so that no L x S matrix is stored: online softmax
(Milakov and Gimelshein 2018), tiled for attention as FlashAttention-2 does it (Dao 2023, section 3.1). Fused into one
kernel: both products, scaling, causal and given masks, softmax, dropout.

Work of one head: 4 L S E flops (half when causal; E = Ev). Bytes: Q, K, V and O once each, plus 8 a row for the
statistics; K and V are read again by every query tile, from L2 as long as one head's fit there. Unfused, the L x S
scores travel to memory and back at least three times.

Scores are kept in base 2: exp(x) = exp2(x log2(e)), with log2(e) folded into the scale. The statistics of a row are
`row_max` (base 2, -inf for a row that may attend to nothing) and `row_sum` (of 2^(score - row_max)). Two numbers rather
than their log-sum-exp: under a float mask of finfo.min the sum would drown in the maximum.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.tiles import block_of, choose_tile
from kernels.backend import INTERPRETED
from kernels.launch import capability, launch_on

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL_MASK, FLOAT_MASK = (tl.constexpr(i) for i in range(3))
LEAST_BIAS = tl.constexpr(torch.finfo(torch.float32).min * 0.69)  # times log2(e) it is still finite


@triton.jit
def load_rows(
    ptr, start, n_rows, stride_row, stride_col,
    ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS) of a matrix as a tile (ROWS, BLOCK), zero from row `n_rows` and column `N_COLS` on.

    The tile's start is a 64-bit offset; offsets inside it are 32-bit, to save registers, unless rows are WIDE apart.
    """
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = rows < n_rows - start
    if N_COLS != BLOCK:
        inside = inside & (cols < N_COLS)
    pointers = ptr + tl.cast(start, tl.int64) * stride_row
    if WIDE:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    return tl.load(pointers + (rows * stride_row + cols * stride_col), mask=inside, other=0.0)


@triton.jit
def store_rows(
    ptr, x, start, n_rows, stride_row, stride_col,
    ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the tile x (ROWS, BLOCK) to rows [start, start + ROWS) of a matrix, as far as it has them."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    pointers = ptr + (tl.cast(start, tl.int64) + rows) * stride_row + cols.to(tl.int64) * stride_col
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(rows < n_rows - start) & (cols < N_COLS))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b (acc None: a b), accumulated in float32. PRECISION: as `dot_precision` says."""
    if PRECISION == "widen":
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def zero_nonfinite(x):
    """x with NaN and Inf replaced by zero, so that a product with a weight of zero is zero."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def restrict(
    scores, start_q, start_k, di, dj, L, S, mask_ptr, stride_ml, stride_ms,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add a float mask to base-2 scores and put -inf wherever query start_q + di may not attend to key start_k + dj.

    scores: (A, B) in either orientation; di, dj: indices in the tile, (A, 1) and (1, B) or the reverse.
    mask_ptr: start of this head's (L, S) mask, a byte (not zero = may attend) or a float (natural units) an entry.
    """
    inside = (di < L - start_q) & (dj < S - start_k)
    allowed = inside
    if IS_CAUSAL:
        allowed = allowed & (dj - di <= start_q - start_k)
    if MASK != NO_MASK:
        tile_ptr = mask_ptr + tl.cast(start_q, tl.int64) * stride_ml + tl.cast(start_k, tl.int64) * stride_ms
        if WIDE:
            di, dj = di.to(tl.int64), dj.to(tl.int64)
        entry = tl.load(tile_ptr + (di * stride_ml + dj * stride_ms), mask=inside, other=0)
        if MASK == BOOL_MASK:
            allowed = allowed & (entry != 0)
        else:
            bias = entry.to(tl.float32)
            allowed = allowed & (bias != float("-inf"))
            # finfo.min times log2(e) would overflow to -inf, which says "never"; torch means "least of all".
            scores += tl.maximum(bias, LEAST_BIAS, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def kept(seed, i, j, head, dropout_p):
    """Whether dropout keeps the weight of (query i, key j) in this head of this batch entry: Philox 4x32-10 counters.

    The counter is the position itself, so every kernel and every tile size draws the same mask from a seed.
    """
    zero = (i + j) * 0
    random, _, _, _ = tl.philox(seed, zero + j, zero + i, zero + head, zero)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def load_statistics(row_max_ptr, row_sum_ptr, delta_ptr, offs, L):
    """Of the queries `offs`: the pivot of the exponentials, one over their sum (0 where there is none), and delta."""
    inside = offs < L
    row_max = tl.load(row_max_ptr + offs, mask=inside, other=0.0)
    row_sum = tl.load(row_sum_ptr + offs, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + offs, mask=inside, other=0.0)
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    empty = row_sum == 0.0
    return pivot, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum)), delta


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, out_ptr, row_max_ptr, row_sum_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_ob, stride_oh, stride_ol, stride_oe,
    n_heads, group, L, S, scale, dropout_p, keep_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Output and statistics of BLOCK_Q queries of one head.

    q_ptr (B, n_heads, L, E), k_ptr (B, n_heads / group, S, E), v_ptr (B, n_heads / group, S, EV): inputs.
    mask_ptr (B, n_heads, L, S): bytes or floats by MASK; strides are 0 along broadcast axes.
    seed_ptr (1,): int64 seed of the dropout, read when HAS_DROPOUT.
    out_ptr (B, n_heads, L, EV): output; row_max_ptr, row_sum_ptr (B, n_heads, L): float32 statistics, contiguous.
    scale: factor of Q K^T, times log2(e). dropout_p: probability of dropping a weight; keep_scale: 1 / (1 - dropout_p).
    """
    n_tiles = tl.cdiv(L, BLOCK_Q)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    head = pid // n_tiles  # over batch and heads
    if IS_CAUSAL:
        tile = n_tiles - 1 - tile  # the longest rows first, so that no straggler starts last
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
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_EV), tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    # Keys [0, open_end) are allowed for every row of the tile, [open_end, end) need a look, later ones are skipped.
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
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if CHECKED else new_max
            weights = tl.exp2(scores - pivot[:, None])
            shrink = tl.exp2(row_max - pivot)
            row_sum = row_sum * shrink + tl.sum(weights, 1)
            row_max = new_max
            if HAS_DROPOUT:
                weights = tl.where(kept(seed, start_q + di, start_k + dj, head, dropout_p), weights, 0.0)
            if CHECKED and (IS_CAUSAL or MASK != NO_MASK):
                # A weight of zero times NaN is NaN: take such values out, and give NaN to the rows that may see them.
                finite = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 1)
                weights = tl.where((scores != float("-inf")) & (finite == 0)[None, :], float("nan"), weights)
                v = zero_nonfinite(v)
            acc = dot(weights.to(v.dtype), v, acc * shrink[:, None], PRECISION)

    acc /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # zero: no key allowed
    if HAS_DROPOUT:
        acc *= keep_scale
    store_rows(out_ptr + b * stride_ob + h * stride_oh, acc, start_q, L, stride_ol, stride_oe, BLOCK_Q, EV, BLOCK_EV)
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    stats = head.to(tl.int64) * L
    tl.store(row_max_ptr + stats + offs_q, row_max, mask=offs_q < L)
    tl.store(row_sum_ptr + stats + offs_q, row_sum, mask=offs_q < L)


def mask_kind(attn_mask: torch.Tensor | None) -> int:
    """NO_MASK, BOOL_MASK or FLOAT_MASK."""
    if attn_mask is None:
        return NO_MASK.value
    return BOOL_MASK.value if attn_mask.dtype == torch.bool else FLOAT_MASK.value


def mask_arguments(attn_mask: torch.Tensor | None) -> tuple:
    """Pointer and strides of a mask of four axes, each full or of size 1 (stride 0: broadcast)."""
    if attn_mask is None:
        return None, 0, 0, 0, 0
    strides = (0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    return attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask, *strides


def tile_arguments(query: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None) -> tuple:
    """What `choose_tile` asks about a call."""
    head_size = max(query.shape[-1], value.shape[-1])
    return head_size, query.element_size(), query.shape[-2], capability(query.device), seed is not None


def keep_scale(dropout_p: float) -> float:
    """Factor of the weights that dropout keeps; it keeps none at probability 1."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def is_wide(*strides: int) -> bool:
    """Whether offsets inside a tile could pass 2^31 with such strides of rows and columns: it is at most 128 by 256."""
    return max(strides) >= 1 << 22


def tile_strides(*tensors: torch.Tensor | None) -> list[int]:
    """The last two strides of each tensor there is: those of the rows and columns of its tiles."""
    return [stride for x in tensors if x is not None for stride in x.stride()[-2:]]


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
    attn_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
) -> None:
    """Launch the forward kernel.

    Args:
        query: (B, Hq, L, E), any strides; key: (B, Hkv, S, E); value: (B, Hkv, S, Ev).
        attn_mask: bool (True = may attend) or float (added), four axes, each of size 1 or full; or None.
        seed: int64 (1,), the dropout's seed; None without dropout.
        output: (B, Hq, L, Ev), any strides, written; row_max, row_sum: (B, Hq, L) float32 contiguous, written.
    """
    batch, n_heads, n_queries, e = query.shape
    n_keys, ev = value.shape[-2:]
    tile = choose_tile("forward", *tile_arguments(query, value, seed))
    grid = (triton.cdiv(n_queries, tile.block_q) * n_heads * batch,)  # query tiles fastest, then heads, then batch
    if grid[0] == 0:
        return
    mask_ptr, *mask_strides = mask_arguments(attn_mask)
    strides = (*query.stride(), *key.stride(), *value.stride(), *mask_strides)
    with launch_on(query.device):
        forward_kernel[grid](
            query, key, value, mask_ptr, seed, output, row_max, row_sum, *strides, *output.stride(),
            n_heads, n_heads // key.shape[1], n_queries, n_keys,
            scale * LOG2_E.value, dropout_p, keep_scale(dropout_p),
            E=e, EV=ev, BLOCK_E=block_of(e), BLOCK_EV=block_of(ev), IS_CAUSAL=is_causal, MASK=mask_kind(attn_mask),
            HAS_DROPOUT=seed is not None, PRECISION=dot_precision(query.dtype),
            WIDE=is_wide(*tile_strides(query, key, value, attn_mask)),
            **tile.options(),
        )  # fmt: skip
