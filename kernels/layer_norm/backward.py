"""Backward of layer norm and RMS norm without atomics: dinput, dresidual, dweight and dbias.

With xhat = (x - mean) * rstd, or x * rstd for RMS norm, dy the gradient of the output and g = dy * weight:

    dx        = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum        means over the N columns of a row
    dresidual = dx        dinput = dx where dropout kept the input, / (1 - p)
    dweight   = sum over rows of dy * xhat
    dbias     = sum over rows of dy

mean(g) is absent for RMS norm, dsum where the sum x was not asked for. Source: the derivatives of Ba, Kiros and Hinton
2016, section 3, equation 4, and of Zhang and Sennrich 2019, section 4, equation 4.

Fused: xhat is recomputed from x, or taken back out of the output, dropout's numbers are drawn again, and all gradients
come out of one pass in which a fixed number of programs walk the rows, each summing dweight and dbias in float32
registers. The sums of the programs, (programs, N) each, are then added in a fixed order by a second small kernel, so
that the result repeats bit for bit. With e bytes an element that is 3 * M * N * e + 16 * programs * N bytes and about
13 * M * N flops; dsum, and a dinput that differs from dresidual, are M * N * e bytes each. Rows too long for the
registers take two passes, dx by rows and the sums by columns: 5 * M * N * e bytes, when the second reading of a row
comes from the cache.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launch
from kernels.again import run_kernel
from kernels.launch import cdiv, launch_on, settle
from kernels.layer_norm.forward import alignment, keep_scale, kept, row_offsets, row_place
from kernels.layer_norm.tiles import choose_tile, n_programs


@triton.jit
def normalised(
    x, mean, rest, rstd, weight, bias, mask, CENTRE: tl.constexpr, FROM_OUTPUT: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """xhat, 0 outside `mask`: of x the input of the norm, or its output (FROM_OUTPUT) by undoing weight and bias.

    mean, rest: as stored by the forward; taken off one by one, or the digits of rows far from 0 would be lost.
    """
    if FROM_OUTPUT:
        xhat = x - bias
        if HAS_WEIGHT:
            xhat *= tl.where(weight == 0.0, 0.0, 1.0 / tl.where(weight == 0.0, 1.0, weight))
    elif CENTRE:
        xhat = (x - mean - rest) * rstd
    else:
        xhat = x * rstd
    return tl.where(mask, xhat, 0.0)


@triton.jit
def store_gradients(
    gradient,
    grad_sum_ptr,
    seed_ptr,
    seed,
    grad_input_ptr,
    grad_residual_ptr,
    rows,
    sum_rows,
    start,
    mask,
    n_cols,
    dropout_p,
    keep_scale,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient (ROWS, BLOCK_N) through the norm, and that of the sum itself, to residual and input."""
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    if grad_sum_ptr is not None:
        gradient += tl.load(grad_sum_ptr + sum_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    offsets = rows[:, None] * n_cols + cols
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + offsets, gradient.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    if grad_input_ptr is not None:
        if seed_ptr is not None:
            gradient = tl.where(kept(seed, rows, start, dropout_p, ROWS, BLOCK_N), gradient * keep_scale, 0.0)
        tl.store(grad_input_ptr + offsets, gradient.to(grad_input_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def backward_rows_kernel(
    grad_output_ptr,
    grad_sum_ptr,
    x_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_input_ptr,
    grad_residual_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    n_rows,
    n_cols,
    grad_place,
    sum_place,
    x_place,
    dropout_p,
    keep_scale,
    CENTRE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of every n-th tile of ROWS whole rows, n being the number of programs.

    grad_output_ptr, grad_sum_ptr, x_ptr: (n_rows, n_cols), rows as for the forward kernels: the gradients of the output
        and of the sum, None for none, and what was normalised, or, FROM_OUTPUT, what came out.
    seed_ptr: (1,) int64, or None for no dropout.
    weight_ptr, bias_ptr: (n_cols,), or None for ones and zeros; bias_ptr is read with FROM_OUTPUT only.
    mean_ptr, rstd_ptr: (n_rows, 2), (n_rows,) float32, from the forward kernel; mean_ptr is read for layer norm by its
        input only.
    grad_input_ptr, grad_residual_ptr: (n_rows, n_cols), contiguous, or None: not needed.
    partial_weight_ptr, partial_bias_ptr: (programs, n_cols) float32, or None: not needed.
    dropout_p, keep_scale, CENTRE: as for the forward.
    ALIGN: divides n_cols and the strides; lets the compiler load that many elements at once.
    """
    n_cols = n_cols // ALIGN * ALIGN
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    mask_cols = cols < n_cols
    weight, bias = 1.0, 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    if FROM_OUTPUT and bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)  # once: a load inside the loop would be prefetched through shared memory
    sum_weight = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)

    # What undoing weight and bias takes is cheaper to compute again than to keep in registers.
    for tile in tl.range(
        program, tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES, disable_licm=FROM_OUTPUT
    ):
        rows = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        mask_rows = rows < n_rows
        mask = mask_rows[:, None] & mask_cols[None, :]
        grad_rows = row_offsets(rows, grad_place, ALIGN)
        x_rows = row_offsets(rows, x_place, ALIGN)
        grad_ptrs = grad_output_ptr + grad_rows[:, None] + cols[None, :]
        x_ptrs = x_ptr + x_rows[:, None] + cols[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK_N)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean, rest = 0.0, 0.0
        if CENTRE and not FROM_OUTPUT:
            mean = tl.load(mean_ptr + rows * 2, mask=mask_rows, other=0.0)[:, None]
            rest = tl.load(mean_ptr + rows * 2 + 1, mask=mask_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        xhat = normalised(x, mean, rest, rstd, weight, bias, mask, CENTRE, FROM_OUTPUT, weight_ptr is not None)
        if partial_weight_ptr is not None:
            sum_weight += grad * xhat
        if partial_bias_ptr is not None:
            sum_bias += grad
        if grad_input_ptr is not None or grad_residual_ptr is not None:
            if weight_ptr is not None:
                grad *= weight
            along_xhat = tl.sum(grad * xhat, axis=1)[:, None] / n_cols
            if CENTRE:
                grad -= tl.sum(grad, axis=1)[:, None] / n_cols
            sum_rows = row_offsets(rows, sum_place, ALIGN)
            store_gradients(
                (grad - xhat * along_xhat) * rstd,
                grad_sum_ptr,
                seed_ptr,
                seed,
                grad_input_ptr,
                grad_residual_ptr,
                rows,
                sum_rows,
                0,
                mask,
                n_cols,
                dropout_p,
                keep_scale,
                ROWS,
                BLOCK_N,
            )

    if partial_weight_ptr is not None:
        tl.store(partial_weight_ptr + program * n_cols + cols, tl.sum(sum_weight, axis=0), mask=mask_cols)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + program * n_cols + cols, tl.sum(sum_bias, axis=0), mask=mask_cols)


@triton.jit
def backward_chunks_kernel(
    grad_output_ptr,
    grad_sum_ptr,
    x_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_input_ptr,
    grad_residual_ptr,
    n_cols,
    grad_place,
    sum_place,
    x_place,
    dropout_p,
    keep_scale,
    CENTRE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of one row of input and residual in chunks of BLOCK_N columns: means, then dx; arguments as above."""
    n_cols = n_cols // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    grad_rows = row_offsets(rows, grad_place, ALIGN)[:, None]
    sum_rows = row_offsets(rows, sum_place, ALIGN)
    x_rows = row_offsets(rows, x_place, ALIGN)[:, None]
    lanes = tl.arange(0, BLOCK_N)[None, :]
    mean, rest = 0.0, 0.0
    if CENTRE and not FROM_OUTPUT:
        mean = tl.load(mean_ptr + row * 2)
        rest = tl.load(mean_ptr + row * 2 + 1)
    rstd = tl.load(rstd_ptr + row)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    sum_grad = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    sum_grad_xhat = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        grad = tl.load(grad_output_ptr + grad_rows + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_rows + cols, mask=mask, other=0.0).to(tl.float32)
        weight, bias = 1.0, 0.0
        if FROM_OUTPUT and bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            grad *= weight
        if CENTRE:
            sum_grad += grad
        sum_grad_xhat += grad * normalised(
            x, mean, rest, rstd, weight, bias, mask, CENTRE, FROM_OUTPUT, weight_ptr is not None
        )

    along_mean = tl.sum(sum_grad) / n_cols
    along_xhat = tl.sum(sum_grad_xhat) / n_cols
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        grad = tl.load(grad_output_ptr + grad_rows + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_rows + cols, mask=mask, other=0.0).to(tl.float32)
        weight, bias = 1.0, 0.0
        if FROM_OUTPUT and bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            grad *= weight
        xhat = normalised(x, mean, rest, rstd, weight, bias, mask, CENTRE, FROM_OUTPUT, weight_ptr is not None)
        store_gradients(
            (grad - along_mean - xhat * along_xhat) * rstd,
            grad_sum_ptr,
            seed_ptr,
            seed,
            grad_input_ptr,
            grad_residual_ptr,
            rows,
            sum_rows,
            start,
            mask,
            n_cols,
            dropout_p,
            keep_scale,
            1,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["n_rows"])
def backward_columns_kernel(
    grad_output_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    n_rows,
    n_cols,
    grad_place,
    x_place,
    n_groups,
    CENTRE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sums of dweight and dbias over every `n_groups`-th tile of ROWS rows, for BLOCK_N columns; arguments as above.

    partial_weight_ptr, partial_bias_ptr: (n_groups, n_cols) float32, or None: not needed.
    """
    n_cols = n_cols // ALIGN * ALIGN
    group = tl.program_id(0) % n_groups
    cols = (tl.program_id(0) // n_groups).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_cols = cols < n_cols
    weight, bias = 1.0, 0.0
    if FROM_OUTPUT and weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    if FROM_OUTPUT and bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask_cols, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for tile in tl.range(group, tl.cdiv(n_rows, ROWS), n_groups, num_stages=NUM_STAGES):
        rows = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        mask_rows = rows < n_rows
        mask = mask_rows[:, None] & mask_cols[None, :]
        grad_rows = row_offsets(rows, grad_place, ALIGN)
        grad_ptrs = grad_output_ptr + grad_rows[:, None] + cols[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        if partial_weight_ptr is not None:
            x_rows = row_offsets(rows, x_place, ALIGN)
            x_ptrs = x_ptr + x_rows[:, None] + cols[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
            mean, rest = 0.0, 0.0
            if CENTRE and not FROM_OUTPUT:
                mean = tl.load(mean_ptr + rows * 2, mask=mask_rows, other=0.0)[:, None]
                rest = tl.load(mean_ptr + rows * 2 + 1, mask=mask_rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=mask_rows, other=0.0)[:, None]
            sum_weight += grad * normalised(
                x, mean, rest, rstd, weight, bias, mask, CENTRE, FROM_OUTPUT, weight_ptr is not None
            )
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


settle(backward_rows_kernel, backward_chunks_kernel, backward_columns_kernel, reduce_partials_kernel)


def launch_backward(
    grad_rows: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    grad_input: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    dropout_p: float,
    centre: bool,
    from_output: bool,
) -> list[torch.Tensor]:
    """Fill those of the four gradients that are given; returns the sums of weight's and bias's that programs made.

    `grad_rows`, `grad_sum` and `x` are (outer, middle, inner, N) with contiguous columns: the gradient of the output,
    that of the sum or None, and the sum (the input, where there is no residual) or, `from_output`, the output. `mean`
    (M, 2) and `rstd` (M,) are float32, M the number of rows, `mean` None for RMS norm. `grad_input` and `grad_residual`
    are (M, N) contiguous, `grad_weight` and `grad_bias` (N,).
    """
    n_rows, n_cols = rstd.shape[0], x.shape[3]
    tile = choose_tile("backward", n_cols, x.element_size(), seed is not None or from_output)
    columns, reduce = choose_tile("columns", n_cols), choose_tile("reduce", n_cols)
    needs_sums = grad_weight is not None or grad_bias is not None
    if tile.chunked:
        n_column_blocks = cdiv(n_cols, columns.block_n)
        n_tiles, num_warps = cdiv(n_rows, columns.rows), columns.num_warps
    else:
        n_column_blocks = 1
        n_tiles, num_warps = cdiv(n_rows, tile.rows), tile.num_warps
    programs = n_programs(n_tiles, n_column_blocks, num_warps, launch.multiprocessors(x.device))
    partials = [
        None if grad is None else x.new_empty(programs, n_cols, dtype=torch.float32)
        for grad in (grad_weight, grad_bias)
    ]
    kind = {"CENTRE": centre, "FROM_OUTPUT": from_output, "ALIGN": alignment(n_cols, grad_rows, grad_sum, x)}
    places = {"grad_place": row_place(grad_rows), "x_place": row_place(x)}
    sum_place = row_place(grad_sum)
    dropout = {"dropout_p": dropout_p, "keep_scale": keep_scale(dropout_p)}
    tensors = (grad_rows, grad_sum, x, seed, weight, bias, mean, rstd, grad_input, grad_residual)
    with launch_on(x.device):
        if not tile.chunked:
            run_kernel(
                backward_rows_kernel,
                (programs,),  # programs walk the row tiles in turn
                *tensors,
                *partials,
                n_rows=n_rows,
                n_cols=n_cols,
                **places,
                sum_place=sum_place,
                **dropout,
                **kind,
                ROWS=tile.rows,
                BLOCK_N=tile.block_n,
                NUM_STAGES=tile.num_stages,
                num_warps=tile.num_warps,
            )
        elif grad_input is not None or grad_residual is not None:
            run_kernel(
                backward_chunks_kernel,
                (n_rows,),  # one program a row
                *tensors,
                n_cols=n_cols,
                **places,
                sum_place=sum_place,
                **dropout,
                **kind,
                BLOCK_N=tile.block_n,
                num_warps=tile.num_warps,
            )
        if tile.chunked and needs_sums:
            run_kernel(
                backward_columns_kernel,
                (n_column_blocks * programs,),  # programs share the rows of each column block
                grad_rows,
                x,
                weight,
                bias,
                mean,
                rstd,
                *partials,
                n_rows=n_rows,
                n_cols=n_cols,
                **places,
                n_groups=programs,
                **kind,
                ROWS=columns.rows,
                BLOCK_N=columns.block_n,
                NUM_STAGES=columns.num_stages,
                num_warps=num_warps,
            )
        if needs_sums:
            run_kernel(
                reduce_partials_kernel,
                (cdiv(n_cols, reduce.block_n),),  # one program a block of columns
                *partials,
                grad_weight,
                grad_bias,
                n_partials=programs,
                n_cols=n_cols,
                ROWS=reduce.rows,
                BLOCK_N=reduce.block_n,
                num_warps=reduce.num_warps,
            )
    return [x for x in partials if x is not None]
