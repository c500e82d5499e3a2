"""The norms by PyTorch's operations: the formula, and its fused kernels where they are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels import backend as backends
from kernels.autograd import apply_at_once, is_followed, transformed
from kernels.backend import HALF, autocasts, wants_gradient
from kernels.subclasses import PLAIN, is_traced

# Mean over deviation of a row up to which PyTorch's CPU kernel keeps its digits: it computes x * rstd - mean * rstd.
FAR = 4.0


def plain_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (..., *normalized_shape) and rstd (..., 1, ...) by the formula, in float32 at least.

    Args:
        x: (..., *normalized_shape); weight, bias: normalized_shape or None.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = tuple(range(-len(normalized_shape), 0))
    if centre:
        x = x - x.detach().mean(dims, keepdim=True)  # a constant shift has no derivative
        x = x - x.mean(dims, keepdim=True)  # what rounding left of the mean of a row far from 0
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    output = x * rstd
    output = output if weight is None else output * weight
    return output if bias is None else output + bias, rstd


def plain_gradients(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias by the formula, differentiable to any order, in float32 at least."""
    dims = tuple(range(-len(normalized_shape), 0))
    xhat, rstd = plain_norm(x, normalized_shape, None, None, eps, centre)
    grad_output = grad_output.to(xhat.dtype)
    dx = grad_output if weight is None else grad_output * weight
    along_xhat = (dx * xhat).mean(dims, keepdim=True)
    dx = dx - dx.mean(dims, keepdim=True) if centre else dx
    dx = (dx - xhat * along_xhat) * rstd
    return dx, (grad_output * xhat).sum_to_size(normalized_shape), grad_output.sum_to_size(normalized_shape)


def near_zero(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """PyTorch's layer norm: output, mean, rstd and, where rows of a CPU tensor are far from 0, what is taken off them.

    Then it is done twice, the second time of x - shift. That changes no bit of other rows, from which 0 is taken off.
    """
    output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    if not x.is_cpu or not x.numel():
        return output, mean, rstd, None
    distance = mean * rstd
    if torch.linalg.vector_norm(distance, math.inf).item() <= FAR:
        return output, mean, rstd, None
    shift = mean.masked_fill(distance.abs() <= FAR, 0.0)
    return *torch.native_layer_norm(x - shift, shape, weight, bias, eps), shift


class LayerNorm(torch.autograd.Function):
    """PyTorch's layer norm (input, weight, bias, normalized_shape, eps), of one dtype, with derivatives of any order.

    PyTorch's own has the third derivative wrong: it takes mean and rstd for constants there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        shape: Sequence[int],
        eps: float,
    ) -> torch.Tensor:
        """The output, as the input."""
        output, *statistics = near_zero(x, shape, weight, bias, eps)
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(x, weight, bias, *statistics)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, weight and bias: by the formula where they are themselves to be differentiated or batched."""
        x, weight, bias, mean, rstd, shift = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or transformed():
            exact = plain_gradients(grad, x, ctx.shape, weight, ctx.eps, True)
            found = tuple(y.to(x.dtype) for y in exact)
        else:
            near = x if shift is None else x - shift
            found = torch.ops.aten.native_layer_norm_backward.default(
                grad, near, ctx.shape, mean, rstd, weight, bias, needed
            )
        return (*(y if need else None for y, need in zip(found, needed)), None, None)


def eager_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> torch.Tensor:
    """Layer norm, or without `centre` RMS norm; of 16-bit tensors on a CPU, and of mixed dtypes, in float32."""
    dtype = x.dtype
    if (
        (dtype in HALF and (x.is_cpu or autocasts(x.device)))
        or (weight is not None and weight.dtype is not dtype)
        or (bias is not None and bias.dtype is not dtype)
    ):
        wide = torch.promote_types(dtype, torch.float32)
        x, weight, bias = (y if y is None else y.to(wide) for y in (x, weight, bias))  # type: ignore[assignment]
    if is_traced(x):  # PyTorch's kernels have derivatives of forward mode wrong
        return plain_norm(x, shape, weight, bias, eps, centre)[0]
    return simple_norm(x, shape, weight, bias, eps, centre)


def simple_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> torch.Tensor:
    """`eager_norm` of tensors of one dtype that hold numbers."""
    if not centre:
        return torch.rms_norm(x, shape, weight, eps)
    if wants_gradient(x, weight, bias):
        return apply_at_once(LayerNorm, x, weight, bias, shape, eps)
    return near_zero(x, shape, weight, bias, eps)[0]


def is_simple(
    x: Any, residual: Any, shape: Any, weight: Any, bias: Any, eps: Any, dropout_p: Any, backend: Any
) -> bool:
    """Whether a call of a norm, right or wrong, is one for `simple_norm`: of numbers on a CPU, without dropout.

    All is asked at once: one by one the questions take longer than the norm of few rows.

    Arguments as the public norms have them, unchecked. Not so with backend="triton", or in Triton's interpreter.
    """
    if (
        type(x) is not torch.Tensor
        or type(weight) not in PLAIN
        or not (type(shape) is tuple or type(shape) is torch.Size)
        or not (type(eps) is type(dropout_p) is float and dropout_p == 0.0)
        or is_followed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_any_autocast_enabled()
        or x.is_nested
    ):
        return False
    dtype, sizes = x.dtype, x.shape
    return (
        x.is_cpu
        and weight.is_cpu
        and (dtype is torch.float32 or dtype is torch.float64)
        and x.layout is weight.layout is torch.strided
        and weight.dtype is dtype
        and len(shape) == 1
        and weight.shape == shape == sizes[-1:]
        and 0.0 <= eps < math.inf
        and (backend == "torch" or (backend == "auto" and not backends.INTERPRETED))
        and (
            bias is None
            or (type(bias) in PLAIN and bias.is_cpu and bias.layout is torch.strided)
            and bias.dtype is dtype
            and bias.shape == shape
        )
        and (
            residual is None
            or (type(residual) is torch.Tensor and residual.is_cpu and residual.layout is torch.strided)
            and residual.dtype is dtype
            and not residual.is_nested
            and residual.shape == sizes
        )
    )
