"""Layer norm as registered operations, and the autograd function outside them.

`torch.ops.kernels.layer_norm_forward` and `layer_norm_backward` run the Triton kernels on CUDA tensors, and on CPU
tensors when Triton's interpreter is on; other CPU tensors, and float64, take PyTorch's own layer norm. Both write new,
contiguous tensors and change no input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.backend import why_not_triton

Parameters = Sequence[torch.Tensor | None]

library = torch.library.Library("kernels", "FRAGMENT")
library.define(
    "layer_norm_forward(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "ScalarType? dtype=None) -> (Tensor output, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "layer_norm_backward(Tensor grad_output, Tensor input, SymInt[] normalized_shape, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rows(tensor: torch.Tensor, normalized_shape: Sequence[int]) -> torch.Tensor:
    """View `tensor` (..., *normalized_shape) as (M, N) with contiguous columns; copies only where strides forbid it."""
    n_cols = math.prod(normalized_shape)
    rows = tensor.reshape(tensor.numel() // n_cols, n_cols)
    return rows if n_cols == 1 or rows.stride(1) == 1 else rows.contiguous()


def _new_outputs(
    input: torch.Tensor, normalized_shape: Sequence[int], dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty output (the shape of the input), mean and rstd (M,)."""
    output = torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)
    n_rows = math.prod(input.shape[: input.ndim - len(normalized_shape)])
    statistics_dtype = torch.promote_types(input.dtype, torch.float32)
    mean = torch.empty((n_rows,), dtype=statistics_dtype, device=input.device)
    return output, mean, torch.empty_like(mean)


def _forward(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (dtype, by default the input's), mean and 1 / sqrt(variance + eps) (M,), in float32 at least."""
    output, mean, rstd = _new_outputs(input, normalized_shape, dtype)
    if input.numel() == 0:
        return output, mean.zero_(), rstd.zero_()
    if why_not_triton(input.device, input.dtype):
        weight, bias = (None if x is None else x.to(mean.dtype) for x in (weight, bias))
        plain, mean, rstd = torch.native_layer_norm(input.to(mean.dtype), normalized_shape, weight, bias, eps)
        return output.copy_(plain), mean.reshape(-1), rstd.reshape(-1)

    from kernels.layer_norm.forward import launch_forward

    rows = _rows(input, normalized_shape)
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    launch_forward(rows, weight, bias, output, mean, rstd, eps)
    return output, mean, rstd


def _backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of input, weight and bias, each shaped like its tensor; one that the mask leaves out has 0 elements."""
    grads = _new_gradients(input, weight, bias, output_mask)
    if input.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if why_not_triton(input.device, input.dtype):
        plain = plain_backward(grad_output, input, normalized_shape, mean, rstd, weight, bias, output_mask)
        return tuple(grad if found is None else grad.copy_(found) for grad, found in zip(grads, plain))

    from kernels.layer_norm.backward import launch_backward

    launch_backward(
        _rows(grad_output, normalized_shape),
        _rows(input, normalized_shape),
        None if weight is None else weight.contiguous(),
        mean,
        rstd,
        *(grad if needed else None for grad, needed in zip(grads, output_mask)),
    )
    return grads


def _new_gradients(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, output_mask: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """Empty gradients; (0,) where the mask says that one is not needed."""
    return tuple(
        input.new_empty((0,)) if like is None or not needed else input.new_empty(like.shape, dtype=like.dtype)
        for like, needed in zip((input, weight, bias), output_mask)
    )


def plain_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients from PyTorch, differentiable once more; None for those that the mask leaves out."""
    n_kept = input.ndim - len(normalized_shape)
    statistics = (x.reshape(*input.shape[:n_kept], *(1 for _ in normalized_shape)) for x in (mean, rstd))
    exact = [None if x is None else x.to(mean.dtype) for x in (grad_output, input, weight, bias)]
    grads = torch.ops.aten.native_layer_norm_backward(
        *exact[:2], normalized_shape, *statistics, *exact[2:], list(output_mask)
    )
    return tuple(
        grad.to(like.dtype) if needed and like is not None else None
        for grad, like, needed in zip(grads, (input, weight, bias), output_mask)
    )


for _key in ("CPU", "CUDA"):
    library.impl("layer_norm_forward", _forward, _key)
    library.impl("layer_norm_backward", _backward, _key)


@torch.library.register_fake("kernels::layer_norm_forward", lib=library)
def _fake_forward(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    return _new_outputs(input, normalized_shape, dtype)


@torch.library.register_fake("kernels::layer_norm_backward", lib=library)
def _fake_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    return _new_gradients(input, weight, bias, output_mask)


class LayerNorm(torch.autograd.Function):
    """The registered operations with backward, double backward (by PyTorch's operations) and vmap."""

    @staticmethod
    def forward(
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, mean and rstd as the operation gives them; only the output is differentiable."""
        return torch.ops.kernels.layer_norm_forward.default(input, normalized_shape, weight, bias, eps, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep the inputs (references, no copies) and two numbers a row."""
        input, ctx.normalized_shape, weight, bias, _, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, mean, rstd)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input, weight and bias, those that are needed."""
        if grad_output is None:
            return (None,) * 6
        input, weight, bias, mean, rstd = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        arguments = (grad_output, input, ctx.normalized_shape, mean, rstd, weight, bias, needed)
        grads: Parameters
        if torch.is_grad_enabled():  # create_graph=True: this backward is itself to be differentiated
            grads = plain_backward(*arguments)
        else:
            found = torch.ops.kernels.layer_norm_backward.default(*arguments)
            grads = [grad if need else None for grad, need in zip(found, needed)]
        return grads[0], None, grads[1], grads[2], None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype | None,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
        """A batch is more rows. Weight and bias that differ along it are applied after the kernel."""
        batched = in_dims[0] is not None
        input = input.movedim(in_dims[0], 0) if in_dims[0] is not None else input
        dtype = dtype or input.dtype
        if in_dims[2] is None and in_dims[3] is None:
            output, mean, rstd = apply_layer_norm(input, normalized_shape, weight, bias, eps, dtype)
        else:
            exact = torch.promote_types(input.dtype, torch.float32)
            output, mean, rstd = apply_layer_norm(input, normalized_shape, None, None, eps, exact)
            output = output if batched else output.unsqueeze(0)
            parameter_shape = (info.batch_size, *(1,) * (output.ndim - 1 - len(normalized_shape)), *normalized_shape)
            weight, bias = (
                x if x is None or dim is None else x.movedim(dim, 0).reshape(parameter_shape)
                for x, dim in ((weight, in_dims[2]), (bias, in_dims[3]))
            )
            output = output if weight is None else output * weight
            output = (output if bias is None else output + bias).to(dtype)
        if not batched:
            return (output, mean, rstd), (0, None, None)
        return (output, mean.reshape(info.batch_size, -1), rstd.reshape(info.batch_size, -1)), (0, 0, 0)


class LayerNormWithTangents(LayerNorm):
    """The same with forward mode, by PyTorch's operations; apart because Dynamo refuses a function with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep what backward and jvp need."""
        LayerNorm.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *inputs[2:4], *output[1:])
        ctx.dtype = output[0].dtype

    @staticmethod
    def jvp(
        ctx: Any,
        input_tangent: torch.Tensor | None,
        _shape: None,
        weight_tangent: torch.Tensor | None,
        bias_tangent: torch.Tensor | None,
        *_: None,
    ) -> tuple[torch.Tensor, None, None]:
        """Tangent of the output: the same linear map as dx, then the product rule for weight and bias."""
        input, weight, bias, mean, rstd = ctx.saved_tensors
        dims = tuple(range(-len(ctx.normalized_shape), 0))
        kept = (*input.shape[: input.ndim - len(dims)], *(1 for _ in dims))
        rstd = rstd.reshape(kept)
        xhat = (input - mean.reshape(kept)) * rstd
        tangent = torch.zeros_like(xhat)
        if input_tangent is not None:
            centred = input_tangent - input_tangent.mean(dims, keepdim=True)
            tangent = rstd * (centred - xhat * (xhat * centred).mean(dims, keepdim=True))
        if weight is not None:
            tangent = tangent * weight
        if weight_tangent is not None:
            tangent = tangent + xhat * weight_tangent
        if bias_tangent is not None:
            tangent = tangent + bias_tangent
        return tangent.to(ctx.dtype), None, None


def apply_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiable output, and mean and rstd; arguments as for the forward operation."""
    function = LayerNorm if torch.compiler.is_compiling() else LayerNormWithTangents
    return function.apply(input, normalized_shape, weight, bias, eps, dtype)
