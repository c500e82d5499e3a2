"""The public norms: checks, choice of backend, and the call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, overload

import torch
from torch.overrides import has_torch_function_variadic

from kernels import backend as backends
from kernels.again import is_plain, remember
from kernels.autograd import in_forward_mode
from kernels.backend import HALF, as_number, autocasts, check_tensor_types, choose
from kernels.dropout import add_dropped
from kernels.layer_norm.autograd import NormRules, apply_norm
from kernels.layer_norm.checks import check, check_dropout, sizes_of
from kernels.layer_norm.eager import eager_norm, is_simple, simple_norm
from kernels.layer_norm.ops import sum_dtype
from kernels.layer_norm.subclasses import on_what_they_hold
from kernels.subclasses import holds_others, is_dtensor, overridden

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

FLOAT32_EPS, FLOAT64_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
NO_RESIDUAL = "residual must be a tensor, found None; call layer_norm or rms_norm for the input alone"


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
    does not depend on the rows beside it, and the gradients repeat bit for bit. Digits are kept however far a row's
    mean is from 0; but the squares of its deviations must not overflow, as those of 1e20 do in float32.

    Args:
        input: (..., *normalized_shape), float16, bfloat16, float32 or float64, any strides. Also a jagged nested
            tensor, or a DTensor beside replicated parameters, neither divided along normalized_shape: see
            `kernels/subclasses.py`.
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
        TypeError: an argument is no tensor, or of another dtype or layout, or normalized_shape holds no integers.
        ValueError: shapes, devices, eps or backend do not fit, or backend="triton" cannot run.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4.
    """
    if has_torch_function_variadic(input, weight, bias):
        return overridden(
            layer_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight,
            bias,
            eps,
            save_output=save_output,
            backend=backend,
        )
    return _norm(input, None, normalized_shape, weight, bias, eps, True, save_output, backend)


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
    if has_torch_function_variadic(input, weight):
        return overridden(
            rms_norm, (input, weight), input, normalized_shape, weight, eps, save_output=save_output, backend=backend
        )
    return _norm(input, None, normalized_shape, weight, None, eps, False, save_output, backend)


@overload
def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    prenorm: Literal[False] = ...,
    dropout_p: float = ...,
    normalized_shape: int | Sequence[int] | None = ...,
    save_output: bool = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    prenorm: Literal[True],
    dropout_p: float = ...,
    normalized_shape: int | Sequence[int] | None = ...,
    save_output: bool = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    prenorm: bool = ...,
    dropout_p: float = ...,
    normalized_shape: int | Sequence[int] | None = ...,
    save_output: bool = ...,
    backend: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


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
            the Triton kernels the backward draws the same numbers again. The input as a DTensor is dropped from before.
        prenorm: also return the sum, which the next residual connection adds to.
        normalized_shape: by default the shape of weight or bias, or the last dimension.

    Returns:
        The output, shape and dtype of the input (float32 under CUDA autocast); with `prenorm` output and sum.

    Raises: as `layer_norm`.
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        return overridden(
            add_layer_norm,
            (input, residual, weight, bias),
            input,
            residual,
            weight,
            bias,
            eps,
            dropout_p=dropout_p,
            prenorm=prenorm,
            normalized_shape=normalized_shape,
            save_output=save_output,
            backend=backend,
        )
    if residual is None:
        raise TypeError(NO_RESIDUAL)
    shape = _default_shape(input, weight, bias) if normalized_shape is None else normalized_shape
    return _norm(input, residual, shape, weight, bias, eps, True, save_output, backend, dropout_p, prenorm)


@overload
def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = ...,
    eps: float | None = ...,
    *,
    prenorm: Literal[False] = ...,
    dropout_p: float = ...,
    normalized_shape: int | Sequence[int] | None = ...,
    save_output: bool = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = ...,
    eps: float | None = ...,
    *,
    prenorm: Literal[True],
    dropout_p: float = ...,
    normalized_shape: int | Sequence[int] | None = ...,
    save_output: bool = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = ...,
    eps: float | None = ...,
    *,
    prenorm: bool = ...,
    dropout_p: float = ...,
    normalized_shape: int | Sequence[int] | None = ...,
    save_output: bool = ...,
    backend: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


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
    if has_torch_function_variadic(input, residual, weight):
        return overridden(
            add_rms_norm,
            (input, residual, weight),
            input,
            residual,
            weight,
            eps,
            dropout_p=dropout_p,
            prenorm=prenorm,
            normalized_shape=normalized_shape,
            save_output=save_output,
            backend=backend,
        )
    if residual is None:
        raise TypeError(NO_RESIDUAL)
    shape = _default_shape(input, weight) if normalized_shape is None else normalized_shape
    return _norm(input, residual, shape, weight, None, eps, False, save_output, backend, dropout_p, prenorm)


def _default_shape(input: Any, *parameters: Any) -> Any:
    """The trailing dimensions meant where none are given."""
    given = [x for x in parameters if x is not None]
    like = given[0] if given else input
    if not isinstance(like, torch.Tensor) or (like.is_nested and like.layout != torch.jagged):
        return ()  # has no shape, and is refused for what it is
    return like.shape if given else like.shape[-1:]


def _norm(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: Any,
    centre: bool,
    save_output: bool,
    backend: str,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Any:
    """Layer norm, or without `centre` RMS norm, of residual + dropout(input), and with `prenorm` that sum."""
    if is_simple(input, residual, normalized_shape, weight, bias, eps, dropout_p, backend):
        total = input if residual is None else residual + input
        output = simple_norm(total, sizes_of(normalized_shape), weight, bias, eps, centre)
        return (output, total) if prenorm else output
    shape = sizes_of(normalized_shape)
    asked = _what_is_looked_at(
        input, residual, shape, weight, bias, eps, centre, save_output, backend, dropout_p, prenorm
    )
    rules = None if asked is None else CHECKED.get(asked)  # compiled code would watch what is in there
    if rules is not None and not backends.why_not_triton(input.device, sum_dtype(input, residual)):
        return _by_triton(input, residual, weight, bias, rules, prenorm)
    if eps is None and not centre:
        eps = FLOAT64_EPS if getattr(input, "dtype", None) == torch.float64 else FLOAT32_EPS
    check_tensor_types({"input": input} if residual is None else {"input": input, "residual": residual})
    check_tensor_types({"weight": weight, "bias": bias}, or_none=True)
    eps, dropout_p = as_number(eps), as_number(dropout_p)
    save_output, prenorm = bool(save_output), bool(prenorm)
    check_dropout(dropout_p)
    if holds_others(input, residual, weight, bias):
        if dropout_p and is_dtensor(input):  # whose random numbers know which process holds what
            input, dropout_p = torch.nn.functional.dropout(input, dropout_p), 0.0

        def call(input: Any, residual: Any, weight: Any, bias: Any) -> Any:
            return _norm(input, residual, shape, weight, bias, eps, centre, save_output, backend, dropout_p, prenorm)

        return on_what_they_hold(call, input, residual, weight, bias, len(shape))
    check(input, residual, shape, weight, bias, eps)
    # Autocast on a GPU makes the output float32.
    half_to_float = input.dtype in HALF and input.is_cuda and autocasts(input.device)
    dtype = torch.float32 if half_to_float else input.dtype
    if choose(backend, input.device, sum_dtype(input, residual)).backend == "torch" or in_forward_mode():
        return _by_pytorch(input, residual, shape, weight, bias, eps, centre, dropout_p, prenorm, dtype)
    need_sum = prenorm or (torch.is_grad_enabled() and not save_output)
    rules = NormRules(shape, eps, float(dropout_p), centre, save_output, need_sum, dtype)
    if asked is not None:
        remember(CHECKED, asked, rules)
    return _by_triton(input, residual, weight, bias, rules, prenorm)


KINDS = frozenset((float, bool, str, type(None)))  # of the numbers of plain calls
CHECKED: dict[Hashable, NormRules] = {}  # what plain calls ask that were found right and go to the Triton kernels


def _what_is_looked_at(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *numbers: Any,
) -> Hashable:
    """All that checks look at in a plain call of `_norm`; None for other calls, right or wrong."""
    tensors = (input, residual, weight, bias)
    if input is None or (getattr(input, "is_cpu", False) and not backends.INTERPRETED):
        return None
    if not is_plain(*tensors) or torch._C._is_any_autocast_enabled():
        return None
    kinds = tuple(map(type, numbers))
    if not KINDS.issuperset(kinds):
        return None
    layouts = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors]
    return (*layouts, shape, numbers, kinds, torch.is_grad_enabled())


def _by_triton(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rules: NormRules,
    prenorm: bool,
) -> Any:
    """`_norm` of a right call by the kernels."""
    seed = None
    if rules.dropout_p > 0.0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=input.device)
    output, total, *_ = apply_norm(input, residual, seed, weight, bias, rules)
    return (output, total) if prenorm else output


def _by_pytorch(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
    dropout_p: float,
    prenorm: bool,
    dtype: torch.dtype,
) -> Any:
    """`_norm` of a right call by PyTorch's operations; dtype: of the output."""
    total = input if residual is None else add_dropped(input, residual, dropout_p)
    output = eager_norm(total, shape, weight, bias, eps, centre)
    if output.dtype != dtype:
        output = output.to(dtype)
    return (output, total) if prenorm else output
