"""Attention as registered operations, and the autograd function outside them.

`torch.ops.kernels.attention_forward` and `attention_backward` run the Triton kernels: on CUDA tensors, or on CPU
tensors when Triton's interpreter is on. They take four-dimensional tensors, return new ones and change none. What they
take beside query, key and value are the fields of `Call`, one by one, from which their schemas are made.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.again import Calls, Known, is_plain
from kernels.attention.call import KINDS, LEARNED, TENSORS, Call
from kernels.attention.formula import composed_gradients
from kernels.attention.layout import empty_rows
from kernels.attention.plan import forces, plan
from kernels.autograd import in_forward_mode
from kernels.backend import why_not_triton

library = torch.library.Library("kernels", "FRAGMENT")
SCHEMA_TYPES = {"Tensor": "Tensor?", "float": "float", "int": "SymInt", "bool": "bool"}
KEPT = ("grad_output", "grad_lse", "output", "row_max", "row_sum")  # what a backward has before the forward's inputs
GRADIENTS = ("query", "key", "value", *LEARNED)  # of what the backward makes gradients
SHORT_MASK = (True, True, True, *(False for _ in LEARNED))  # those of the kernel for short sequences, all at once


def schema_type(kind: Any) -> str:
    """A field's type as schemas write it."""
    found = next(name for word, name in SCHEMA_TYPES.items() if word in str(kind))
    return f"{found.removesuffix('?')}?" if "None" in str(kind) else found


CALL_SCHEMA = ", ".join(f"{schema_type(kind)} {name}" for name, kind in KINDS.items())
library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {CALL_SCHEMA}, bool keep_statistics) "
    "-> (Tensor output, Tensor row_max, Tensor row_sum)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor? output, Tensor? row_max, Tensor? row_sum, "
    f"Tensor query, Tensor key, Tensor value, {CALL_SCHEMA}, bool[{len(GRADIENTS)}] output_mask) "
    f"-> ({', '.join(f'Tensor grad_{name}' for name in GRADIENTS)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def new_outputs(
    query: torch.Tensor, value: torch.Tensor, is_short: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty output (B, Hq, L, Ev) and statistics row_max, row_sum (B, Hq, L) float32; (0,) where nobody keeps them."""
    row_max = query.new_empty(0 if is_short else query.shape[:3], dtype=torch.float32)
    return empty_rows(query, value.shape[-1]), row_max, torch.empty_like(row_max)


def new_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, output_mask: Sequence[bool]
) -> list[torch.Tensor]:
    """Empty gradients of GRADIENTS; (0,) where `output_mask` says that one is not needed.

    Key and value come together: one kernel makes both.
    """
    key_or_value = output_mask[1] or output_mask[2]
    needed = (output_mask[0], key_or_value, key_or_value)
    grads = [empty_rows(x, x.shape[-1]) if n else x.new_empty(0) for x, n in zip((query, key, value), needed)]
    for name, n in zip(LEARNED, output_mask[3:]):
        x = getattr(call, name)
        grads.append(query.new_empty(0) if x is None or not n else x.new_empty(x.shape))
    return grads


def _compact(call: Call) -> Call:
    """The call with its small tensors contiguous: of them kernels look at a stride or two."""
    mask, *small = call.tensors
    if all(x is None or x.is_contiguous() for x in small):
        return call
    return call.with_tensors([mask, *(x if x is None else x.contiguous() for x in small)])


FORWARDS, BACKWARDS = Calls(), Calls()


def known_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> Known | None:
    """What is known of a forward that keeps no statistics."""
    numbers = (*call[len(TENSORS) :], False)
    return FORWARDS.find((query, key, value, *call.tensors), (numbers, *settings(query)))


def settings(query: torch.Tensor) -> tuple[Hashable, ...]:
    """What else the launches of a call depend on."""
    precision = ""
    if query.dtype == torch.float32:
        from kernels.attention.arguments import dot_precision

        precision = dot_precision(query.dtype)
    return precision, forces(), os.environ.get("KERNELS_HOPPER")


def _require_triton(query: torch.Tensor) -> None:
    reason = why_not_triton(query.device, query.dtype)
    if reason:
        raise NotImplementedError(f"kernels::attention runs on Triton alone, and {reason}; call the public function")


def _positive_scale(query: torch.Tensor, call: Call) -> tuple[torch.Tensor, Call, float]:
    """The same scores with a scale above 0, which kernels count on: its sign, or its being 0, goes into the query.

    Returns:
        query and call; the factor that the query was given, which its gradient must be given too.
    """
    if call.scale > 0.0:
        return query, call, 1.0
    factor = -1.0 if call.scale else 0.0
    return query * factor, call._replace(scale=-call.scale or 1.0), factor


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attention_forward`."""
    _require_triton(query)
    inputs, numbers = (query, key, value, *rest[: len(TENSORS)]), rest[len(TENSORS) :]
    found = FORWARDS.run(inputs, (numbers, *settings(query)), lambda: _make_outputs(query, key, value, *rest))
    return found  # type: ignore[return-value]


def _make_outputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
    """`attention_forward` for calls that are new; see `Calls.run`."""
    call, keep_statistics = _compact(Call(*rest[:-1])), rest[-1]
    chosen = plan(query, key, value, call, "forward", "the caller" if keep_statistics else "")
    outputs = new_outputs(query, value, chosen.kernel == "short")
    query, call, _ = _positive_scale(query, call)
    if chosen.kernel == "short":
        from kernels.attention.short import launch_short_forward

        launch_short_forward(query, key, value, call, chosen.tile("forward"), outputs[0])
    elif chosen.kernel == "hopper":
        from kernels.attention.hopper_forward import launch_hopper_forward

        launch_hopper_forward(query, key, value, call, *outputs)
    else:
        from kernels.attention.general import launch_forward

        launch_forward(query, key, value, call, chosen.tile("forward"), *outputs)
    return outputs, ()


def _backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    output: torch.Tensor | None,
    row_max: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """`attention_backward`."""
    _require_triton(query)
    given = (grad_output, grad_lse, output, row_max, row_sum, query, key, value)
    inputs, numbers = (*given, *rest[: len(TENSORS)]), (*rest[len(TENSORS) : -1], *rest[-1])
    return BACKWARDS.run(inputs, (numbers, *settings(query)), lambda: _make_gradients(*given, *rest))


def _make_gradients(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    output: torch.Tensor | None,
    row_max: torch.Tensor | None,
    row_sum: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
    """`attention_backward` for calls that are new; see `Calls.run`."""
    call, output_mask = _compact(Call(*rest[:-1])), rest[-1]
    others: tuple[torch.Tensor, ...] | None = ()
    chosen = plan(query, key, value, call, "backward", "" if row_max is None else "the forward")
    query, call, factor = _positive_scale(query, call)
    if output is None or row_max is None or row_sum is None:
        from kernels.attention.short_backward import launch_short_backward

        grads = new_gradients(query, key, value, call, SHORT_MASK)
        launch_short_backward(grad_output, query, key, value, call, chosen.tile("backward"), *grads[:3])
    else:
        from kernels.attention.general_backward import launch_backward, launch_delta

        grads = new_gradients(query, key, value, call, output_mask)
        row_max, row_sum = row_max.contiguous(), row_sum.contiguous()
        is_hopper = chosen.kernel == "hopper"
        total = query.new_empty(query.shape, dtype=torch.float32) if is_hopper else None
        statistics = launch_delta(output, grad_output, row_max, row_sum, grad_lse, total, call)
        others = statistics.unbind()
        if total is not None:
            from kernels.attention.hopper_backward import launch_hopper_backward

            whole = [grad if grad.numel() else torch.empty_like(x) for grad, x in zip(grads, (query, key, value))]
            launch_hopper_backward(grad_output, query, key, value, call, statistics, total, *whole)
            others = (*others, total, *(x for x, grad in zip(whole, grads) if x is not grad))
        else:
            dq, dk, dv, dmask, dsinks = (grad if grad.numel() else None for grad in grads)
            launch_backward(grad_output, query, key, value, call, chosen, statistics, dq, dk, dv, dmask)
            if dsinks is not None and call.sinks is not None:
                dsinks.copy_(_gradient_of_sinks(call.sinks, row_max, row_sum, statistics[2]))
                others = None
    if factor != 1.0 and output_mask[0]:
        grads[0].mul_(factor)
    return tuple(grads), others


def _gradient_of_sinks(
    sinks: torch.Tensor, row_max: torch.Tensor, row_sum: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """A sink's weight times what it would give, nothing, less what the row gives on average: delta (B, Hq, L)."""
    logit = sinks[:, :, None]  # (B or 1, Hq, 1)
    weight = torch.exp(logit - row_max) / row_sum
    return -torch.where(logit == -math.inf, 0.0, weight * delta).sum(2).sum_to_size(sinks.shape)


for _key in ("CPU", "CUDA"):
    library.impl("attention_forward", _forward, _key)
    library.impl("attention_backward", _backward, _key)


@torch.library.register_fake("kernels::attention_forward", lib=library)
def _fake_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    statistics = "the caller" if rest[-1] else ""
    chosen = plan(query, key, value, Call(*rest[:-1]), "forward", statistics, among=("short", "general"))
    return new_outputs(query, value, chosen.kernel == "short")


@torch.library.register_fake("kernels::attention_backward", lib=library)
def _fake_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *_, row_max, row_sum = args[: len(KEPT)]
    query, key, value, *rest = args[len(KEPT) :]
    return tuple(new_gradients(query, key, value, Call(*rest[:-1]), SHORT_MASK if row_max is None else rest[-1]))


def _pairs(query: Sequence[int], key: Sequence[int], rest: Sequence[Any]) -> int:
    """How many pairs of query and key there are, over all heads; packed sequences count as equally long.

    rest: the shapes of the call's tensors, its numbers, and one more.
    """
    starts: Any = Call(*rest[:-1]).query_starts
    sequences = 1 if starts is None else max(1, starts[0] - 1)
    return math.prod(query[:3]) * key[2] // sequences


@register_flop_formula(torch.ops.kernels.attention_forward)
def forward_flops(query: tuple, key: tuple, value: tuple, *rest: Any, **_: Any) -> int:
    """Two products, as PyTorch counts its own attention: what masks and bands leave out counts in full."""
    return 2 * _pairs(query, key, rest) * (query[3] + value[3])


@register_flop_formula(torch.ops.kernels.attention_backward)
def backward_flops(*args: Any, **_: Any) -> int:
    """The five products of the formula; the kernels recompute two of them once more."""
    query, key, value, *rest = args[len(KEPT) :]
    return 2 * _pairs(query, key, rest) * (3 * query[3] + 2 * value[3])


class Attention(torch.autograd.Function):
    """The registered operations with backward, and double backward by recomputation in PyTorch.

    Gives output (B, H, L, Ev) and, where asked for, the log-sum-exp (B, H, L) of each row in natural units, both
    differentiable; then the rows' statistics, which are not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor | None, ...]:
        """query, key and value; the call's tensors one by one, which autograd wants to see, and the call without them;
        whether the statistics must be kept, and whether the log-sum-exp is asked for; what is known of the call.
        """
        query, key, value, *tensors, call, keep_statistics, return_lse, known = args
        if known is not None:
            output, row_max, row_sum = known.run((query, key, value, *tensors), query.device)
        else:
            is_direct = is_plain(query, key, value, *tensors)
            run = _forward if is_direct else torch.ops.kernels.attention_forward.default
            output, row_max, row_sum = run(query, key, value, *tensors, *call[len(TENSORS) :], keep_statistics)
        # A row with nothing to attend to has maximum -inf and sum 0; the other way round it would be NaN.
        lse = row_max + torch.log(row_sum) if return_lse else None
        return output, lse, row_max, row_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep inputs (references, no copies) and dropout's seed; output and two numbers a row where there are."""
        *tensors, ctx.numbers, _, _, _ = inputs
        result, _, row_max, row_sum = output
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.set_materialize_grads(False)
        kept = (None, None, None) if _is_absent(row_max) else (result, row_max, row_sum)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None = None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of GRADIENTS, those that are needed."""
        none = (None,) * len(_ARGUMENTS)
        if grad_output is None and grad_lse is None:
            return none
        query, key, value, *rest = ctx.saved_tensors
        call, outputs = ctx.numbers.with_tensors(rest[: len(TENSORS)]), rest[len(TENSORS) :]
        if grad_output is None:
            grad_output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        asked = [ctx.needs_input_grad[i] for i in PLACES]
        if torch.is_grad_enabled() or in_forward_mode():  # this backward is itself to be differentiated
            if call.seed is not None:
                raise NotImplementedError("double backward through attention dropout: not supported; use dropout_p=0.0")
            inputs = (query, key, value, *(getattr(call, name) for name in LEARNED))
            found = composed_gradients((grad_output, grad_lse), inputs, asked, call)
        else:
            given = (grad_output, grad_lse, *outputs, query, key, value)
            is_direct = is_plain(*given, *call.tensors)
            run = _backward if is_direct else torch.ops.kernels.attention_backward.default
            found = list(run(*given, *call, asked))
        grads: list[torch.Tensor | None] = list(none)
        for place, grad, need in zip(PLACES, found, asked):
            grads[place] = grad if need else None
        return tuple(grads)


# Dynamo tells by the number of arguments that no context comes first.
_ARGUMENTS = ("query", "key", "value", *TENSORS, "numbers", "keep_statistics", "return_lse", "known")
Attention.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in _ARGUMENTS]
)
PLACES = tuple(_ARGUMENTS.index(name) for name in GRADIENTS)  # of what has a gradient, among the arguments


def _is_absent(x: torch.Tensor) -> bool:
    """Whether x is the (0,) that stands for a result that is not there."""
    return x.ndim == 1 and x.numel() == 0


def _merged(x: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    """x (B, ...) with a dimension that vmap added at `dim`, or without one, as (size * B, ...)."""
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _merged_call(size: int, batch: int, call: Call, dims: Sequence[int | None], own: Sequence[str]) -> Call:
    """`size` calls of `batch` entries as one with `size` times as many.

    dims: where vmap added a dimension to the tensors. own: tensors of which each call gets one of its own, which their
    gradients need; one for all stays shared otherwise.
    """
    if call.query_starts is not None:
        raise NotImplementedError("vmap over packed sequences: not supported; pad them, with key_lengths")
    merged: list[torch.Tensor | None] = []
    for name, x, dim in zip(TENSORS, call.tensors, dims):
        if name == "seed" and x is not None:
            if dim is None:
                raise NotImplementedError('vmap over attention dropout needs randomness="different"')
            x = x.select(dim, 0)
        elif x is not None and (dim is not None or x.shape[0] != 1 or name in own):
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
        merged.append(x)
    return call.with_tensors(merged)


def _batch_of(query: torch.Tensor, dim: int | None) -> int:
    """Batch entries of each call's query."""
    return query.shape[0 if dim is None or dim > 0 else 1]


def _split_batch(found: Sequence[torch.Tensor], size: int) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """Results (size * B, ...) as (size, B, ...), and where vmap finds its dimension in each."""
    results = tuple(x if _is_absent(x) else x.unflatten(0, (size, -1)) for x in found)
    return results, tuple(None if _is_absent(x) else 0 for x in results)


@torch.library.register_vmap("kernels::attention_forward", lib=library)
def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
    """vmap adds batch entries."""
    size = info.batch_size
    inputs = (_merged(x, dim, size) for x, dim in zip(args[:3], in_dims))
    call = _merged_call(size, _batch_of(args[0], in_dims[0]), Call(*args[3:-1]), in_dims[3:], ())
    return _split_batch(torch.ops.kernels.attention_forward(*inputs, *call, args[-1]), size)


@torch.library.register_vmap("kernels::attention_backward", lib=library)
def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
    """Likewise; what batch entries share gets the sum of their gradients."""
    size, output_mask, first = info.batch_size, args[-1], len(KEPT)
    before = (_merged(x, dim, size) for x, dim in zip(args[: first + 3], in_dims))
    own = [name for name, is_needed in zip(LEARNED, output_mask[3:]) if is_needed]
    call, dims = Call(*args[first + 3 : -1]), in_dims[first + 3 :]
    merged = _merged_call(size, _batch_of(args[first], in_dims[first]), call, dims, own)
    found = torch.ops.kernels.attention_backward(*before, *merged, output_mask)
    grads = list(_split_batch(found, size)[0])
    for name in own:
        x, place = getattr(call, name), GRADIENTS.index(name)
        if x is not None and _batch_of(x, dims[TENSORS.index(name)]) == 1:
            grads[place] = grads[place].sum(1, keepdim=True)
    return tuple(grads), tuple(None if _is_absent(x) else 0 for x in grads)
