"""The pieces that the attention kernels are made of: tiles of matrices, products, and the rules of rules.py.

What a step costs is mostly its arithmetic a score, so scores are made with as little of it as a call allows. Where
nothing is added to them, they stay products of Q and K, and scale and log2(e) go into the one multiply-add before exp2:
exp(scale s - m) = exp2(factor s - m log2(e)). Else they are in natural units, and the factor is log2(e). The scale is
above 0 (`positive_scale` in general.py), so the largest product is the largest score.

EXACT: scores are in natural units, and a row's largest is subtracted before anything else: under a float mask, since
the largest float32 numbers would not be the same after a multiplication, and for float32 inputs, whose weights would
show the rounding of large scores.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL_MASK, FLOAT_MASK = (tl.constexpr(i) for i in range(3))
NO_BAND, UPPER_BAND, BOTH_BANDS = (tl.constexpr(i) for i in range(3))  # of the diagonals a query may attend to
OPEN, CUT, CARE = (tl.constexpr(i) for i in range(3))  # passes over a program's tiles, see `tiles_of_pass`
DROPOUT_ROUNDS = tl.constexpr(7)  # of Philox 4x32: as many as pass every test of Salmon et al. 2011 (table 2)


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
    ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows from `start` and columns from `start_col` of a matrix as a tile (ROWS, BLOCK), zero past its end.

    The tile's start is a 64-bit offset; offsets inside it are 32-bit, to save registers, unless rows are WIDE apart.
    WHOLE: all of its rows are there.
    """
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    pointers = ptr + tl.cast(start, tl.int64) * stride_row + tl.cast(start_col, tl.int64) * stride_col
    inside = rows < n_rows - start
    cols_inside = cols < N_COLS - start_col
    if WIDE:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    pointers += rows * stride_row + cols * stride_col
    if WHOLE and N_COLS % BLOCK == 0:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=cols_inside, other=0.0)
    elif N_COLS % BLOCK == 0:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers, mask=inside & cols_inside, other=0.0)


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
    """Which keys the queries from start_q on need: [begin, end), of which [open_begin, open_end) stand in whole tiles
    that no edge of the band cuts. All but end are multiples of BLOCK_K. Keys of other tiles are never read.
    """
    begin, end, open_begin, open_end = 0, n_keys, 0, n_keys
    if BAND != NO_BAND:
        place = start_q + offset
        end = tl.maximum(tl.minimum(n_keys, place + BLOCK_Q + right), 0)
        open_end = tl.maximum(tl.minimum(n_keys, place + 1 + right), 0)
        if BAND == BOTH_BANDS:
            begin = tl.maximum(place - left, 0) // BLOCK_K * BLOCK_K
            open_begin = tl.cdiv(tl.maximum(place + BLOCK_Q - 1 - left, 0), BLOCK_K) * BLOCK_K
    return begin, end, open_begin, tl.maximum(open_end // BLOCK_K * BLOCK_K, open_begin)


@triton.jit
def query_range(
    start_k, n_queries, n_keys, offset, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Which queries may attend to the keys from start_k on: as `key_range`, in multiples of BLOCK_Q."""
    begin, end, open_begin, open_end = 0, n_queries, 0, n_queries
    if BAND != NO_BAND:
        row = start_k - offset - right  # the first that sees the first key
        begin = tl.minimum(tl.maximum(row, 0), n_queries) // BLOCK_Q * BLOCK_Q
        open_begin = tl.cdiv(tl.maximum(row + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q
        if BAND == BOTH_BANDS:
            end = tl.maximum(tl.minimum(n_queries, start_k + BLOCK_K - offset + left), 0)
            open_end = tl.maximum(tl.minimum(n_queries, start_k + 1 - offset + left), 0)
    end = tl.where(start_k < n_keys, end, 0)
    open_end = tl.minimum(open_end, end)
    return begin, end, open_begin, tl.maximum(open_end // BLOCK_Q * BLOCK_Q, open_begin)


@triton.jit
def open_to_all(begin, open_begin, open_end, is_whole, MASK: tl.constexpr):
    """The open tiles of a program, none where it has a mask to load and its own rows are not a whole tile."""
    if MASK != NO_MASK:
        open_begin = tl.where(is_whole, open_begin, begin)
        open_end = tl.where(is_whole, open_end, begin)
    return open_begin, open_end


@triton.jit
def tiles_of_pass(begin, end, open_begin, open_end, again, PASS: tl.constexpr):
    """Where a pass over the tiles begins and ends, in places that count the open tiles first, see `start_of_tile`.

    A kernel walks in passes, each a loop of its own, as lean as what it meets allows: first whole tiles that no edge
    cuts (OPEN), then the others (CUT). That NaN and Inf stay behind a mask costs instructions that hardly a call needs:
    the first two passes let them through, and where one came out (`again`), everything is done once more with CARE.
    """
    n_open = open_end - open_begin
    if PASS == OPEN:
        return begin, begin + n_open
    elif PASS == CUT:
        return begin + n_open, end
    else:
        return begin, tl.where(again, end, begin)


@triton.jit
def start_of_tile(place, begin, open_begin, open_end, PASS: tl.constexpr):
    """The first row of a tile."""
    n_open = open_end - open_begin
    start = place - n_open
    start += tl.where(start < open_begin, 0, n_open)
    if PASS == OPEN:
        start = place + (open_begin - begin)
    elif PASS == CARE:
        start = tl.where(place < begin + n_open, place + (open_begin - begin), start)
    return start


@triton.jit
def is_spoilt(x):
    """Whether a number in x is NaN or Inf."""
    rows = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
    # The scan is for Triton 3.7 and sm_100, where two reductions in a row of an accumulator fail to compile.
    return tl.max(tl.cumsum(rows, 0), 0) != 0


@triton.jit
def bend(
    scores, start_q, start_k, di, dj, offset, softcap, slope,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """Soft cap and linear bias of scores (A, B), before a soft cap over the cap. di, dj: as in `restrict`."""
    if HAS_SOFTCAP:
        scores = tanh(scores) * softcap
    if HAS_ALIBI:
        place = (di + (start_q - start_k + offset)).to(tl.float32)
        scores -= slope * tl.abs(place - dj.to(tl.float32))
    return scores


@triton.jit
def cap_slope(capped, softcap):
    """Derivative of the soft cap, 1 - tanh^2, at scores that `bend` has capped."""
    ratio = capped * (1.0 / softcap)
    return 1.0 - ratio * ratio


@triton.jit
def restrict(
    scores, start_q, start_k, di, dj, n_queries, n_keys, offset, left, right, mask_ptr, stride_ml, stride_ms,
    BAND: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Add a float mask to scores and put -inf wherever query start_q + di may not attend to key start_k + dj.

    scores: (A, B) in either orientation; di, dj: indices in the tile, (A, 1) and (1, B) or the reverse.
    mask_ptr: start of this head's (L, S) mask, a byte (not zero = may attend) or a float (natural units) an entry.
    PASS: OPEN tiles are looked at for the mask alone; CARE takes -inf of a mask for more than a number.
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
        is_transposed: tl.constexpr = len(di.shape) == 2 and di.shape[0] == 1
        if is_transposed:  # neighbours in memory are loaded together, keys across
            di, dj = tl.trans(di), tl.trans(dj)
        tile_ptr += di * stride_ml + dj * stride_ms
        if PASS == OPEN:
            entry = tl.load(tile_ptr)
        else:
            entry = tl.load(tile_ptr, mask=tl.trans(inside) if is_transposed else inside, other=0)
        if is_transposed:
            entry = tl.trans(entry)
        if MASK == FLOAT_MASK:
            scores += entry.to(tl.float32)
            if PASS == CARE:  # a key that is NaN or Inf would make the sum NaN
                allowed = allowed & (entry.to(tl.float32) != float("-inf"))
        elif PASS == OPEN:
            scores = tl.where(entry != 0, scores, float("-inf"))
        else:
            allowed = allowed & (entry != 0)
    if PASS != OPEN:
        scores = tl.where(allowed, scores, float("-inf"))
    return scores


@triton.jit
def powers(scores, pivot, factor, EXACT: tl.constexpr):
    """exp of scores less their row's pivot, in natural units if EXACT, else in base 2: see the top of this page."""
    if EXACT:
        return tl.exp2((scores - pivot) * LOG2_E)
    else:
        return tl.exp2(scores * factor - pivot)


@triton.jit
def random_numbers(seed, i, j, head):
    """Four random 32-bit integers, for the queries i and i + 8 and keys j and j + 8 of a head, keys fastest.

    i, j: without their bit of weight 8. Matrix instructions leave these four scores with one thread. Philox 4x32
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.2).
    """
    zero = (i + j) * 0
    return tl.philox(seed, zero + j, zero + i, zero + head, zero, DROPOUT_ROUNDS)


@triton.jit
def dropout_factor(number, drop_below, keep_scale):
    """What dropout multiplies a weight with: 0 where its random number, taken as signed, is less than drop_below."""
    return tl.where(number.to(tl.int32, bitcast=True) >= drop_below, keep_scale, 0.0)


@triton.jit
def dropout_factors(seed, i, j, head, drop_below, keep_scale, BELOW_8: tl.constexpr):
    """Of the weights of queries i and keys j in this head of this batch entry. BELOW_8: so are all i and j.

    The counter is the position itself, so every kernel and every tile size drops the same weights under a seed.
    """
    if BELOW_8:
        number, _, _, _ = random_numbers(seed, i, j, head)
    else:
        a, b, c, d = random_numbers(seed, i & ~8, j & ~8, head)
        number = tl.where((i & 8) != 0, tl.where((j & 8) != 0, d, c), tl.where((j & 8) != 0, b, a))
    return dropout_factor(number, drop_below, keep_scale)


@triton.jit
def spread(a, b, c, d, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Numbers for rows r, r + 8 and columns c, c + 8 of each 16 as one tile (ROWS, COLS)."""
    x = tl.join(tl.join(a, b), tl.join(c, d))  # (ROWS / 2, COLS / 2, column, row)
    x = tl.reshape(x, (ROWS // 16, 8, COLS // 16, 8, 2, 2))
    return tl.reshape(tl.permute(x, (0, 5, 1, 2, 4, 3)), (ROWS, COLS))


@triton.jit
def tile_dropout_factors(
    seed, start_q, start_k, head, drop_below, keep_scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, QUERIES_DOWN: tl.constexpr,
):  # fmt: skip
    """`dropout_factors` of a whole tile, a random call for four: queries down and keys across, or the reverse."""
    down, across = tl.arange(0, ROWS // 2), tl.arange(0, COLS // 2)
    down = (down // 8 * 16 + down % 8)[:, None]  # those without the bit of weight 8
    across = (across // 8 * 16 + across % 8)[None, :]
    if QUERIES_DOWN:
        a, b, c, d = random_numbers(seed, start_q + down, start_k + across, head)
        number = spread(a, b, c, d, ROWS, COLS)
    else:
        a, b, c, d = random_numbers(seed, start_q + across, start_k + down, head)
        number = spread(a, c, b, d, ROWS, COLS)
    return dropout_factor(number, drop_below, keep_scale)


@triton.jit
def load_statistics(
    pivot_ptr, inverse_ptr, delta_ptr, start, n_queries, ROWS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Of the queries from `start` on what `delta_kernel` found: pivots, inverses of sums if EXACT, deltas.

    Queries past the end weigh nothing.
    """
    offs = start + tl.arange(0, ROWS)
    inside = offs < n_queries
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if WHOLE:
        pivot, delta = tl.load(pivot_ptr + offs), tl.load(delta_ptr + offs)
        if EXACT:
            inverse = tl.load(inverse_ptr + offs)
    else:
        pivot = tl.load(pivot_ptr + offs, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + offs, mask=inside, other=0.0)
        if EXACT:
            inverse = tl.load(inverse_ptr + offs, mask=inside, other=0.0)
    return pivot, inverse, delta
