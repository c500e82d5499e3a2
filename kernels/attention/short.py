"""Fused attention for short sequences: many heads a program. The forward kernel, and the pieces its backward shares.

    O = dropout(softmax(scale * Q K^T + mask)) V

for L and S up to 64. A head is then a few KiB, and what counts is bytes: a program takes HEADS x PACK key heads with
all their query heads, in batched products, and holds all their scores, so that the softmax needs no second look.
Sequences of up to 8 stand PACK = 16 // length behind one another in tiles of 16 rows, the least that a matrix
instruction takes; of their scores only the blocks on the diagonal count.

Work of one head: 4 L S E flops (E = Ev), on tiles rounded up. Bytes: Q, K, V and O, once each. No statistics are
written: the backward (short_backward.py) computes the softmax again.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.again import run_kernel
from kernels.attention.arguments import dot_precision, for_kernel, shape_of, strided
from kernels.attention.call import Call
from kernels.attention.pieces import dot, dropout_factors, keys_in_use, zero_nonfinite
from kernels.attention.score import CARE, Bounds, Where, exponent_factor, exponentials, find_head, tile_scores
from kernels.attention.tiles import ShortTile, block_of, whole_columns
from kernels.launch import cdiv, launch_on, settle


class Rows(NamedTuple):
    """Rows of queries, or of keys, of this program's tiles, (HEADS, ROWS, 1) each.

    part: which of its tile's sequences a row belongs to. place: where it stands there. b, h: batch entry and key head;
    of rows that are not there, those of one that is. there: whether there is such a row.
    """

    part: Any
    place: Any
    b: Any
    h: Any
    there: Any


class Columns(NamedTuple):
    """Columns of scores: the keys' places (1, 1, BLOCK_S), and whether they are of one sequence with a query."""

    place: Any
    together: Any


@triton.jit
def split(row, length, PACK: tl.constexpr):
    """Which of its tile's sequences a row belongs to, and its place there."""
    part = row * 0
    if PACK > 1:
        part = row // length
    return part, row - part * length


@triton.jit
def find_rows(length, shape, ROWS: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr):
    """The rows of this program's tiles, for sequences of this length."""
    n_kv_heads = shape.n_heads // shape.group
    n_sequences = shape.batch * n_kv_heads
    part, place = split(tl.arange(0, ROWS)[None, :, None], length, PACK)
    tile = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None, None]
    sequence = tile * PACK + part
    there = (sequence < n_sequences) & (place < length) & (part < PACK)
    sequence = tl.minimum(sequence, n_sequences - 1)
    return Rows(part, place, sequence // n_kv_heads, sequence % n_kv_heads, there)


@triton.jit
def find_columns(queries, S, BLOCK_S: tl.constexpr, PACK: tl.constexpr):
    """The columns of the scores of these queries."""
    part, place = split(tl.arange(0, BLOCK_S)[None, None, :], S, PACK)
    return Columns(place, (queries.part == part) & (part < PACK))


@triton.jit
def bounds_of_rows(call, shape, b):
    """`Bounds` of the batch entries b."""
    n_keys = keys_in_use(call, b, b * 0 + shape.S)
    offset = 0
    if call.bottom_right is not None:
        offset = n_keys - shape.L
    return Bounds(0, 0, shape.L, n_keys, offset)


@triton.jit
def pointers_of(x, rows, h, BLOCK: tl.constexpr):
    """Where the entries of tiles (HEADS, ROWS, BLOCK) of heads h of x stand. 64 bits to the head."""
    col = tl.arange(0, BLOCK)[None, None, :]
    head_ptr = x.ptr + (rows.b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h)
    return head_ptr + (rows.place * x.stride_row + col * x.stride_col)


@triton.jit
def within(there, N: tl.constexpr, BLOCK: tl.constexpr):
    """Which entries of tiles (HEADS, ROWS, BLOCK) are there, of rows with N columns."""
    if N % BLOCK != 0:
        there = there & (tl.arange(0, BLOCK)[None, None, :] < N)
    return there


@triton.jit
def load_tiles(x, rows, h, there, N: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles (HEADS, ROWS, BLOCK) of heads h of x, zero where rows are not there."""
    return tl.load(pointers_of(x, rows, h, BLOCK), mask=within(there, N, BLOCK), other=0.0)


@triton.jit
def store_tiles(x, tiles, rows, h, N: tl.constexpr, BLOCK: tl.constexpr):
    """Write tiles (HEADS, ROWS, BLOCK) to heads h of x."""
    tl.store(pointers_of(x, rows, h, BLOCK), tiles.to(x.ptr.dtype.element_ty), mask=within(rows.there, N, BLOCK))


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
def short_scores(
    q, k, call, head, bounds, i, columns, EXACT: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores (HEADS, BLOCK_L, BLOCK_S) of queries at places i, -inf where one may not attend; those after the cap."""
    found = products(q, tl.permute(k, (0, 2, 1)), None, PRECISION)
    where = Where(0, 0, i, columns.place)
    scores, capped = tile_scores(found, call, head, bounds, where, EXACT, False, CARE)
    if PACK > 1:
        scores = tl.where(columns.together, scores, float("-inf"))
    return scores, capped


@triton.jit
def row_exponentials(scores, call, EXACT: tl.constexpr):
    """exp(score - the row's largest), and their sum a row, 1 where a query may attend to nothing."""
    factor = exponent_factor(call, EXACT)
    row_max = tl.max(scores, 2)[:, :, None]
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max if EXACT else row_max * factor)
    weights = exponentials(scores, pivot, factor, EXACT)
    row_sum = tl.sum(weights, 2)[:, :, None]
    return weights, tl.where(row_sum == 0.0, 1.0, row_sum)


@triton.jit
def short_forward_kernel(
    query,
    key,
    value,
    out,
    call,
    shape,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HEADS: tl.constexpr,
    PACK: tl.constexpr,
):
    """Output of the queries of HEADS * PACK key heads. Arguments as of forward_kernel."""
    queries = find_rows(shape.L, shape, BLOCK_L, HEADS, PACK)
    keys = find_rows(shape.S, shape, BLOCK_S, HEADS, PACK)
    columns = find_columns(queries, shape.S, BLOCK_S, PACK)
    bounds = bounds_of_rows(call, shape, queries.b)
    used = keys.there & (keys.place < keys_in_use(call, keys.b, shape.S))
    k = load_tiles(key, keys, keys.h, used, E, BLOCK_E)
    v = load_tiles(value, keys, keys.h, used, EV, BLOCK_EV)
    if call.right is not None or call.attn_mask is not None or PACK > 1:
        # A weight of zero times NaN is NaN: take such values out, and give NaN to the rows that may see them.
        finite = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 2)[:, None, :]
        v = zero_nonfinite(v)

    for member in range(0, shape.group):
        h = queries.h * shape.group + member
        head = find_head(call, queries.b.to(tl.int64), h.to(tl.int64), queries.b * shape.n_heads + h)
        q = load_tiles(query, queries, h, queries.there, E, BLOCK_E)
        scores, _ = short_scores(q, k, call, head, bounds, queries.place, columns, EXACT, PACK, PRECISION)
        weights, row_sum = row_exponentials(scores, call, EXACT)
        if call.seed is not None:
            weights *= dropout_factors(call, head, queries.place, columns.place, PACK > 1)
        if call.right is not None or call.attn_mask is not None or PACK > 1:
            weights = tl.where((scores != float("-inf")) & (finite == 0), float("nan"), weights)
        found = products(weights.to(v.dtype), v, None, PRECISION) / row_sum
        store_tiles(out, found, queries, h, EV, BLOCK_EV)


settle(short_forward_kernel)


def short_options(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, tile: ShortTile) -> dict:
    """Compile-time sizes and switches of a launch, and its warps."""
    return {
        "EXACT": call.has_float_mask,  # whole rows are at hand, so that float32 needs no more
        "PRECISION": dot_precision(query.dtype),
        **whole_columns(query.shape[3], value.shape[3]),
        "BLOCK_L": block_of(query.shape[2]),
        "BLOCK_S": block_of(key.shape[2]),
        **tile.options(),
    }


def short_grid(query: torch.Tensor, key: torch.Tensor, tile: ShortTile) -> tuple[int]:
    """Key heads fastest, then batch entries."""
    return (cdiv(query.shape[0] * key.shape[1], tile.heads * tile.pack),)


def launch_short_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, tile: ShortTile, output: torch.Tensor
) -> None:
    """Launch the forward kernel. Arguments as of `launch_forward` in general.py, of a call that is short."""
    with launch_on(query.device):
        run_kernel(
            short_forward_kernel,
            short_grid(query, key, tile),
            strided(query, call),
            strided(key, call),
            strided(value, call),
            strided(output, call),
            for_kernel(call),
            shape_of(query, key, call),
            **short_options(query, key, value, call, tile),
        )
