"""Layer norm and RMS norm forward in one pass over memory, with what often stands before them.

    x = residual + dropout(input)        the input itself where there is no residual
    output = (x - mean(x)) * rstd * weight + bias        rstd = 1 / sqrt(var(x) + eps)
    output = x * rstd * weight                           rstd = 1 / sqrt(mean(x^2) + eps), RMS norm (CENTRE = False)

Mean and biased variance are taken over the N columns of a row, in float32 whatever the dtypes are.
Source: Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4; Zhang and Sennrich 2019, "Root Mean
Square Layer Normalization", section 4, equation 4.

Fused: dropout, the sum, both statistics, the normalisation and the affine map. Each input is read once and each output
written once (rows too long for the registers are read twice). With e bytes an element, M rows move 2 * M * N * e +
12 * M bytes, with a residual 4 * M * N * e + 12 * M (input and residual in, output and x out), and take about 9 * M * N
flops, so memory alone sets the time; the same in separate PyTorch operations moves six times as much.

The variance of a row in registers is the corrected two-pass formula (Chan, Golub and LeVeque 1983, "Algorithms for
Computing the Sample Variance"): the mean of x - mean(x), zero but for rounding, is taken off as well, so
that rows far from 0 keep their digits. x is rounded to the dtype it is kept in before anything is computed from it: the
output is that of the x that the caller gets, and that the backward reads.

Dropout keeps the elements whose random number is at least dropout_p, and the backward draws the same numbers again.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from kernels.again import run_kernel
from kernels.launch import cdiv, launch_on, settle
from kernels.layer_norm.tiles import choose_tile

MAX_ALIGN = 8  # elements of two bytes in the widest load, 16 bytes


@triton.jit
def row_offsets(rows, place, ALIGN: tl.constexpr):
    """Where `rows` (ROWS,) begin: row i is (i // inner // middle, i // inner % middle, i % inner) of a tensor (outer,
    middle, inner, n_cols), whose place is (middle, inner, stride of outer, stride of middle, stride of inner)."""
    outer = rows // place[1]
    inner = rows - outer * place[1]
    middle = outer % place[0]
    outer = outer // place[0]
    offsets = outer * (place[2] // ALIGN * ALIGN) + middle * (place[3] // ALIGN * ALIGN)
    return offsets + inner * (place[4] // ALIGN * ALIGN)


@triton.jit
def kept(seed, rows, start, dropout_p, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps of `rows` (ROWS,) and the BLOCK_N columns from `start` on: bool (ROWS, BLOCK_N).

    One draw of Philox 4x32-10 makes the numbers of four columns. Its counters are row and column: the same elements
    drop whatever the tile.
    """
    fours = tl.arange(0, BLOCK_N // 4)[None, :] + start // 4
    zero = (rows[:, None] + fours).to(tl.int32) * 0
    row_low, row_high = rows.to(tl.int32)[:, None] + zero, (rows >> 32).to(tl.int32)[:, None] + zero
    a, b, c, d = tl.philox(seed, fours.to(tl.int32) + zero, row_low, row_high, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK_N))  # a, b, c, d of each four columns
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def load_sum(
    input_ptr,
    residual_ptr,
    seed_ptr,
    rows,
    input_rows,
    residual_rows,
    start,
    mask,
    dropout_p,
    keep_scale,
    SUM_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x = residual + dropout(input) of `rows` and BLOCK_N columns: float32, rounded to SUM_DTYPE.

    input_rows, residual_rows: (ROWS,), where the rows begin.
    """
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    x = tl.load(input_ptr + input_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        x = tl.where(kept(tl.load(seed_ptr), rows, start, dropout_p, ROWS, BLOCK_N), x * keep_scale, 0.0)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        x = x.to(SUM_DTYPE).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["n_rows"])
def forward_rows_kernel(
    input_ptr,
    residual_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    input_place,
    residual_place,
    eps,
    dropout_p,
    keep_scale,
    CENTRE: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Normalise ROWS whole rows.

    input_ptr, residual_ptr: (n_rows, n_cols), columns contiguous, rows where `input_place` and `residual_place` say
        (see row_offsets); residual_ptr is None for none.
    seed_ptr: (1,) int64, or None for no dropout.
    weight_ptr, bias_ptr: (n_cols,), or None for ones and zeros.
    output_ptr, sum_ptr: (n_rows, n_cols), contiguous; sum_ptr takes x, or is None: not needed.
    mean_ptr: (n_rows, 2) float32, two numbers whose sum is the mean to more digits than one holds; None for RMS norm.
    rstd_ptr: (n_rows,) float32.
    dropout_p, keep_scale: probability of dropping an element of the input, and 1 / (1 - dropout_p).
    CENTRE: layer norm; False for RMS norm.
    SUM_DTYPE: that x is rounded to where there is a residual.
    ALIGN: divides n_cols and the strides; lets the compiler load that many elements at once.
    """
    n_cols = n_cols // ALIGN * ALIGN
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    input_rows = row_offsets(rows, input_place, ALIGN)
    residual_rows = row_offsets(rows, residual_place, ALIGN)
    cols = tl.arange(0, BLOCK_N)
    mask_rows = rows < n_rows
    mask_cols = cols < n_cols
    mask = mask_rows[:, None] & mask_cols[None, :]

    x = load_sum(
        input_ptr,
        residual_ptr,
        seed_ptr,
        rows,
        input_rows,
        residual_rows,
        0,
        mask,
        dropout_p,
        keep_scale,
        SUM_DTYPE,
        ROWS,
        BLOCK_N,
    )
    if sum_ptr is not None:
        tl.store(sum_ptr + rows[:, None] * n_cols + cols[None, :], x.to(sum_ptr.dtype.element_ty), mask=mask)
    if CENTRE:
        mean = tl.sum(x, axis=1) / n_cols  # (ROWS,)
        centred = tl.where(mask_cols[None, :], x - mean[:, None], 0.0)  # (ROWS, BLOCK_N)
        correction = tl.sum(centred, axis=1) / n_cols
        variance = tl.sum(centred * centred, axis=1) / n_cols - correction * correction
        x = centred - correction[:, None]
        tl.store(mean_ptr + rows * 2, mean, mask=mask_rows)
        tl.store(mean_ptr + rows * 2 + 1, correction, mask=mask_rows)
    else:
        variance = tl.sum(x * x, axis=1) / n_cols
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)  # constant rows of large numbers may round below 0
    output = x * rstd[:, None]
    if weight_ptr is not None:
        output *= tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        output += tl.load(bias_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]

    output_ptrs = output_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(output_ptrs, output.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=mask_rows)


@triton.jit
def forward_chunks_kernel(
    input_ptr,
    residual_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    n_cols,
    input_place,
    residual_place,
    eps,
    dropout_p,
    keep_scale,
    CENTRE: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Normalise one row in chunks of BLOCK_N columns: statistics first, then the output; arguments as above.

    Each of the BLOCK_N lanes keeps mean and sum of squared deviations of the columns it has seen (Welford 1962), and
    the lanes are merged at the end (Chan et al. 1983), so the row is read once for both statistics. All of it is
    relative to the row's first number (with dropout, the residual's), which keeps the digits of rows far from 0. For
    RMS norm the lanes keep sums of squares.
    """
    n_cols = n_cols // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    input_rows = row_offsets(rows, input_place, ALIGN)
    residual_rows = row_offsets(rows, residual_place, ALIGN)
    lanes = tl.arange(0, BLOCK_N)[None, :]
    pivot = 0.0
    if CENTRE:
        if residual_ptr is not None:
            pivot += tl.sum(tl.load(residual_ptr + residual_rows).to(tl.float32))
        if seed_ptr is None:  # dropout may take the input's first number away
            pivot += tl.sum(tl.load(input_ptr + input_rows).to(tl.float32))
    lane_mean = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    lane_squares = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        mask = start + lanes < n_cols
        x = load_sum(
            input_ptr,
            residual_ptr,
            seed_ptr,
            rows,
            input_rows,
            residual_rows,
            start,
            mask,
            dropout_p,
            keep_scale,
            SUM_DTYPE,
            1,
            BLOCK_N,
        )
        if sum_ptr is not None:
            tl.store(sum_ptr + row * n_cols + start + lanes, x.to(sum_ptr.dtype.element_ty), mask=mask)
        if CENTRE:
            x -= pivot
            delta = tl.where(mask, x - lane_mean, 0.0)
            lane_mean += delta / (start // BLOCK_N + 1)
            lane_squares += delta * tl.where(mask, x - lane_mean, 0.0)
        else:
            lane_squares += x * x

    mean = 0.0
    if CENTRE:
        count = tl.cdiv(n_cols - lanes, BLOCK_N).to(tl.float32)  # columns a lane has seen
        mean = tl.sum(count * lane_mean) / n_cols
        deviation = lane_mean - mean
        lane_squares += count * deviation * deviation
        tl.store(mean_ptr + row * 2, pivot)
        tl.store(mean_ptr + row * 2 + 1, mean)
    rstd = tl.rsqrt(tl.sum(lane_squares) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        x = load_sum(
            input_ptr,
            residual_ptr,
            seed_ptr,
            rows,
            input_rows,
            residual_rows,
            start,
            mask,
            dropout_p,
            keep_scale,
            SUM_DTYPE,
            1,
            BLOCK_N,
        )
        output = (x - pivot - mean) * rstd
        if weight_ptr is not None:
            output *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            output += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(output_ptr + row * n_cols + cols, output.to(output_ptr.dtype.element_ty), mask=mask)


settle(forward_rows_kernel, forward_chunks_kernel)


@functools.cache
def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def row_place(x: torch.Tensor | None) -> tuple[int, ...]:
    """How rows of x (outer, middle, inner, N) are found, as `row_offsets` takes it."""
    return (1, 1, 0, 0, 0) if x is None else (*x.shape[1:3], *x.stride()[:3])


def alignment(n_cols: int, *tensors: torch.Tensor | None) -> int:
    """What divides n_cols and the strides of tensors (outer, middle, inner, N): as many elements load at once."""
    return math.gcd(n_cols, MAX_ALIGN, *(stride for x in tensors if x is not None for stride in x.stride()[:3]))


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the elements by that it keeps; at probability 1 it keeps none."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def launch_forward(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    dropout_p: float,
    sum_dtype: torch.dtype,
) -> None:
    """Fill `output` and `total` (M, N), `mean` (M, 2) and `rstd` (M,) from `rows` and `residual`; M, N from 1.

    `rows` and `residual` are (outer, middle, inner, N) with contiguous columns, M = outer * middle * inner; each has
    sides of its own. `total` is residual + dropout(rows) in `sum_dtype`, None where that is not needed; `mean` is None
    for RMS norm; `seed` (1,) int64 is None without dropout.
    """
    n_rows, n_cols = rstd.shape[0], rows.shape[3]
    tile = choose_tile("forward", n_cols, max(x.element_size() for x in (rows, residual) if x is not None))
    shape = {
        "n_cols": n_cols,
        "input_place": row_place(rows),
        "residual_place": row_place(residual),
        "eps": eps,
        "dropout_p": dropout_p,
        "keep_scale": keep_scale(dropout_p),
        "CENTRE": mean is not None,
        "SUM_DTYPE": triton_dtype(sum_dtype),
        "BLOCK_N": tile.block_n,
        "ALIGN": alignment(n_cols, rows, residual),
        "num_warps": tile.num_warps,
    }
    tensors = (rows, residual, seed, weight, bias, output, total, mean, rstd)
    with launch_on(rows.device):
        if tile.chunked:
            run_kernel(forward_chunks_kernel, (n_rows,), *tensors, **shape)  # one program a row
        else:
            grid = (cdiv(n_rows, tile.rows),)  # one program a tile of rows
            run_kernel(forward_rows_kernel, grid, *tensors, n_rows=n_rows, ROWS=tile.rows, **shape)
