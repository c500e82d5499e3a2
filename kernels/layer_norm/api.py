"""The public layer norm: checks, choice of backend, and the call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kernels.backend import autocasts, choose
from kernels.layer_norm.ops import apply_layer_norm

__all__ = ["layer_norm"]

HALF = (torch.float16, torch.bfloat16)


def layer_norm(
    input: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Normalise the trailing dimensions of `input` to mean 0 and variance 1, then scale and shift.

    output = (input - mean) / sqrt(variance + eps) * weight + bias

    Mean and biased variance are taken over `normalized_shape`, in float32 at least. Takes the place of
    `torch.nn.functional.layer_norm`: the positional arguments are the same, and so is autocast's effect. A row's result
    does not depend on the rows beside it, and the gradients repeat bit for bit.

    Args:
        input: (..., *normalized_shape), float16, bfloat16, float32 or float64, any strides.
        normalized_shape: the trailing dimensions to normalise over; an int stands for one dimension.
        weight: `normalized_shape`, the factor of each feature, or None for 1. Dtype of the input, or float32 with a
            float16 or bfloat16 input.
        bias: `normalized_shape`, added to each feature, or None for 0. Dtype of the weight.
        eps: added to the variance, from 0; so that a constant row divides by sqrt(eps) and not by 0.
        backend: "triton" for the kernels of this package, "torch" for PyTorch's own, "auto" for the former where they
            can run.

    Returns:
        The shape and dtype of the input; float32 under CUDA autocast.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, devices, eps or backend do not fit, or backend="triton" cannot run.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    autocast = autocasts(input.device)
    _check(input, shape, weight, bias, eps, autocast)
    if choose(backend, input.device, input.dtype).backend == "triton":
        dtype = torch.float32 if autocast and input.is_cuda else None
        return apply_layer_norm(input, shape, weight, bias, eps, dtype)[0]
    mixed = any(x is not None and x.dtype != input.dtype for x in (weight, bias))
    if mixed and input.is_cuda and not autocast:  # PyTorch mixes dtypes on the CPU only
        output = torch.layer_norm(input.float(), shape, weight, bias, eps)
        return output.to(input.dtype)
    return torch.layer_norm(input, shape, weight, bias, eps)


def _check(
    input: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    autocast: bool,
) -> None:
    """Raise TypeError or ValueError in one line, with the rule, what was found and the remedy."""
    if not input.is_floating_point():
        raise TypeError(f"layer_norm takes a floating-point input, found {input.dtype}; convert it with input.float()")
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape must be the trailing dimensions of the input, found {shape} for an input of shape "
            f"{tuple(input.shape)}; for the last dimension alone pass input.shape[-1:]"
        )
    dtypes = []
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        dtypes.append(parameter.dtype)
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name} must have the shape normalized_shape = {shape}, found {tuple(parameter.shape)}; "
                f"reshape it or pass None"
            )
        if parameter.device != input.device:
            raise ValueError(
                f"{name} must be on the input's device {input.device}, found {parameter.device}; move it with .to()"
            )
        if not autocast and parameter.dtype != input.dtype:
            if parameter.dtype != torch.float32 or input.dtype not in HALF:
                raise TypeError(
                    f"{name} must have the input's dtype {input.dtype}, or float32 with a float16 or bfloat16 input, "
                    f"found {parameter.dtype}; convert it with .to(input.dtype)"
                )
    if not autocast and len(dtypes) == 2 and dtypes[0] != dtypes[1]:
        raise TypeError(f"weight and bias must share a dtype, found {dtypes[0]} and {dtypes[1]}; convert one of them")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number from 0, found {eps!r}; the usual value is 1e-5")
