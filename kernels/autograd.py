"""How a call gets to an autograd function: at the cost of what it asks for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["apply_at_once", "differentiable", "in_forward_mode", "is_followed", "transformed"]


def in_forward_mode() -> bool:
    """Whether tangents are carried along, outside of compiled code."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of torch.func or forward mode is at work, outside of compiled code."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_followed() -> bool:
    """Whether what is called is followed: compiled by Dynamo, traced, transformed by torch.func, or in forward mode."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def apply_at_once(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, which asks whether functorch is at work, where it is known that it is not."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def differentiable(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` for a function with setup_context, which costs several times as much as what follows.

    Functorch and Dynamo need setup_context. Elsewhere a context is the first argument, and where no derivative is asked
    for there is none.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    has_gradient = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
    if has_gradient or forward_ad._current_level >= 0:
        return with_context(function).apply(*args)
    return function.forward(*args)


@functools.cache
def with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same function without setup_context: `apply` then does not bind its arguments to a signature at each call."""

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        return outputs

    own = {"forward": staticmethod(forward), "setup_context": staticmethod(torch.autograd.Function.setup_context)}
    return type(function.__name__, (function,), own)
