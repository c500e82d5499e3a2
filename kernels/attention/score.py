"""The scores of a tile, and the gradient of them: what `Call` asks for, in Triton. One definition for every kernel.

What a step costs is mostly its arithmetic a score, so scores are made with as little of it as a call allows. Where
nothing is added to them, they stay products of Q and K, and scale and log2(e) go into the one multiply-add before exp2:
exp(scale s - m) = exp2(factor s - m log2(e)). Else they are in natural units, and the factor is log2(e). The scale is
above 0 (`_positive_scale` in ops.py), so the largest product is the largest score.

EXACT: scores are in natural units, and a row's largest is subtracted before anything else: under a float mask, since
the largest float32 numbers would not be the same after a multiplication, and for float32 inputs, whose weights would
show the rounding of large scores.

A field of `call` that is not asked for is None, and what is done for it is not compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
OPEN, CUT, CARE = (tl.constexpr(i) for i in range(3))  # passes over a program's tiles, see `tiles_of_pass`


class Bounds(NamedTuple):
    """Of a batch entry: its first query and key among packed ones, how many it has, the offset of its places."""

    first_q: Any
    first_k: Any
    n_queries: Any
    n_keys: Any
    offset: Any


class Head(NamedTuple):
    """What a call says about one query head of one batch entry.

    number: over batch entries and heads. mask_ptr: start of its (L, S) mask. Each 0 where the call has none.
    """

    number: Any
    mask_ptr: Any
    slope: Any
    seed: Any


class Where(NamedTuple):
    """Where a tile of scores stands: query start_q + di and key start_k + dj.

    di, dj: indices in the tile, (A, 1) and (1, B) or the reverse.
    """

    start_q: Any
    start_k: Any
    di: Any
    dj: Any


@triton.jit
def find_head(call, b, h, number):
    """`Head` of query head h of batch entry b, 64-bit integers."""
    mask_ptr, slope, seed = 0, 0.0, 0
    if call.attn_mask is not None:
        mask_ptr = call.attn_mask.ptr + b * call.attn_mask.stride_b + h * call.attn_mask.stride_h
    if call.alibi_slopes is not None:
        slope = tl.load(call.alibi_slopes.ptr + b * call.alibi_slopes.stride_b + h * call.alibi_slopes.stride_h)
    if call.seed is not None:
        seed = tl.load(call.seed.ptr)
    return Head(number, mask_ptr, slope, seed)


@triton.jit
def stays_product(call, EXACT: tl.constexpr):
    """Whether nothing is done to products of Q and K, so that scaling them can wait, see the top of this page."""
    return call.softcap is None and call.alibi_slopes is None and not EXACT


@triton.jit
def exponent_factor(call, EXACT: tl.constexpr):
    """What scores are multiplied with for exp2."""
    if stays_product(call, EXACT):
        return call.scale * LOG2_E
    else:
        return LOG2_E


@triton.jit
def exponentials(scores, pivot, factor, EXACT: tl.constexpr):
    """exp of scores less their row's pivot, in natural units if EXACT, else in base 2."""
    if EXACT:
        return tl.exp2((scores - pivot) * LOG2_E)
    else:
        return tl.exp2(scores * factor - pivot)


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
def tile_scores(products, call, head, bounds, where, EXACT: tl.constexpr, WIDE: tl.constexpr, PASS: tl.constexpr):
    """Scores of a tile from products of its queries and keys, -inf wherever a query may not attend.

    products: (A, B) in either orientation. WIDE: offsets in the mask need 64 bits. PASS: OPEN tiles are looked at for
    the mask alone; CARE takes -inf of a mask for more than a number.

    Returns:
        scores, and what they were after the soft cap, which `score_gradient` asks for.
    """
    scores = products
    if call.softcap is not None:
        scores = tanh(scores * (call.scale / call.softcap)) * call.softcap
    elif not stays_product(call, EXACT):
        scores *= call.scale
    capped = scores
    if call.alibi_slopes is not None:
        place = (where.di + (where.start_q - where.start_k + bounds.offset)).to(tl.float32)
        scores -= head.slope * tl.abs(place - where.dj.to(tl.float32))
    # Where a query may attend.
    inside = (where.di < bounds.n_queries - where.start_q) & (where.dj < bounds.n_keys - where.start_k)
    allowed = inside
    if call.right is not None:
        allowed = allowed & (where.dj - where.di <= where.start_q - where.start_k + bounds.offset + call.right)
    if call.left is not None:
        allowed = allowed & (where.dj - where.di >= where.start_q - where.start_k + bounds.offset - call.left)
    if call.attn_mask is not None:
        entry = mask_entries(call.attn_mask, head.mask_ptr, where, inside, WIDE, PASS)
        if call.attn_mask.ptr.dtype.element_ty == tl.uint8:
            if PASS == OPEN:
                scores = tl.where(entry != 0, scores, float("-inf"))
            else:
                allowed = allowed & (entry != 0)
        else:
            scores += entry.to(tl.float32)
            if PASS == CARE:  # a key that is NaN or Inf would make the sum NaN
                allowed = allowed & (entry.to(tl.float32) != float("-inf"))
    if PASS != OPEN:
        scores = tl.where(allowed, scores, float("-inf"))
    return scores, capped


@triton.jit
def mask_entries(mask, mask_ptr, where, inside, WIDE: tl.constexpr, PASS: tl.constexpr):
    """The entries of a head's mask, a byte (not zero = may attend) or a float (natural units), for a tile of scores."""
    di, dj = where.di, where.dj
    tile_ptr = mask_ptr + tl.cast(where.start_q, tl.int64) * mask.stride_row
    tile_ptr += tl.cast(where.start_k, tl.int64) * mask.stride_col
    if WIDE:
        di, dj = di.to(tl.int64), dj.to(tl.int64)
    is_transposed: tl.constexpr = len(di.shape) == 2 and di.shape[0] == 1
    if is_transposed:  # neighbours in memory are loaded together, keys across
        di, dj = tl.trans(di), tl.trans(dj)
    tile_ptr += di * mask.stride_row + dj * mask.stride_col
    if PASS == OPEN:
        entry = tl.load(tile_ptr)
    else:
        entry = tl.load(tile_ptr, mask=tl.trans(inside) if is_transposed else inside, other=0)
    return tl.trans(entry) if is_transposed else entry


@triton.jit
def score_gradient(weights, dp, delta, scores, capped, call, OF_PRODUCTS: tl.constexpr, PASS: tl.constexpr):
    """Gradient of the scores, weights (dp - delta), or, if OF_PRODUCTS, of scale times the products they are made of.

    dp: gradient of the weights; delta: of a row, its mean under the weights. scores, capped: what `tile_scores` gave.
    """
    ds = weights * (dp - delta)
    if OF_PRODUCTS and call.softcap is not None:
        ratio = capped * (1.0 / call.softcap)  # tanh, whose derivative is 1 - tanh^2
        ds *= 1.0 - ratio * ratio
    if PASS == CARE:
        ds = tl.where(scores == float("-inf"), 0.0, ds)  # dp is NaN where a forbidden value is
    return ds
