"""The norms on tensors that hold others: jagged nested tensors, DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.subclasses import is_dtensor, offsets_of, on_shards, wrapped


def on_what_they_hold(
    call: Callable[..., Any], input: Any, residual: Any, weight: Any, bias: Any, n_normalized: int
) -> Any:
    """`call(input, residual, weight, bias)`, whose results are shaped as the input, on what the tensors hold.

    n_normalized: how many trailing dimensions are normalised, which must not be divided.
    """
    tensors = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    whole = input.ndim - n_normalized  # the first such dimension
    if not any(map(is_dtensor, tensors.values())):
        return _on_values(call, tensors, whole)
    if residual is not None and residual.shape != input.shape:
        raise ValueError(f"residual must have the shape {tuple(input.shape)} of input, found {tuple(residual.shape)}")

    def matching(name: str, _: torch.Tensor, dim: int) -> int:
        return dim if name in ("input", "residual") else -1

    return on_shards(call, tensors, matching, range(whole))


def _on_values(call: Callable[..., Any], tensors: dict[str, Any], whole: int) -> Any:
    """Jagged nested tensors: the call runs once, on all their values."""
    input = tensors["input"]
    for name, x in tensors.items():
        is_values = input.is_nested and name in ("input", "residual")
        if x is not None and x.is_nested:
            offsets_of(name, x)
        if x is not None and x.is_nested != is_values:
            rule = "nested as input is" if is_values else "a plain tensor"
            raise ValueError(f"{name} must be {rule}, found a {'nested' if x.is_nested else 'plain'} one; convert it")
    ragged, residual = input._ragged_idx, tensors["residual"]
    if ragged >= whole:
        raise ValueError(f"input must not be ragged in what is reduced, found dimension {ragged}; pad it")
    if residual is not None and residual.shape != input.shape:
        raise ValueError("residual must have the shape and offsets of input, found others; make it with them")

    def wrap(values: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(values, input.offsets(), jagged_dim=ragged)

    held = (x.values() if x is not None and x.is_nested else x for x in tensors.values())
    return wrapped(wrap, call(*held))
