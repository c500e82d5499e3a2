"""Layer norm and RMS norm as registered operations.

`torch.ops.kernels.norm_forward` and `norm_backward` run the Triton kernels on CUDA tensors, and on CPU tensors when
Triton's interpreter is on; nothing else gets here. Both write new, contiguous tensors and change no input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.again import Calls
from kernels.backend import why_not_triton
from kernels.launch import LAYOUTS

FORWARDS, BACKWARDS = Calls(), Calls()
library = torch.library.Library("kernels", "FRAGMENT")
library.define(
    "norm_forward(Tensor input, Tensor? residual, Tensor? seed, Tensor? weight, Tensor? bias, SymInt[] "
    "normalized_shape, float eps, float dropout_p, bool centre, bool need_sum, ScalarType? dtype=None) -> "
    "(Tensor output, Tensor sum, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor? seed, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, SymInt[] normalized_shape, ScalarType input_dtype, ScalarType residual_dtype, "
    "float dropout_p, bool centre, bool from_output, bool[4] output_mask) -> "
    "(Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sum_dtype(input: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """The dtype of residual + input."""
    return input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)


def _rows(tensor: torch.Tensor, n_cols: int) -> torch.Tensor:
    """View `tensor` as (outer, middle, inner, n_cols) with contiguous columns; copies only where strides forbid it.

    Rows that three strides lead to, such as those of transposed heads, are not copied. One stride is (M, 1, 1, n_cols).
    """
    found = _row_layout(tensor.shape, tensor.stride(), n_cols)
    return _rows(tensor.contiguous(), n_cols) if found is None else tensor.as_strided(*found)


@functools.lru_cache(LAYOUTS)
def _row_layout(
    shape: torch.Size, strides: tuple[int, ...], n_cols: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides of `_rows`; None where there are none."""
    merged: list[tuple[int, int]] = []  # (size, stride), innermost first; neighbours with one stride are one
    columns, next_row = 1, n_cols
    for place, (size, stride) in enumerate(zip(reversed(shape), reversed(strides))):
        if columns < n_cols:  # a trailing dimension
            if size > 1 and stride != columns:
                return None
            columns *= size
            next_row = strides[-place - 2] if place + 1 < len(shape) else n_cols
        elif size > 1 and merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        elif size > 1:
            merged.append((size, stride))
    if len(merged) > 3:
        return None
    if not merged:  # one row, as far from the next as in a batch that it may be of: then it runs the same machine code
        merged = [(1, next_row)]
    merged = [(1, 0)] * (3 - len(merged)) + merged  # innermost first: the kernels fold divisions by 1
    sizes, steps = zip(*reversed(merged))
    return (*sizes, n_cols), (*steps, 1)


def _require_triton(x: torch.Tensor) -> None:
    reason = why_not_triton(x.device, x.dtype)
    if reason:
        raise NotImplementedError(f"this operation is a Triton kernel, and {reason}; call kernels.layer_norm instead")


def _empty(like: torch.Tensor, needed: bool, dtype: torch.dtype) -> torch.Tensor:
    """An empty contiguous tensor of the shape of `like`, (0,) where it is not needed."""
    if not needed:
        return like.new_empty(0, dtype=dtype)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)  # faster than new_empty by shape


def _new_outputs(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_shape: Sequence[int],
    centre: bool,
    need_sum: bool,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, ...]:
    """Empty output and sum (the shape of the input), mean (M, 2), rstd (M,); (0,) for those there will not be."""
    has_sum = residual is not None and need_sum
    output, total = _empty(input, True, dtype or input.dtype), _empty(input, has_sum, sum_dtype(input, residual))
    n_rows = math.prod(input.shape[: input.ndim - len(normalized_shape)])
    rstd = input.new_empty(n_rows, dtype=torch.promote_types(input.dtype, torch.float32))
    return output, total, rstd.new_empty((n_rows, 2) if centre else 0), rstd


def _forward(input: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """`norm_forward`, what `_make_outputs` makes."""
    inputs, asked = (input, *rest[:4]), (tuple(rest[4]), *rest[5:])  # the second begins with the normalized shape
    return FORWARDS.run(inputs, asked, lambda: _make_outputs(*inputs, *asked))


def _make_outputs(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
    dropout_p: float,
    centre: bool,
    need_sum: bool,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[torch.Tensor, ...], tuple[()] | None]:
    """Output (dtype, by default the input's), sum, mean (M, 2), 1 / sqrt(variance + eps) (M,), in float32 at least.

    For calls that are new; and what `Calls.run` wants to know.
    """
    output, total, mean, rstd = _new_outputs(input, residual, normalized_shape, centre, need_sum, dtype)
    if input.numel() == 0:
        return (output, total, mean.zero_(), rstd.zero_()), None
    _require_triton(input)
    from kernels.layer_norm.forward import launch_forward

    n_cols = math.prod(normalized_shape)
    seed, weight, bias = (None if x is None else x.contiguous() for x in (seed, weight, bias))
    launch_forward(
        _rows(input, n_cols),
        None if residual is None else _rows(residual, n_cols),
        seed,
        weight,
        bias,
        output,
        total if total.numel() else None,
        mean if centre else None,
        rstd,
        eps,
        dropout_p,
        sum_dtype(input, residual),
    )
    return (output, total, mean, rstd), ()


def _new_gradients(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """Empty gradients of input, residual, weight and bias; (0,) where the mask says that one is not needed."""
    dtypes = (input_dtype, residual_dtype, *(x.dtype if y is None else y.dtype for y in (weight, bias)))
    return tuple(
        _empty(x if like is None else like, like is not None and needed, dtype)
        for like, dtype, needed in zip((x, x, weight, bias), dtypes, output_mask)
    )


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """`norm_backward`, what `_make_gradients` makes."""
    *numbers, output_mask = args[9:]
    inputs, asked = args[:8], (tuple(args[8]), *numbers, tuple(output_mask))
    return BACKWARDS.run(inputs, asked, lambda: _make_gradients(*inputs, *asked))


def _make_gradients(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    normalized_shape: Sequence[int],
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    dropout_p: float,
    centre: bool,
    from_output: bool,
    output_mask: Sequence[bool],
) -> tuple[tuple[torch.Tensor, ...], Sequence[torch.Tensor] | None]:
    """Gradients of input, residual, weight and bias; one that the mask leaves out has 0 elements.

    For calls that are new; and the sums of the kernels' programs, see `Calls.run`.

    x: what was normalised, or, `from_output`, what came out.
    """
    grads = _new_gradients(x, weight, bias, input_dtype, residual_dtype, output_mask)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads), None
    from kernels.layer_norm.backward import launch_backward

    n_cols = math.prod(normalized_shape)
    seed, weight, bias = (None if y is None else y.contiguous() for y in (seed, weight, bias))
    dinput, dresidual, dweight, dbias = (grad if need else None for grad, need in zip(grads, output_mask))
    partials = launch_backward(
        _rows(grad_output, n_cols),
        None if grad_sum is None else _rows(grad_sum, n_cols),
        _rows(x, n_cols),
        seed,
        weight,
        bias,
        mean.contiguous() if centre else None,
        rstd.contiguous(),
        dinput,
        dresidual,
        dweight,
        dbias,
        dropout_p,
        centre,
        from_output,
    )
    return grads, partials


for _key in ("CPU", "CUDA"):
    library.impl("norm_forward", _forward, _key)
    library.impl("norm_backward", _backward, _key)


@torch.library.register_fake("kernels::norm_forward", lib=library)
def _fake_forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
    dropout_p: float,
    centre: bool,
    need_sum: bool,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    return _new_outputs(input, residual, normalized_shape, centre, need_sum, dtype)


@torch.library.register_fake("kernels::norm_backward", lib=library)
def _fake_backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    normalized_shape: Sequence[int],
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    dropout_p: float,
    centre: bool,
    from_output: bool,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    return _new_gradients(x, weight, bias, input_dtype, residual_dtype, output_mask)
