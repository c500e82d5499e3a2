"""Layer norm forward in one pass over memory.

    output = (x - mean(x)) * rstd * weight + bias        rstd = 1 / sqrt(var(x) + eps)

Mean and biased variance are taken over the N columns of a row, in float32 whatever the dtypes are.
Source: Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4.

Fused: both statistics, the normalisation and the affine map. Each input is read once and each output written once
(rows too long for the registers are read twice). With e bytes an element, M rows move 2 * M * N * e + 8 * M bytes and
take about 9 * M * N flops, so memory alone sets the time; the same in separate PyTorch operations moves six
times as much.

The variance of a row in registers is the corrected two-pass formula (Chan, Golub and LeVeque 1983, "Algorithms for
Computing the Sample Variance"): the mean of x - mean(x), zero but for rounding, is taken off as well, so
that rows far from 0 keep their digits.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import launch_on

TILE_BYTES = 4096  # of input a program of 4 warps reads at once: 2 loads of 16 bytes a thread
WHOLE_ROW_BYTES = 65536  # longest row held in registers, 64 bytes a thread of 32 warps
CHUNK_BYTES = 8192  # of a longer row read at once by 16 warps: one load of 16 bytes a thread
MAX_ALIGN = 8  # elements of two bytes in the widest load, 16 bytes


class Tile(NamedTuple):
    """What one program works on at a time.

    A tile is (rows, block_n); `chunked` says that a row has more columns than a tile and is walked in chunks.
    """

    rows: int
    block_n: int
    num_warps: int
    chunked: bool = False


def forward_tile(n_cols: int, element_size: int) -> Tile:
    """Tile of the forward kernels.

    It depends on the row alone, never on how many rows there are, so a row's result is the same in every batch.

    Args:
        n_cols: N.
        element_size: bytes of an input element.
    """
    block_n = triton.next_power_of_2(n_cols)
    row_bytes = block_n * element_size
    if row_bytes > WHOLE_ROW_BYTES:
        return Tile(1, CHUNK_BYTES // element_size, 16, chunked=True)
    return Tile(max(1, TILE_BYTES // row_bytes), block_n, min(max(row_bytes // 1024, 4), 32))


@triton.jit(do_not_specialize=["n_rows"])
def forward_rows_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    stride_row,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Normalise ROWS whole rows.

    input_ptr: (n_rows, n_cols), rows `stride_row` elements apart, columns contiguous.
    weight_ptr, bias_ptr: (n_cols,), or None for ones and zeros.
    output_ptr: (n_rows, n_cols), contiguous.
    mean_ptr, rstd_ptr: (n_rows,) float32.
    ALIGN: divides n_cols and stride_row; lets the compiler load that many elements at once.
    """
    n_cols = n_cols // ALIGN * ALIGN
    stride_row = stride_row // ALIGN * ALIGN
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    mask_rows = rows < n_rows
    mask_cols = cols < n_cols
    mask = mask_rows[:, None] & mask_cols[None, :]

    x = tl.load(input_ptr + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / n_cols  # (ROWS,)
    centred = tl.where(mask_cols[None, :], x - mean[:, None], 0.0)  # (ROWS, BLOCK_N)
    correction = tl.sum(centred, axis=1) / n_cols
    variance = tl.sum(centred * centred, axis=1) / n_cols - correction * correction
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)  # constant rows of large numbers may round below 0
    output = (centred - correction[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        output *= tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        output += tl.load(bias_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]

    output_ptrs = output_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(output_ptrs, output.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean + correction, mask=mask_rows)
    tl.store(rstd_ptr + rows, rstd, mask=mask_rows)


@triton.jit
def forward_chunks_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    mean_ptr,
    rstd_ptr,
    n_cols,
    stride_row,
    eps,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Normalise one row in chunks of BLOCK_N columns: statistics first, then the output; arguments as above.

    Each of the BLOCK_N lanes keeps mean and sum of squared deviations of the columns it has seen (Welford 1962), and
    the lanes are merged at the end (Chan et al. 1983), so the row is read once for both statistics. All
    of it is relative to the row's first number, which keeps the digits of rows far from 0.
    """
    n_cols = n_cols // ALIGN * ALIGN
    stride_row = stride_row // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    pivot = tl.load(input_ptr + row * stride_row).to(tl.float32)
    lane_mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    lane_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        mask = lanes < n_cols - start
        x = tl.load(input_ptr + row * stride_row + start + lanes, mask=mask, other=0.0).to(tl.float32) - pivot
        delta = tl.where(mask, x - lane_mean, 0.0)
        lane_mean += delta / (start // BLOCK_N + 1)
        lane_squares += delta * tl.where(mask, x - lane_mean, 0.0)

    count = tl.cdiv(n_cols - lanes, BLOCK_N).to(tl.float32)  # columns a lane has seen
    mean = tl.sum(count * lane_mean, axis=0) / n_cols
    deviation = lane_mean - mean
    rstd = tl.rsqrt(tl.sum(lane_squares + count * deviation * deviation, axis=0) / n_cols + eps)

    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        x = tl.load(input_ptr + row * stride_row + cols, mask=mask, other=0.0).to(tl.float32)
        output = (x - pivot - mean) * rstd
        if weight_ptr is not None:
            output *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            output += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(output_ptr + row * n_cols + cols, output.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, pivot + mean)
    tl.store(rstd_ptr + row, rstd)


def launch_forward(
    rows: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
) -> None:
    """Fill `output` (M, N), `mean` (M,) and `rstd` (M,) from `rows` (M, N) with contiguous columns; M, N from 1."""
    n_rows, n_cols = rows.shape
    tile = forward_tile(n_cols, rows.element_size())
    align = math.gcd(n_cols, rows.stride(0), MAX_ALIGN)
    with launch_on(rows.device):
        if tile.chunked:
            forward_chunks_kernel[(n_rows,)](  # one program a row
                rows, weight, bias, output, mean, rstd,
                n_cols=n_cols, stride_row=rows.stride(0), eps=eps,
                BLOCK_N=tile.block_n, ALIGN=align, num_warps=tile.num_warps,
            )
        else:
            forward_rows_kernel[(triton.cdiv(n_rows, tile.rows),)](  # one program a tile of rows
                rows, weight, bias, output, mean, rstd,
                n_rows=n_rows, n_cols=n_cols, stride_row=rows.stride(0), eps=eps,
                ROWS=tile.rows, BLOCK_N=tile.block_n, ALIGN=align, num_warps=tile.num_warps,
            )
