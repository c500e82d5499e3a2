"""The norms by PyTorch's operations: the formula, and its fused kernels where they are exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.backend import autocasts
from kernels.subclasses import is_traced

HALF = (torch.float16, torch.bfloat16)
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


def _any_order(
    eps: float, gradients: tuple[torch.Tensor | None, ...], grad_outputs: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...] | None:
    """A hook after the backward of PyTorch's layer norm, whose third derivatives take mean and rstd for constants."""
    if not torch.is_grad_enabled() or grad_outputs[0] is None:
        return None
    node: Any = torch._C._current_autograd_node()
    x, weight, shape = node._saved_input, node._saved_weight, node._saved_normalized_shape
    exact = plain_gradients(grad_outputs[0], x, shape, weight, eps, True)
    return tuple(None if old is None else new for old, new in zip(gradients, exact))


def eager_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> torch.Tensor:
    """Layer norm, or without `centre` RMS norm; of 16-bit tensors on a CPU, and of mixed dtypes, in float32.

    A layer norm on a CPU goes through PyTorch's kernel twice where rows are far from 0, the second time with their mean
    taken off. That changes no bit of other rows.
    """
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
    if not centre:
        return torch.rms_norm(x, shape, weight, eps)
    output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    if x.is_cpu and x.numel():
        mean = mean.detach()
        distance = mean * rstd.detach()
        if not torch.linalg.vector_norm(distance, math.inf).item() <= FAR:
            shift = mean.masked_fill(distance.abs() <= FAR, 0.0)
            output = torch.native_layer_norm(x - shift, shape, weight, bias, eps)[0]
    if output.requires_grad:
        output.grad_fn.register_hook(functools.partial(_any_order, eps))  # type: ignore[union-attr]
    return output
