"""How a call gets to an autograd function: at the cost of what it asks for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

from kernels.backend import wants_gradient

__all__ = ["differentiable"]


def differentiable(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` for a function with setup_context, which costs several times as much as what follows.

    Functorch and Dynamo need setup_context. Elsewhere a context is the first argument, and where no derivative is asked
    for there is none.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if forward_ad._current_level < 0 and not wants_gradient(*(x for x in args if isinstance(x, torch.Tensor))):
        return function.forward(*args)
    return with_context(function).apply(*args)


@functools.cache
def with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same function without setup_context: `apply` then does not bind its arguments to a signature at each call."""

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        return outputs

    own = {"forward": staticmethod(forward), "setup_context": staticmethod(torch.autograd.Function.setup_context)}
    return type(function.__name__, (function,), own)
