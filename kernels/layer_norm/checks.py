"""What the norms refuse, each in one line: the rule, what was found, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from kernels.backend import HALF, as_number, autocasts, shown

DTYPES = (*HALF, torch.float32, torch.float64)


def sizes_of(normalized_shape: Any) -> tuple[int, ...]:
    """The sizes in a normalized_shape, an integer or several, as Python's.

    Raises:
        TypeError: it is something else.
    """
    kind = type(normalized_shape)
    if kind is int:
        return (normalized_shape,)
    if (kind is tuple or kind is torch.Size) and len(normalized_shape) == 1 and type(normalized_shape[0]) is int:
        return normalized_shape
    given = as_number(normalized_shape)
    sizes = tuple(map(as_number, given)) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) for size in sizes):
        raise TypeError(
            f"normalized_shape must be an integer or several, found {shown(normalized_shape)}; for the last dimension "
            "pass input.shape[-1:]"
        )
    return sizes


def check_dropout(dropout_p: Any) -> None:
    """Raise ValueError for what is no probability."""
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(
            f"dropout_p must be a probability from 0 to 1, found {shown(dropout_p)}; for no dropout pass 0.0"
        )


def check(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: Any,
) -> None:
    """Raise TypeError or ValueError where tensors that are neither nested nor DTensors, or eps, do not fit."""
    _check_input(input, shape)
    if residual is not None:
        _check_residual(input, residual)
    _check_parameters(input, shape, weight, bias)
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number from 0, found {shown(eps)}; the usual value is 1e-5")


def _check_input(input: torch.Tensor, shape: tuple[int, ...]) -> None:
    if input.dtype not in DTYPES:
        raise TypeError(f"the norms take float16, bfloat16, float32 and float64, found {input.dtype}; convert it")
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape must be the trailing dimensions of the input, found {tuple(shape)} for an input of "
            f"shape {tuple(input.shape)}; for the last dimension alone pass input.shape[-1:]"
        )


def _check_residual(input: torch.Tensor, residual: torch.Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(
            f"residual must have the input's shape {tuple(input.shape)}, found {tuple(residual.shape)}; expand it"
        )
    if residual.device != input.device:
        raise ValueError(f"residual must be on the input's device {input.device}, found {residual.device}; move it")
    if residual.dtype not in DTYPES:
        raise TypeError(f"residual must be of a dtype that the norms take, found {residual.dtype}; convert it")


def _check_parameters(
    input: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    dtype, device, dtypes = input.dtype, input.device, []
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        dtypes.append(parameter.dtype)
        if parameter.shape != shape:
            raise ValueError(
                f"{name} must have the shape normalized_shape = {tuple(shape)}, found {tuple(parameter.shape)}; "
                f"reshape it or pass None"
            )
        if parameter.device != device:
            raise ValueError(
                f"{name} must be on the input's device {device}, found {parameter.device}; move it with .to()"
            )
        fits = parameter.dtype == dtype or (parameter.dtype == torch.float32 and dtype in HALF)
        if not fits and not autocasts(device):
            raise TypeError(
                f"{name} must have the input's dtype {dtype}, or float32 with a float16 or bfloat16 input, "
                f"found {parameter.dtype}; convert it with .to(input.dtype)"
            )
    if len(dtypes) == 2 and dtypes[0] != dtypes[1] and not autocasts(device):
        raise TypeError(f"weight and bias must share a dtype, found {dtypes[0]} and {dtypes[1]}; convert one of them")
