"""Layer norm backward without atomics: dx, dweight and dbias.

With xhat = (x - mean) * rstd, dy the gradient of the output and g = dy * weight:

    dx      = rstd * (g - mean(g) - xhat * mean(g * xhat))        means over the N columns of a row
    dweight = sum over rows of dy * xhat
    dbias   = sum over rows of dy

Source: the derivative of Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4.

Fused: xhat is recomputed from the input, and all three gradients come out of one pass in which a fixed number of
programs walk the rows, each summing dweight and dbias in float32 registers. The sums of the programs, (programs, N)
each, are then added in a fixed order by a second small kernel, so that the result repeats bit for bit. With e bytes an
element that is 3 * M * N * e + 16 * programs * N bytes and about 13 * M * N flops. Rows too long for the registers
take two passes, dx by rows and the sums by columns: 5 * M * N * e bytes, when the second reading of a row comes from
the cache.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import launch_on
from kernels.layer_norm.forward import MAX_ALIGN

TILE_ELEMENTS = 1024  # of each input a program of 4 warps holds: 8 a thread, 4 arrays of which stay in registers
WHOLE_ROW = 8192  # longest row whose sums stay in registers beside it
CHUNK = 4096  # columns of a longer row read at once by 8 warps
COLUMNS = (8, 128, 3)  # (rows, columns) a program of 4 warps adds at once where the sums are a pass, and num_stages
REDUCE = (64, 16)  # (programs, columns) of the partial sums added at once
WARPS_PER_MULTIPROCESSOR = 16  # half of what 64 registers a thread let be resident: fewer partial sums to add
INTERPRETED_MULTIPROCESSORS = 2  # on a CPU: enough for more than one program


class Tile(NamedTuple):
    """What one program works on at a time: (rows, block_n), and whether a row is walked in chunks of block_n."""

    rows: int
    block_n: int
    num_warps: int
    num_stages: int
    chunked: bool = False


def backward_tile(n_cols: int, element_size: int) -> Tile:
    """Tile of the kernels that walk rows; like the forward tile it depends on the row alone.

    With 16 warps on a multiprocessor the loads of one stage are 16 KiB of two-byte or 32 KiB of four-byte elements.
    To reach 4.3 TB/s over 132 multiprocessors at a latency of 800 ns, an estimate, 26 KB must be under way on each, so
    the former prefetch two tiles and the latter one.

    Args:
        n_cols: N.
        element_size: bytes of an input element.
    """
    if n_cols > (WHOLE_ROW // 2 if n_cols % 2 else WHOLE_ROW):  # odd rows load one by one: addresses take registers
        return Tile(1, CHUNK, 8, 1, chunked=True)
    block_n = triton.next_power_of_2(n_cols)
    num_stages = 3 if element_size == 2 else 2
    return Tile(max(1, TILE_ELEMENTS // block_n), block_n, min(max(block_n // 256, 4), 16), num_stages)


def n_programs(n_tiles: int, n_column_blocks: int, num_warps: int, n_multiprocessors: int) -> int:
    """Programs that share `n_tiles` row tiles of each of `n_column_blocks`: what the chip holds at once, at most."""
    resident = n_multiprocessors * WARPS_PER_MULTIPROCESSOR // num_warps
    return min(n_tiles, max(1, resident // n_column_blocks))


@triton.jit(do_not_specialize=["n_rows"])
def backward_rows_kernel(
    grad_output_ptr,
    input_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_input_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    n_rows,
    n_cols,
    stride_grad,
    stride_input,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of every n-th tile of ROWS whole rows, n being the number of programs.

    grad_output_ptr, input_ptr: (n_rows, n_cols), rows `stride_grad` and `stride_input` elements apart.
    weight_ptr: (n_cols,), or None for ones.
    mean_ptr, rstd_ptr: (n_rows,) float32, from the forward kernel.
    grad_input_ptr: (n_rows, n_cols), contiguous, or None: not needed.
    partial_weight_ptr, partial_bias_ptr: (programs, n_cols) float32, or None: not needed.
    ALIGN: divides n_cols and the strides; lets the compiler load that many elements at once.
    """
    n_cols = n_cols // ALIGN * ALIGN
    stride_grad = stride_grad // ALIGN * ALIGN
    stride_input = stride_input // ALIGN * ALIGN
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    mask_cols = cols < n_cols
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)

    for tile in tl.range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        mask_rows = rows < n_rows
        mask = mask_rows[:, None] & mask_cols[None, :]
        grad_ptrs = grad_output_ptr + rows[:, None] * stride_grad + cols[None, :]
        input_ptrs = input_ptr + rows[:, None] * stride_input + cols[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK_N)
        x = tl.load(input_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        xhat = tl.where(mask, (x - mean) * rstd, 0.0)
        if partial_weight_ptr is not None:
            sum_weight += grad * xhat
        if partial_bias_ptr is not None:
            sum_bias += grad
        if grad_input_ptr is not None:
            if weight_ptr is not None:
                grad *= weight
            along_mean = tl.sum(grad, axis=1)[:, None] / n_cols
            along_xhat = tl.sum(grad * xhat, axis=1)[:, None] / n_cols
            grad_input = (grad - along_mean - xhat * along_xhat) * rstd
            grad_input_ptrs = grad_input_ptr + rows[:, None] * n_cols + cols[None, :]
            tl.store(grad_input_ptrs, grad_input.to(grad_input_ptr.dtype.element_ty), mask=mask)

    if partial_weight_ptr is not None:
        tl.store(partial_weight_ptr + program * n_cols + cols, tl.sum(sum_weight, axis=0), mask=mask_cols)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + program * n_cols + cols, tl.sum(sum_bias, axis=0), mask=mask_cols)


@triton.jit
def backward_chunks_kernel(
    grad_output_ptr,
    input_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_input_ptr,
    n_cols,
    stride_grad,
    stride_input,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradient of one row of the input in chunks of BLOCK_N columns: both means, then dx; arguments as above."""
    n_cols = n_cols // ALIGN * ALIGN
    stride_grad = stride_grad // ALIGN * ALIGN
    stride_input = stride_input // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_grad = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_grad_xhat = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        grad = tl.load(grad_output_ptr + row * stride_grad + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + row * stride_input + cols, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            grad *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sum_grad += grad
        sum_grad_xhat += grad * tl.where(mask, (x - mean) * rstd, 0.0)

    along_mean = tl.sum(sum_grad, axis=0) / n_cols
    along_xhat = tl.sum(sum_grad_xhat, axis=0) / n_cols
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        grad = tl.load(grad_output_ptr + row * stride_grad + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + row * stride_input + cols, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            grad *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        grad_input = (grad - along_mean - (x - mean) * rstd * along_xhat) * rstd
        tl.store(grad_input_ptr + row * n_cols + cols, grad_input.to(grad_input_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def backward_columns_kernel(
    grad_output_ptr,
    input_ptr,
    mean_ptr,
    rstd_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    n_rows,
    n_cols,
    stride_grad,
    stride_input,
    n_groups,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sums of dweight and dbias over every `n_groups`-th tile of ROWS rows, for BLOCK_N columns; arguments as above.

    partial_weight_ptr, partial_bias_ptr: (n_groups, n_cols) float32, or None: not needed.
    """
    n_cols = n_cols // ALIGN * ALIGN
    stride_grad = stride_grad // ALIGN * ALIGN
    stride_input = stride_input // ALIGN * ALIGN
    group = tl.program_id(0) % n_groups
    cols = (tl.program_id(0) // n_groups).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_cols = cols < n_cols
    sum_weight = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(group, tl.cdiv(n_rows, ROWS), n_groups, num_stages=NUM_STAGES):
        rows = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        mask_rows = rows < n_rows
        mask = mask_rows[:, None] & mask_cols[None, :]
        grad_ptrs = grad_output_ptr + rows[:, None] * stride_grad + cols[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        if partial_weight_ptr is not None:
            input_ptrs = input_ptr + rows[:, None] * stride_input + cols[None, :]
            x = tl.load(input_ptrs, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=mask_rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)[:, None]
            sum_weight += grad * tl.where(mask, (x - mean) * rstd, 0.0)
        sum_bias += grad
    partial = group.to(tl.int64) * n_cols + cols
    if partial_weight_ptr is not None:
        tl.store(partial_weight_ptr + partial, tl.sum(sum_weight, axis=0), mask=mask_cols)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + partial, tl.sum(sum_bias, axis=0), mask=mask_cols)


@triton.jit
def _add_partials(partial_ptr, total_ptr, n_partials, n_cols, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add (n_partials, n_cols) float32 over its rows into total_ptr (n_cols,), for the columns of this program."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_cols = cols < n_cols
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < n_partials)[:, None] & mask_cols[None, :]
        total += tl.load(partial_ptr + rows[:, None].to(tl.int64) * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(total_ptr + cols, tl.sum(total, axis=0).to(total_ptr.dtype.element_ty), mask=mask_cols)


@triton.jit(do_not_specialize=["n_partials"])
def reduce_partials_kernel(
    partial_weight_ptr,
    partial_bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    n_partials,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial sums of BLOCK_N columns in a fixed order.

    partial_weight_ptr, partial_bias_ptr: (n_partials, n_cols) float32, or None: not needed.
    grad_weight_ptr, grad_bias_ptr: (n_cols,), or None with the above.
    """
    if partial_weight_ptr is not None:
        _add_partials(partial_weight_ptr, grad_weight_ptr, n_partials, n_cols, ROWS, BLOCK_N)
    if partial_bias_ptr is not None:
        _add_partials(partial_bias_ptr, grad_bias_ptr, n_partials, n_cols, ROWS, BLOCK_N)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number for the interpreter on a CPU."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_backward(
    grad_rows: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_input: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:
    """Fill those of the three gradients that are given.

    `grad_rows` and `rows` are (M, N) with contiguous columns, M and N from 1; `mean` and `rstd` (M,) float32.
    `grad_input` is (M, N) contiguous, `grad_weight` and `grad_bias` (N,).
    """
    n_rows, n_cols = rows.shape
    tile = backward_tile(n_cols, rows.element_size())
    align = math.gcd(n_cols, grad_rows.stride(0), rows.stride(0), MAX_ALIGN)
    needs_sums = grad_weight is not None or grad_bias is not None
    column_rows, column_block, column_stages = COLUMNS
    if tile.chunked:
        n_column_blocks = triton.cdiv(n_cols, column_block)
        n_tiles, num_warps = triton.cdiv(n_rows, column_rows), 4
    else:
        n_column_blocks = 1
        n_tiles, num_warps = triton.cdiv(n_rows, tile.rows), tile.num_warps
    programs = n_programs(n_tiles, n_column_blocks, num_warps, multiprocessors(rows.device))
    partial_weight, partial_bias = (
        None if grad is None else torch.empty((programs, n_cols), dtype=torch.float32, device=rows.device)
        for grad in (grad_weight, grad_bias)
    )
    with launch_on(rows.device):
        if not tile.chunked:
            backward_rows_kernel[(programs,)](  # programs walk the row tiles in turn
                grad_rows, rows, weight, mean, rstd, grad_input, partial_weight, partial_bias,
                n_rows=n_rows, n_cols=n_cols, stride_grad=grad_rows.stride(0), stride_input=rows.stride(0),
                ROWS=tile.rows, BLOCK_N=tile.block_n, NUM_STAGES=tile.num_stages, ALIGN=align,
                num_warps=tile.num_warps,
            )
        elif grad_input is not None:
            backward_chunks_kernel[(n_rows,)](  # one program a row
                grad_rows, rows, weight, mean, rstd, grad_input,
                n_cols=n_cols, stride_grad=grad_rows.stride(0), stride_input=rows.stride(0),
                BLOCK_N=tile.block_n, ALIGN=align, num_warps=tile.num_warps,
            )
        if tile.chunked and needs_sums:
            backward_columns_kernel[(n_column_blocks * programs,)](  # programs share the rows of each column block
                grad_rows, rows, mean, rstd, partial_weight, partial_bias,
                n_rows=n_rows, n_cols=n_cols, stride_grad=grad_rows.stride(0), stride_input=rows.stride(0),
                n_groups=programs, ROWS=column_rows, BLOCK_N=column_block, NUM_STAGES=column_stages,
                ALIGN=align, num_warps=num_warps,
            )
        if needs_sums:
            reduce_rows, reduce_block = REDUCE
            reduce_partials_kernel[(triton.cdiv(n_cols, reduce_block),)](  # one program a block of columns
                partial_weight, partial_bias, grad_weight, grad_bias, n_partials=programs, n_cols=n_cols,
                ROWS=reduce_rows, BLOCK_N=reduce_block, num_warps=4,
            )
