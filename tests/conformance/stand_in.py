"""A right attention in plain PyTorch, with every argument, and the means to make wrong ones of it (wrong.py)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from tests.conformance import formula
from tests.conformance.judge import Attention


def right(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    need_weights: bool = False,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Any:
    """The formula, with dropout, NaN kept behind masks, and the errors that are due.

    It stores the L x S weights, gets its memory inside PyTorch, and PyTorch's matrix product sums in another order when
    the batch grows: that much is not right.
    """
    refuse(attn_mask, dropout_p, causal_alignment, window, softcap, alibi_slopes, sinks, key_lengths, query)
    if key.dtype != query.dtype:
        raise TypeError("query and key differ in dtype")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    kept = None
    if dropout_p:
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        kept = torch.rand(*lead, query.shape[-2], key.shape[-2], device=query.device) >= dropout_p
    fine = torch.isfinite(key).all(-1, keepdim=True) & torch.isfinite(value).all(-1, keepdim=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    inputs = (x.to(wide) for x in (query, key.masked_fill(~fine, 0.0), value.masked_fill(~fine, 0.0)))
    answer = formula.attention(
        *inputs,
        attn_mask,
        is_causal,
        scale,
        causal_alignment=causal_alignment,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_lengths=key_lengths,
        kept=kept,
        dropout_p=dropout_p if dropout_p < 1 else 0.0,
    )
    bad = formula.repeat_heads((~fine).to(wide), query).detach()
    output = answer.output.masked_fill(answer.weights.detach() @ bad > 0, math.nan).to(query.dtype)
    if output.ndim > 2:  # as a model has it: (B, L, H, E)
        output = output.transpose(-3, -2).contiguous().transpose(-3, -2)
    if not (need_weights or return_lse):
        return output
    return formula.Answer(output, answer.lse, answer.weights.to(query.dtype))


def refuse(
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    causal_alignment: str,
    window: Any,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    sinks: Any,
    key_lengths: torch.Tensor | None,
    query: torch.Tensor,
) -> None:
    """Raise for what no formula notices by itself."""
    wrong = [
        attn_mask is not None and not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()),
        not 0.0 <= dropout_p <= 1.0,
        causal_alignment not in ("top_left", "bottom_right"),
        window is not None and (not isinstance(window, tuple) or any(x is not None and x < 0 for x in window)),
        softcap is not None and not softcap > 0,
        alibi_slopes is not None and alibi_slopes.shape[-1] != query.shape[-3],
        sinks is not None and (not isinstance(sinks, torch.Tensor) or sinks.shape != query.shape[-3:-2]),
        key_lengths is not None and (key_lengths.is_floating_point() or len(key_lengths) != len(query)),
    ]
    if any(wrong):
        raise ValueError(f"argument {wrong.index(True)} is wrong")


SIGNATURE = inspect.signature(right)


def changed(change: Callable[..., Any]) -> Attention:
    """An attention that is `change(the right one, **its arguments by name)`, with the right one's signature."""

    @functools.wraps(right)
    def attention(*args: Any, **kwargs: Any) -> Any:
        bound = SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        return change(right, **bound.arguments)

    return attention


def output_of(result: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The result with its output changed, be it a tensor or an answer."""
    return change(result) if isinstance(result, torch.Tensor) else result._replace(output=change(result.output))


def with_arguments(**new: Any) -> Attention:
    """The right attention with some arguments replaced; a function is applied to the argument instead."""

    def change(f: Attention, **a: Any) -> Any:
        return f(**{**a, **{k: x(a[k]) if callable(x) else x for k, x in new.items()}})

    return changed(change)


def with_output(change: Callable[[torch.Tensor], torch.Tensor]) -> Attention:
    """The right attention with its output changed."""
    return changed(lambda f, **a: output_of(f(**a), change))


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient comes out times a factor: quietly wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
        """Return x."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Remember the factor."""
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient times the factor."""
        return grad * ctx.factor, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: None) -> torch.Tensor:
        """Return the tangent times the factor."""
        return tangent * ctx.factor


def with_gradient(name: str, factor: float) -> Attention:
    """The right attention, whose gradient of one argument comes out times a factor."""

    def change(f: Attention, **a: Any) -> Any:
        return f(**a) if a[name] is None else f(**{**a, name: ScaledGradient.apply(a[name], factor)})

    return changed(change)


class SquaredGradient(torch.autograd.Function):
    """The identity with a right gradient whose own gradient is wrong: the graph behind it is cut and replaced."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient, with one of half its size behind it."""
        return grad.detach() * 0.5 + grad * 0.5


class InPython(torch.autograd.Function):
    """The right attention in memory that Python asks for, as our kernels have it; `spill` writes past its end."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., torch.Tensor], spill: str, *inputs: torch.Tensor) -> torch.Tensor:
        """Attend, and remember how."""
        ctx.run, ctx.spill = run, spill
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return store(run(*inputs), spill == "output")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in such memory too."""
        leaves = [x.detach().requires_grad_(needed) for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:])]
        with torch.enable_grad():
            output = ctx.run(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad))
        if ctx.spill == "upstream gradient":
            grad.mul_(2.0)
        return None, None, *(store(next(found), ctx.spill == "gradient") if x.requires_grad else None for x in leaves)


def store(x: torch.Tensor, spill: bool) -> torch.Tensor:
    """x in new memory; with `spill`, three numbers past its end are written as well."""
    new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new.copy_(x)
    if spill and new.untyped_storage().nbytes() > new.nbytes:
        new.as_strided((3,), (1,), new.storage_offset() + new.numel()).fill_(7.0)
    return new


def in_python(spill: str = "") -> Attention:
    """The right attention through `InPython`, for checks of memory."""

    def change(f: Attention, **a: Any) -> torch.Tensor:
        tensors = [a.pop(name) for name in ("query", "key", "value", "attn_mask")]

        def run(*x: torch.Tensor) -> torch.Tensor:
            return f(*x[:3], x[3] if len(x) == 4 else None, **a)

        return InPython.apply(run, spill, *(x for x in tensors if x is not None))

    return changed(change)
