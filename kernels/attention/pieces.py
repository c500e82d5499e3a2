"""The pieces that the attention kernels are made of: tiles of matrices, products, and the rules of rules.py.

Scores are kept in base 2: exp(x) = exp2(x log2(e)), with log2(e) folded into scale, softcap and slopes.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL_MASK, FLOAT_MASK = (tl.constexpr(i) for i in range(3))
NO_BAND, UPPER_BAND, BOTH_BANDS = (tl.constexpr(i) for i in range(3))  # of the diagonals a query may attend to
LEAST_BIAS = tl.constexpr(torch.finfo(torch.float32).min * 0.69)  # times log2(e) it is still finite


@triton.jit
def find_work(number, n_heads, n_tiles, section):
    """Head and tile of piece of work `number`: the tiles of `section` heads at a time, one of each head in turn."""
    section = tl.minimum(section, n_heads)  # so that the product below fits 32 bits
    first = number // (section * n_tiles) * section
    size = tl.minimum(section, n_heads - first)
    place = number - first * n_tiles
    return first + place % size, place // size


@triton.jit
def load_rows(
    ptr, start, n_rows, stride_row, stride_col, start_col,
    ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows from `start` and columns from `start_col` of a matrix as a tile (ROWS, BLOCK), zero past its end.

    The tile's start is a 64-bit offset; offsets inside it are 32-bit, to save registers, unless rows are WIDE apart.
    """
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = rows < n_rows - start
    if N_COLS % BLOCK != 0:
        inside = inside & (cols < N_COLS - start_col)
    pointers = ptr + tl.cast(start, tl.int64) * stride_row + tl.cast(start_col, tl.int64) * stride_col
    if WIDE:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    return tl.load(pointers + (rows * stride_row + cols * stride_col), mask=inside, other=0.0)


@triton.jit
def store_rows(
    ptr, x, start, n_rows, stride_row, stride_col, start_col,
    ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the tile x (ROWS, BLOCK) to rows from `start` and columns from `start_col` of a matrix, up to its end."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    pointers = ptr + (tl.cast(start, tl.int64) + rows) * stride_row
    pointers += tl.cast(start_col, tl.int64) * stride_col + cols.to(tl.int64) * stride_col
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(rows < n_rows - start) & (cols < N_COLS - start_col))


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
def product_of_rows(
    a_ptr, start_a, n_a, stride_a, stride_ac, b_ptr, start_b, n_b, stride_b, stride_bc,
    ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A B^T (ROWS_A, ROWS_B) for rows of two matrices that are too wide for one tile, BLOCK columns at a time."""
    acc = tl.zeros((ROWS_A, ROWS_B), tl.float32)
    for start_col in range(0, N_COLS, BLOCK):
        a = load_rows(a_ptr, start_a, n_a, stride_a, stride_ac, start_col, ROWS_A, N_COLS, BLOCK, WIDE)
        b = load_rows(b_ptr, start_b, n_b, stride_b, stride_bc, start_col, ROWS_B, N_COLS, BLOCK, WIDE)
        acc = dot(a, tl.trans(b), acc, PRECISION)
    return acc


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32: by its series near 0, where 1 - exp(-2x) would cancel."""
    size = tl.abs(x)
    shrunk = tl.exp2(size * -2.885390081777927)  # exp(-2 |x|)
    far = (1.0 - shrunk) / (1.0 + shrunk)
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(size < 0.3, x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def batch_bounds(
    b, L, S, key_lengths_ptr, query_starts_ptr, key_starts_ptr,
    HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
):  # fmt: skip
    """Of batch entry b: its first query and key among packed ones, how many it has of each, and the places' offset."""
    first_q = tl.zeros((), tl.int64)
    first_k = tl.zeros((), tl.int64)
    n_queries, n_keys = L, S
    if PACKED:
        first_q = tl.load(query_starts_ptr + b).to(tl.int64)
        first_k = tl.load(key_starts_ptr + b).to(tl.int64)
        n_queries = (tl.load(query_starts_ptr + b + 1) - first_q).to(tl.int32)
        n_keys = (tl.load(key_starts_ptr + b + 1) - first_k).to(tl.int32)
    if HAS_LENGTHS:
        n_keys = tl.maximum(tl.minimum(n_keys, tl.load(key_lengths_ptr + b).to(tl.int32)), 0)
    offset = 0
    if BOTTOM_RIGHT:
        offset = n_keys - n_queries
    return first_q, first_k, n_queries, n_keys, offset


@triton.jit
def key_range(
    start_q, n_keys, offset, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr
):  # fmt: skip
    """Which keys the queries from start_q on need: [begin, end), of which [begin, open_end) are open to all of them.

    begin and open_end are multiples of BLOCK_K. Keys of the other tiles are never read.
    """
    begin, end, open_end = 0, n_keys, n_keys
    if BAND != NO_BAND:
        place = start_q + offset
        end = tl.maximum(tl.minimum(n_keys, place + BLOCK_Q + right), 0)
        open_end = tl.maximum(tl.minimum(n_keys, place + 1 + right), 0)
        if BAND == BOTH_BANDS:
            begin = tl.maximum(place - left, 0) // BLOCK_K * BLOCK_K
            open_end = begin  # a window is a few tiles wide, and most of them are cut by an edge
    return begin, end, open_end // BLOCK_K * BLOCK_K


@triton.jit
def query_range(
    start_k, n_queries, n_keys, offset, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Which queries may attend to the keys from start_k on: [begin, end), of which [open_begin, end) see all of them.

    begin and open_begin are multiples of BLOCK_Q or n_queries.
    """
    begin, open_begin, end = 0, 0, n_queries
    if BAND != NO_BAND:
        row = start_k - offset - right  # the first that sees the first key
        begin = tl.minimum(tl.maximum(row, 0), n_queries) // BLOCK_Q * BLOCK_Q
        open_begin = tl.minimum(tl.cdiv(tl.maximum(row + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q, n_queries)
        if BAND == BOTH_BANDS:
            end = tl.maximum(tl.minimum(n_queries, start_k + BLOCK_K - offset + left), 0)
            open_begin = end
    end = tl.where(start_k < n_keys, end, 0)
    return begin, tl.minimum(open_begin, end), end


@triton.jit
def bend(
    scores, start_q, start_k, di, dj, offset, softcap, slope,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """Soft cap and linear bias of base-2 scores (A, B), or with a soft cap of scores over the cap.

    di, dj: indices in the tile, (A, 1) and (1, B) or the reverse. softcap and slope: times log2(e).
    """
    if HAS_SOFTCAP:
        scores = tanh(scores) * softcap
    if HAS_ALIBI:
        scores -= slope * tl.abs((di - dj + (start_q - start_k + offset)).to(tl.float32))
    return scores


@triton.jit
def cap_slope(capped, softcap):
    """Derivative of the soft cap, 1 - tanh^2, at scores that `bend` has capped."""
    ratio = capped * (1.0 / softcap)
    return 1.0 - ratio * ratio


@triton.jit
def restrict(
    scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right, mask_ptr, stride_ml, stride_ms,
    BAND: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add a float mask to base-2 scores and put -inf wherever query start_q + di may not attend to key start_k + dj.

    scores: (A, B) in either orientation; di, dj: indices in the tile, (A, 1) and (1, B) or the reverse.
    mask_ptr: start of this head's (L, S) mask, a byte (not zero = may attend) or a float (natural units) an entry.
    """
    inside = (di < n_queries - start_q) & (dj < n_keys - start_k)
    allowed = inside
    if BAND != NO_BAND:
        allowed = allowed & (dj - di <= start_q - start_k + offset + right)
    if BAND == BOTH_BANDS:
        allowed = allowed & (dj - di >= start_q - start_k + offset - left)
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
def load_statistics(row_max_ptr, row_sum_ptr, delta_ptr, offs, n_queries):
    """Of the queries `offs`: the pivot of the exponentials, one over their sum (0 where there is none), and delta."""
    inside = offs < n_queries
    row_max = tl.load(row_max_ptr + offs, mask=inside, other=0.0)
    row_sum = tl.load(row_sum_ptr + offs, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + offs, mask=inside, other=0.0)
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    empty = row_sum == 0.0
    return pivot, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum)), delta
