"""The pieces that the attention kernels are made of: tiles of matrices, products, which tiles to walk, dropout."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.attention.score import CARE, CUT, OPEN, Bounds

DROPOUT_ROUNDS = tl.constexpr(7)  # of Philox 4x32: as many as pass every test of Salmon et al. 2011 (table 2)


class Strided(NamedTuple):
    """A tensor (B, H, rows, columns) as kernels take it: where it starts, how far apart neighbours are on each axis."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_row: Any
    stride_col: Any


class Shape(NamedTuple):
    """Batch entries, query heads, query heads that share a key head, queries, keys; of packed sequences the most."""

    batch: Any
    n_heads: Any
    group: Any
    L: Any
    S: Any


class Statistics(NamedTuple):
    """What the backward kernels know of each query row, (B, H, L) float32 each, see `delta_kernel`."""

    pivot_ptr: Any
    inverse_ptr: Any
    delta_ptr: Any
    stride_b: Any
    stride_h: Any


class Dropout(NamedTuple):
    """drop_below: a weight is dropped if its random number, a signed one, is less. keep_scale: what the others take."""

    drop_below: Any
    keep_scale: Any


class Walk(NamedTuple):
    """Which keys, or queries, a program walks along: [begin, end), of which [open_begin, open_end) stand in whole tiles
    that no edge cuts. All but end are multiples of a tile's rows.
    """

    begin: Any
    end: Any
    open_begin: Any
    open_end: Any


@triton.jit
def find_work(number, n_heads, n_tiles, section):
    """Head and tile of piece of work `number`: the tiles of `section` heads at a time, one of each head in turn."""
    section = tl.minimum(section, n_heads)  # so that the product below fits 32 bits
    first = number // (section * n_tiles) * section
    size = tl.minimum(section, n_heads - first)
    rest = number - first * n_tiles
    return first + rest % size, rest // size


@triton.jit
def find_queries(call, shape, section, CHUNKS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Of this program: chunk of columns, batch entry and head (64-bit), first query of its tile."""
    n_tiles = tl.cdiv(shape.L, BLOCK_Q)
    head, tile = find_work(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, section)
    if call.right is not None:
        tile = n_tiles - 1 - tile  # the longest rows first, so that no straggler starts last
    chunk = head % CHUNKS
    head //= CHUNKS
    return chunk, (head // shape.n_heads).to(tl.int64), (head % shape.n_heads).to(tl.int64), tile * BLOCK_Q


@triton.jit
def at_head(x, b, h, first):
    """x with its pointer at row `first` of a head."""
    ptr = x.ptr + b * x.stride_b + h * x.stride_h + first * x.stride_row
    return Strided(ptr, x.stride_b, x.stride_h, x.stride_row, x.stride_col)


@triton.jit
def load_rows(
    x,
    start,
    n_rows,
    start_col,
    ROWS: tl.constexpr,
    N_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Rows from `start` and columns from `start_col` of a head of x as a tile (ROWS, BLOCK), zero past its end.

    The tile's start is a 64-bit offset; offsets inside it are 32-bit, to save registers, unless rows are WIDE apart.
    WHOLE: all of its rows are there.
    """
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    pointers = x.ptr + tl.cast(start, tl.int64) * x.stride_row + tl.cast(start_col, tl.int64) * x.stride_col
    inside = rows < n_rows - start
    cols_inside = cols < N_COLS - start_col
    if WIDE:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    pointers += rows * x.stride_row + cols * x.stride_col
    if WHOLE and N_COLS % BLOCK == 0:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=cols_inside, other=0.0)
    elif N_COLS % BLOCK == 0:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers, mask=inside & cols_inside, other=0.0)


@triton.jit
def store_rows(x, tile, start, n_rows, start_col, ROWS: tl.constexpr, N_COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile (ROWS, BLOCK) to rows from `start` and columns from `start_col` of a head of x, up to its end."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    pointers = x.ptr + (tl.cast(start, tl.int64) + rows) * x.stride_row
    pointers += tl.cast(start_col, tl.int64) * x.stride_col + cols.to(tl.int64) * x.stride_col
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=(rows < n_rows - start) & (cols < N_COLS - start_col))


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
    a,
    start_a,
    n_a,
    b,
    start_b,
    n_b,
    ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr,
    N_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A B^T (ROWS_A, ROWS_B) for rows of two heads that are too wide for one tile, BLOCK columns at a time."""
    acc = tl.zeros((ROWS_A, ROWS_B), tl.float32)
    for start_col in range(0, N_COLS, BLOCK):
        rows_a = load_rows(a, start_a, n_a, start_col, ROWS_A, N_COLS, BLOCK, WIDE)
        rows_b = load_rows(b, start_b, n_b, start_col, ROWS_B, N_COLS, BLOCK, WIDE)
        acc = dot(rows_a, tl.trans(rows_b), acc, PRECISION)
    return acc


@triton.jit
def keys_in_use(call, b, n_keys):
    """How many of n_keys keys the batch entries b use."""
    if call.key_lengths is not None:
        in_use = tl.load(call.key_lengths.ptr + b * call.key_lengths.stride_b).to(tl.int32)
        n_keys = tl.maximum(tl.minimum(n_keys, in_use), 0)
    return n_keys


@triton.jit
def batch_bounds(call, shape, b):
    """`Bounds` of batch entry b."""
    first_q = tl.zeros((), tl.int64)
    first_k = tl.zeros((), tl.int64)
    n_queries, n_keys = shape.L, shape.S
    if call.query_starts is not None:
        first_q = tl.load(call.query_starts.ptr + b).to(tl.int64)
        first_k = tl.load(call.key_starts.ptr + b).to(tl.int64)
        n_queries = (tl.load(call.query_starts.ptr + b + 1) - first_q).to(tl.int32)
        n_keys = (tl.load(call.key_starts.ptr + b + 1) - first_k).to(tl.int32)
    n_keys = keys_in_use(call, b, n_keys)
    offset = 0
    if call.bottom_right is not None:
        offset = n_keys - n_queries
    return Bounds(first_q, first_k, n_queries, n_keys, offset)


@triton.jit
def keys_to_walk(call, bounds, start_q, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The keys that the BLOCK_Q queries from start_q on need. Keys of other tiles are never read."""
    begin, end, open_begin, open_end = 0, bounds.n_keys, 0, bounds.n_keys
    if call.right is not None:
        place = start_q + bounds.offset
        end = tl.maximum(tl.minimum(bounds.n_keys, place + BLOCK_Q + call.right), 0)
        open_end = tl.maximum(tl.minimum(bounds.n_keys, place + 1 + call.right), 0)
        if call.left is not None:
            begin = tl.maximum(place - call.left, 0) // BLOCK_K * BLOCK_K
            open_begin = tl.cdiv(tl.maximum(place + BLOCK_Q - 1 - call.left, 0), BLOCK_K) * BLOCK_K
    open_end = tl.maximum(open_end // BLOCK_K * BLOCK_K, open_begin)
    return open_to_all(begin, end, open_begin, open_end, call, start_q + BLOCK_Q <= bounds.n_queries)


@triton.jit
def queries_to_walk(call, bounds, start_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The queries that may attend to the BLOCK_K keys from start_k on."""
    begin, end, open_begin, open_end = 0, bounds.n_queries, 0, bounds.n_queries
    if call.right is not None:
        row = start_k - bounds.offset - call.right  # the first that sees the first key
        begin = tl.minimum(tl.maximum(row, 0), bounds.n_queries) // BLOCK_Q * BLOCK_Q
        open_begin = tl.cdiv(tl.maximum(row + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q
        if call.left is not None:
            end = tl.maximum(tl.minimum(bounds.n_queries, start_k + BLOCK_K - bounds.offset + call.left), 0)
            open_end = tl.maximum(tl.minimum(bounds.n_queries, start_k + 1 - bounds.offset + call.left), 0)
    end = tl.where(start_k < bounds.n_keys, end, 0)
    open_end = tl.minimum(open_end, end)
    open_end = tl.maximum(open_end // BLOCK_Q * BLOCK_Q, open_begin)
    return open_to_all(begin, end, open_begin, open_end, call, start_k + BLOCK_K <= bounds.n_keys)


@triton.jit
def open_to_all(begin, end, open_begin, open_end, call, is_whole):
    """The walk, without open tiles where there is a mask to load and the program's own rows are not a whole tile."""
    if call.attn_mask is not None:
        open_begin = tl.where(is_whole, open_begin, begin)
        open_end = tl.where(is_whole, open_end, begin)
    return Walk(begin, end, open_begin, open_end)


@triton.jit
def steps_of_pass(walk, again, PASS: tl.constexpr):
    """Where a pass over the tiles begins and ends, in steps that count the open tiles first, see `start_of_tile`.

    A kernel walks in passes, each a loop of its own, as lean as what it meets allows: first whole tiles that no edge
    cuts (OPEN), then the others (CUT). That NaN and Inf stay behind a mask costs instructions that hardly a call needs:
    the first two passes let them through, and where one came out (`again`), everything is done once more with CARE.
    """
    n_open = walk.open_end - walk.open_begin
    if PASS == OPEN:
        return walk.begin, walk.begin + n_open
    elif PASS == CUT:
        return walk.begin + n_open, walk.end
    else:
        return walk.begin, tl.where(again, walk.end, walk.begin)


@triton.jit
def start_of_tile(walk, step, PASS: tl.constexpr):
    """The first row of the tile of a step."""
    n_open = walk.open_end - walk.open_begin
    start = step - n_open
    start += tl.where(start < walk.open_begin, 0, n_open)
    if PASS == OPEN:
        start = step + (walk.open_begin - walk.begin)
    elif PASS == CARE:
        start = tl.where(step < walk.begin + n_open, step + (walk.open_begin - walk.begin), start)
    return start


@triton.jit
def has_nonfinite(x):
    """Whether a number in x is NaN or Inf."""
    rows = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
    # The scan is for Triton 3.7 and sm_100, where two reductions in a row of an accumulator fail to compile.
    return tl.max(tl.cumsum(rows, 0), 0) != 0


@triton.jit
def random_numbers(head, i, j):
    """Four random 32-bit integers, for the queries i and i + 8 and keys j and j + 8 of a head, keys fastest.

    i, j: without their bit of weight 8. Matrix instructions leave these four scores with one thread. Philox 4x32
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.2).
    """
    zero = (i + j) * 0
    return tl.philox(head.seed, zero + j, zero + i, zero + head.number, zero, DROPOUT_ROUNDS)


@triton.jit
def dropout_factor(number, dropout):
    """What dropout multiplies a weight of this random number with."""
    return tl.where(number.to(tl.int32, bitcast=True) >= dropout.drop_below, dropout.keep_scale, 0.0)


@triton.jit
def dropout_factors(call, head, i, j, BELOW_8: tl.constexpr):
    """Of the weights of a head's queries i and keys j. BELOW_8: so are all i and j.

    The counter is the position itself, so every kernel and every tile size drops the same weights under a seed.
    """
    if BELOW_8:
        number, _, _, _ = random_numbers(head, i, j)
    else:
        a, b, c, d = random_numbers(head, i & ~8, j & ~8)
        number = tl.where((i & 8) != 0, tl.where((j & 8) != 0, d, c), tl.where((j & 8) != 0, b, a))
    return dropout_factor(number, call.dropout_p)


@triton.jit
def spread(a, b, c, d, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Numbers for rows r, r + 8 and columns c, c + 8 of each 16 as one tile (ROWS, COLS)."""
    x = tl.join(tl.join(a, b), tl.join(c, d))  # (ROWS / 2, COLS / 2, column, row)
    x = tl.reshape(x, (ROWS // 16, 8, COLS // 16, 8, 2, 2))
    return tl.reshape(tl.permute(x, (0, 5, 1, 2, 4, 3)), (ROWS, COLS))


@triton.jit
def tile_dropout_factors(
    call, head, start_q, start_k, ROWS: tl.constexpr, COLS: tl.constexpr, QUERIES_DOWN: tl.constexpr
):
    """`dropout_factors` of a whole tile, a random call for four: queries down and keys across, or the reverse."""
    down, across = tl.arange(0, ROWS // 2), tl.arange(0, COLS // 2)
    down = (down // 8 * 16 + down % 8)[:, None]  # those without the bit of weight 8
    across = (across // 8 * 16 + across % 8)[None, :]
    if QUERIES_DOWN:
        a, b, c, d = random_numbers(head, start_q + down, start_k + across)
        number = spread(a, b, c, d, ROWS, COLS)
    else:
        a, b, c, d = random_numbers(head, start_q + across, start_k + down)
        number = spread(a, c, b, d, ROWS, COLS)
    return dropout_factor(number, call.dropout_p)


@triton.jit
def load_statistics(statistics, first, start, n_queries, ROWS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr):
    """Of the queries from `start` on what `delta_kernel` found: pivots, inverses of sums if EXACT, deltas.

    first: where the head's numbers begin. Queries past the end weigh nothing. WHOLE: none is past it.
    """
    offs = start + tl.arange(0, ROWS)
    inside = offs < n_queries
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if WHOLE:
        pivot = tl.load(statistics.pivot_ptr + first + offs)
        delta = tl.load(statistics.delta_ptr + first + offs)
        if EXACT:
            inverse = tl.load(statistics.inverse_ptr + first + offs)
    else:
        pivot = tl.load(statistics.pivot_ptr + first + offs, mask=inside, other=float("inf"))
        delta = tl.load(statistics.delta_ptr + first + offs, mask=inside, other=0.0)
        if EXACT:
            inverse = tl.load(statistics.inverse_ptr + first + offs, mask=inside, other=0.0)
    return pivot, inverse, delta
