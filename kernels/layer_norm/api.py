"""The public norms: checks, choice of backend, and the call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels import backend as where
from kernels.backend import autocasts, choose
from kernels.dropout import add_dropped
from kernels.layer_norm.autograd import NormRules, apply_norm
from kernels.layer_norm.ops import sum_dtype

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
FLOAT32_EPS, FLOAT64_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def layer_norm(
    input: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    save_output: bool = False,
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
        eps: added to the variance, from 0. With 0 a constant row is 0 / 0, NaN, as in PyTorch.
        save_output: on the Triton kernels, keep the output for the backward instead of the input. That frees the input
            where the next layer keeps the output anyway. The backward then divides by the weight, which must have no
            zeros (it takes what was lost for 0); in 16 bits, small weights cost digits. Double backward raises.
        backend: "triton" for the kernels of this package, "torch" for PyTorch's own, "auto" for the former where they
            can run.

    Returns:
        The shape and dtype of the input; float32 under CUDA autocast.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, devices, eps or backend do not fit, or backend="triton" cannot run.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4.
    """
    return _norm(input, None, _shape(normalized_shape), weight, bias, eps, True, save_output, backend)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    save_output: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Divide the trailing dimensions of `input` by their root mean square, then scale.

    output = input / sqrt(mean(input^2) + eps) * weight

    Takes the place of `torch.nn.functional.rms_norm`; otherwise as `layer_norm`.

    Args:
        input, normalized_shape, weight, save_output, backend: as for `layer_norm`.
        eps: added to the mean square, from 0; None for the eps of float32, or of float64 with a float64 input.

    Returns, Raises: as `layer_norm`.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4, equation 4.
    """
    shape, eps = _shape(normalized_shape), _rms_eps(input, eps)
    return _norm(input, None, shape, weight, None, eps, False, save_output, backend)


def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    normalized_shape: int | Sequence[int] | None = None,
    save_output: bool = False,
    backend: str = "auto",
) -> Any:
    """Add a residual, then normalise: `layer_norm(residual + dropout(input))` in one pass over memory.

    Args:
        input: (..., *normalized_shape), the branch; dtypes as for `layer_norm`.
        residual: the shape of the input, any of its dtypes. The sum has the wider dtype of the two, and is rounded to
            it before it is normalised.
        weight, bias, eps, save_output, backend: as for `layer_norm`.
        dropout_p: probability with which an element of the input is dropped, the others divided by 1 - dropout_p. On
            the Triton kernels the backward draws the same numbers again; forward mode then raises.
        prenorm: also return the sum, which the next residual connection adds to.
        normalized_shape: by default the shape of weight or bias, or the last dimension.

    Returns:
        The output, shape and dtype of the input (float32 under CUDA autocast); with `prenorm` output and sum.

    Raises: as `layer_norm`.
    """
    shape = _shape(normalized_shape, input, weight, bias)
    return _norm(input, residual, shape, weight, bias, eps, True, save_output, backend, dropout_p, prenorm)


def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    normalized_shape: int | Sequence[int] | None = None,
    save_output: bool = False,
    backend: str = "auto",
) -> Any:
    """Add a residual, then divide by the root mean square: `rms_norm(residual + dropout(input))` in one pass.

    Arguments, result and errors as for `add_layer_norm`; eps as for `rms_norm`.
    """
    shape, eps = _shape(normalized_shape, input, weight), _rms_eps(input, eps)
    return _norm(input, residual, shape, weight, None, eps, False, save_output, backend, dropout_p, prenorm)


def _shape(normalized_shape: int | Sequence[int] | None, *like: torch.Tensor | None) -> tuple[int, ...]:
    """The trailing dimensions meant; by default those of the first parameter in `like`, after the input."""
    if normalized_shape is None:
        parameters = [x for x in like[1:] if x is not None]
        return tuple(parameters[0].shape if parameters else like[0].shape[-1:])  # type: ignore[union-attr]
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _rms_eps(input: torch.Tensor, eps: float | None) -> float:
    if eps is not None:
        return eps
    return FLOAT64_EPS if input.dtype == torch.float64 else FLOAT32_EPS


def _norm(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
    save_output: bool,
    backend: str,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Any:
    """Layer norm, or without `centre` RMS norm, of residual + dropout(input), and with `prenorm` that sum."""
    if _is_simple(input, residual, shape, weight, bias, eps, dropout_p, backend):
        total = input if residual is None else add_dropped(input, residual, dropout_p)
        output = _fused(total, shape, weight, bias, eps, centre)
        return (output, total) if prenorm else output
    _check(input, shape, weight, bias, eps)
    if residual is not None:
        _check_residual(input, residual, dropout_p)
    # Autocast on a GPU makes the output float32; None is the input's dtype.
    dtype = torch.float32 if input.dtype in HALF and input.is_cuda and autocasts(input.device) else None
    if choose(backend, input.device, sum_dtype(input, residual)).backend == "torch":
        total = input if residual is None else add_dropped(input, residual, dropout_p)
        output = _plain(total, shape, weight, bias, eps, centre).to(dtype or input.dtype)
        return (output, total) if prenorm else output
    seed = torch.randint(2**63 - 1, (1,), device=input.device) if dropout_p > 0.0 else None
    need_sum = prenorm or (torch.is_grad_enabled() and not save_output)
    rules = NormRules(shape, eps, float(dropout_p), centre, save_output, need_sum, dtype)
    output, total, *_ = apply_norm(input, residual, seed, weight, bias, rules)
    return (output, total) if prenorm else output


def _is_simple(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    backend: str,
) -> bool:
    """Whether a call is right, and PyTorch's on a CPU: what the rest would decide in twice the time of a small call."""
    dtype = input.dtype
    return (
        input.is_cpu and backend in ("auto", "torch") and not where.INTERPRETED and shape != ()
        and input.shape[-len(shape):] == shape and dtype in DTYPES
        and (weight is None or (weight.shape == shape and weight.dtype == dtype and weight.is_cpu))
        and (bias is None or (bias.shape == shape and bias.dtype == dtype and bias.is_cpu))
        and isinstance(eps, (int, float)) and 0 <= eps < math.inf
        and (residual is None or (
            residual.is_cpu and residual.dtype == dtype and residual.shape == input.shape
            and isinstance(dropout_p, (int, float)) and 0 <= dropout_p <= 1
        ))
    )  # fmt: skip


def _plain(
    x: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> torch.Tensor:
    """Through PyTorch, whose fused kernels want one dtype."""
    if any(parameter is not None and parameter.dtype != x.dtype for parameter in (weight, bias)):
        weight, bias = (None if parameter is None else parameter.float() for parameter in (weight, bias))
        return _fused(x.float(), shape, weight, bias, eps, centre)
    return _fused(x, shape, weight, bias, eps, centre)


def _fused(
    x: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
) -> torch.Tensor:
    """PyTorch's own norm."""
    return torch.layer_norm(x, shape, weight, bias, eps) if centre else torch.rms_norm(x, shape, weight, eps)


def _check_residual(input: torch.Tensor, residual: torch.Tensor, dropout_p: float) -> None:
    """Raise TypeError or ValueError in one line for what `_check` does not see."""
    if residual.shape != input.shape:
        raise ValueError(
            f"residual must have the input's shape {tuple(input.shape)}, found {tuple(residual.shape)}; expand it"
        )
    if residual.device != input.device:
        raise ValueError(f"residual must be on the input's device {input.device}, found {residual.device}; move it")
    if residual.dtype not in DTYPES:
        raise TypeError(f"residual must be of a dtype that the norms take, found {residual.dtype}; convert it")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability from 0 to 1, found {dropout_p!r}")


def _check(
    input: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    """Raise TypeError or ValueError in one line, with the rule, what was found and the remedy."""
    autocast = autocasts(input.device)
    if input.dtype not in DTYPES:
        raise TypeError(f"the norms take float16, bfloat16, float32 and float64, found {input.dtype}; convert it")
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape must be the trailing dimensions of the input, found {shape} for an input of shape "
            f"{tuple(input.shape)}; for the last dimension alone pass input.shape[-1:]"
        )
    dtypes = []
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        dtypes.append(parameter.dtype)
        if parameter.shape != shape:
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
