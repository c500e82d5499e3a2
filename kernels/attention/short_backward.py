"""Fused attention for short sequences: the backward kernel.

Formulas as in general_backward.py, but nothing is kept for them: P is computed again from Q, K and the rules, with the
whole row of scores at hand, and delta as rowsum(P dP). A program owns all that its key heads get from their query
heads: no atomics.

Work of one head: 10 L S E flops (E = Ev), on tiles rounded up. Bytes: Q, K, V, dO, dQ, dK and dV, once each.
"""

import torch
import triton
import triton.language as tl

from kernels.again import run_kernel
from kernels.attention.arguments import for_kernel, shape_of, strided
from kernels.attention.call import Call
from kernels.attention.layout import is_wide
from kernels.attention.pieces import dropout_factors, keys_in_use, zero_nonfinite
from kernels.attention.score import CARE, find_head, score_gradient
from kernels.attention.short import (
    bounds_of_rows,
    find_columns,
    find_rows,
    load_tiles,
    products,
    row_exponentials,
    short_grid,
    short_options,
    short_scores,
    store_tiles,
)
from kernels.attention.tiles import ShortTile
from kernels.launch import launch_on, settle


@triton.jit
def short_backward_kernel(
    query,
    key,
    value,
    grad,
    dq,
    dk,
    dv,
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
    """dk and dv of HEADS * PACK key heads, and dq of their queries. grad: dO. The rest as in short_forward_kernel."""
    queries = find_rows(shape.L, shape, BLOCK_L, HEADS, PACK)
    keys = find_rows(shape.S, shape, BLOCK_S, HEADS, PACK)
    columns = find_columns(queries, shape.S, BLOCK_S, PACK)
    bounds = bounds_of_rows(call, shape, queries.b)
    used = keys.there & (keys.place < keys_in_use(call, keys.b, shape.S))
    k = load_tiles(key, keys, keys.h, used, E, BLOCK_E)
    v = load_tiles(value, keys, keys.h, used, EV, BLOCK_EV)
    acc_k = tl.zeros((HEADS, BLOCK_S, BLOCK_E), tl.float32)
    acc_v = tl.zeros((HEADS, BLOCK_S, BLOCK_EV), tl.float32)

    for member in range(0, shape.group):
        h = queries.h * shape.group + member
        head = find_head(call, queries.b.to(tl.int64), h.to(tl.int64), queries.b * shape.n_heads + h)
        q = load_tiles(query, queries, h, queries.there, E, BLOCK_E)
        do = load_tiles(grad, queries, h, queries.there, EV, BLOCK_EV)
        scores, capped = short_scores(q, k, call, head, bounds, queries.place, columns, EXACT, PACK, PRECISION)
        weights, row_sum = row_exponentials(scores, call, EXACT)
        forbidden = scores == float("-inf")  # as `score_gradient` asks, so that scores need not be kept for it
        weights = tl.where(forbidden, 0.0, weights / row_sum)  # not NaN throughout where the query is
        dp = products(do, tl.permute(v, (0, 2, 1)), None, PRECISION)
        dropped = weights
        if call.seed is not None:
            factors = dropout_factors(call, head, queries.place, columns.place, PACK > 1)
            dp *= factors
            dropped = weights * factors
        dp = tl.where(forbidden, 0.0, dp)  # it is NaN where a forbidden value is
        delta = tl.sum(weights * dp, 2)[:, :, None]
        ds = score_gradient(weights, dp, delta, scores, capped, call, True, CARE).to(k.dtype)
        if PACK > 1:  # NaN of one sequence must not reach the next one; its own get it through ds and dropped
            finite = tl.min((tl.abs(do) < float("inf")).to(tl.int32), 2)[:, :, None]
            dropped = tl.where((finite == 0) & ~forbidden, float("nan"), dropped)
            do = zero_nonfinite(do)
            q = zero_nonfinite(q)
        acc_v = products(tl.permute(dropped.to(do.dtype), (0, 2, 1)), do, acc_v, PRECISION)
        acc_k = products(tl.permute(ds, (0, 2, 1)), q, acc_k, PRECISION)
        finite_k = k
        if call.right is not None or call.attn_mask is not None or PACK > 1:
            finite_k = zero_nonfinite(k)  # an allowed key that is NaN has made ds NaN already
        found = products(ds, finite_k, None, PRECISION) * call.scale
        store_tiles(dq, found, queries, h, E, BLOCK_E)

    store_tiles(dk, acc_k * call.scale, keys, keys.h, E, BLOCK_E)
    store_tiles(dv, acc_v, keys, keys.h, EV, BLOCK_EV)


settle(short_backward_kernel)


def launch_short_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    tile: ShortTile,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Launch the backward kernel.

    Args:
        grad: (B, Hq, L, Ev), gradient of the output, any strides.
        query, key, value, call: as given to the forward.
        dq, dk, dv: gradients to write, any strides, shaped as their tensors.
    """
    grad = grad.contiguous() if is_wide(grad) else grad
    with launch_on(query.device):
        run_kernel(
            short_backward_kernel,
            short_grid(query, key, tile),
            *(strided(x, call) for x in (query, key, value, grad, dq, dk, dv)),
            for_kernel(call),
            shape_of(query, key, call),
            **short_options(query, key, value, call, tile),
        )
