"""Attention as registered operations, and the autograd function outside them.

`torch.ops.kernels.attention_forward` and `attention_backward` run the Triton kernels: on CUDA tensors, or on CPU
tensors when Triton's interpreter is on. They take four-dimensional tensors, return new ones and change none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.attention.choice import why_not_hopper, why_not_short
from kernels.attention.formula import composed_gradients
from kernels.attention.layout import empty_rows
from kernels.attention.rules import Extras, Rules
from kernels.autograd import in_forward_mode
from kernels.backend import why_not_triton
from kernels.launch import capability

library = torch.library.Library("kernels", "FRAGMENT")
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? seed, Tensor? attn_mask, Tensor? key_lengths, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? query_starts, Tensor? key_starts"
)
RULES = (
    "float scale, float dropout_p, float softcap, SymInt? left, SymInt? right, bool bottom_right, "
    "SymInt max_queries, SymInt max_keys, bool deterministic"
)
N_EXTRAS = len(Extras._fields)
SHORT_MASK = (True, True, True, False, False)  # the gradients that the kernel for short sequences makes, all at once
library.define(
    f"attention_forward({INPUTS}, {RULES}, bool keep_statistics) -> (Tensor output, Tensor row_max, Tensor row_sum)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"attention_backward(Tensor grad_output, Tensor? grad_lse, {INPUTS}, Tensor? output, Tensor? row_max, "
    f"Tensor? row_sum, {RULES}, bool[5] output_mask) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def new_outputs(
    query: torch.Tensor, value: torch.Tensor, is_short: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty output (B, Hq, L, Ev) and statistics row_max, row_sum (B, Hq, L) float32; (0,) where nobody keeps them."""
    row_max = query.new_empty(0 if is_short else query.shape[:3], dtype=torch.float32)
    return empty_rows(query, value.shape[-1]), row_max, torch.empty_like(row_max)


def new_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras, output_mask: Sequence[bool]
) -> list[torch.Tensor]:
    """Empty gradients of query, key, value, mask and sinks; (0,) where `output_mask` says that one is not needed.

    Key and value come together: one kernel makes both.
    """
    key_or_value = output_mask[1] or output_mask[2]
    needed = (output_mask[0], key_or_value, key_or_value)
    grads = [empty_rows(x, x.shape[-1]) if n else x.new_empty(0) for x, n in zip((query, key, value), needed)]
    for x, n in zip((extras.attn_mask, extras.sinks), output_mask[3:]):
        grads.append(query.new_empty(0) if x is None or not n else x.new_empty(x.shape))
    return grads


def _compact(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The small tensors of a call, which the kernels are given without their strides."""
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def _require_triton(query: torch.Tensor) -> None:
    reason = why_not_triton(query.device, query.dtype)
    if reason:
        raise NotImplementedError(f"kernels::attention runs on Triton alone, and {reason}; call the public function")


def _is_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras, keep_statistics: bool
) -> bool:
    """Whether the kernel for short sequences takes a forward call, which keeps no statistics then."""
    statistics = "the caller" if keep_statistics else ""
    return not why_not_short(query, key, value, extras, statistics, capability(query.device))


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _require_triton(query)
    extras, rules = Extras(rest[0], *_compact(rest[1:N_EXTRAS])), Rules(*rest[N_EXTRAS:-1])
    is_short = _is_short(query, key, value, extras, rest[-1])
    outputs = new_outputs(query, value, is_short)
    if is_short:
        from kernels.attention.short import launch_short_forward

        launch_short_forward(query, key, value, seed, extras, rules, outputs[0])
    elif not why_not_hopper(query, key, value, extras, rules, capability(query.device)):
        from kernels.attention.hopper_forward import launch_hopper_forward

        launch_hopper_forward(query, key, value, extras, rules, *outputs)
    else:
        from kernels.attention.general import launch_forward

        launch_forward(query, key, value, seed, extras, rules, *outputs)
    return outputs


def _backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    _require_triton(query)
    extras, output = Extras(rest[0], *_compact(rest[1:N_EXTRAS])), rest[N_EXTRAS]
    row_max, row_sum = _compact(rest[N_EXTRAS + 1 : N_EXTRAS + 3])
    rules, output_mask = Rules(*rest[N_EXTRAS + 3 : -1]), rest[-1]
    if row_max is None or row_sum is None:
        from kernels.attention.short_backward import launch_short_backward

        grads = new_gradients(query, key, value, extras, SHORT_MASK)
        launch_short_backward(grad_output, query, key, value, seed, extras, rules, *grads[:3])
        return tuple(grads)
    from kernels.attention.general_backward import launch_backward, launch_delta

    grads = new_gradients(query, key, value, extras, output_mask)
    is_hopper = not why_not_hopper(query, key, value, extras, rules, capability(query.device), is_backward=True)
    total = query.new_empty(query.shape, dtype=torch.float32) if is_hopper else None
    pivot, inverse, delta = launch_delta(output, grad_output, row_max, row_sum, grad_lse, total, extras)
    wanted = (grad if need else None for grad, need in zip(grads, output_mask))
    dq, dk, dv, dmask, dsinks = wanted
    if dk is not None or dv is not None:
        dk, dv = grads[1:3]
    if total is not None:
        from kernels.attention.hopper_backward import launch_hopper_backward

        whole = (grad if grad.numel() else torch.empty_like(x) for grad, x in zip(grads, (query, key, value)))
        launch_hopper_backward(grad_output, query, key, value, extras, rules, pivot, delta, total, *whole)
        return tuple(grads)
    launch_backward(grad_output, query, key, value, seed, extras, rules, pivot, inverse, delta, dq, dk, dv, dmask)
    if dsinks is not None and extras.sinks is not None:
        # A sink's weight times what it would give, nothing, less what the row gives on average: delta.
        logit = extras.sinks[:, :, None]  # (B or 1, Hq, 1)
        weight = torch.exp(logit - row_max) / row_sum
        grads_of_rows = -torch.where(logit == -math.inf, 0.0, weight * delta).sum(2)
        dsinks.copy_(grads_of_rows.sum_to_size(dsinks.shape))
    return tuple(grads)


for _key in ("CPU", "CUDA"):
    library.impl("attention_forward", _forward, _key)
    library.impl("attention_backward", _backward, _key)


@torch.library.register_fake("kernels::attention_forward", lib=library)
def _fake_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return new_outputs(query, value, _is_short(query, key, value, Extras(*rest[:N_EXTRAS]), rest[-1]))


@torch.library.register_fake("kernels::attention_backward", lib=library)
def _fake_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    output_mask = SHORT_MASK if rest[N_EXTRAS + 1] is None else rest[-1]
    return tuple(new_gradients(query, key, value, Extras(*rest[:N_EXTRAS]), output_mask))


def _pairs(query: Sequence[int], key: Sequence[int], rest: Sequence[Any]) -> int:
    """How many pairs of query and key there are, over all heads; packed sequences count as equally long."""
    starts = rest[1 + Extras._fields.index("query_starts")]  # after the seed
    sequences = 1 if starts is None else max(1, starts[0] - 1)
    return math.prod(query[:3]) * key[2] // sequences


@register_flop_formula(torch.ops.kernels.attention_forward)
def forward_flops(query: tuple, key: tuple, value: tuple, *rest: Any, **_: Any) -> int:
    """Two products, as PyTorch counts its own attention: what masks and bands leave out counts in full."""
    return 2 * _pairs(query, key, rest) * (query[3] + value[3])


@register_flop_formula(torch.ops.kernels.attention_backward)
def backward_flops(_grad: tuple, _lse: tuple, query: tuple, key: tuple, value: tuple, *rest: Any, **_: Any) -> int:
    """The five products of the formula; the kernels recompute two of them once more."""
    return 2 * _pairs(query, key, rest) * (3 * query[3] + 2 * value[3])


class Attention(torch.autograd.Function):
    """The registered operations with backward, and double backward by recomputation in PyTorch.

    Gives output (B, H, L, Ev) and, where asked for, the log-sum-exp (B, H, L) of each row in natural units, both
    differentiable; then the rows' statistics, which are not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seed: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        key_lengths: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
        query_starts: torch.Tensor | None,
        key_starts: torch.Tensor | None,
        rules: Rules,
        keep_statistics: bool,
        return_lse: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        """The fields of `Extras` one by one: Dynamo tells by the number of arguments that no context comes first."""
        output, row_max, row_sum = torch.ops.kernels.attention_forward.default(
            query, key, value, seed, attn_mask, key_lengths, alibi_slopes, sinks, query_starts, key_starts, *rules,
            keep_statistics,
        )  # fmt: skip
        # A row with nothing to attend to has maximum -inf and sum 0; the other way round it would be NaN.
        lse = row_max + torch.log(row_sum) if return_lse else None
        return output, lse, row_max, row_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep inputs (references, no copies) and the dropout's seed; the output and two numbers a row where there are.
        """
        *tensors, ctx.rules, _, _ = inputs
        result, _, row_max, row_sum = output
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.set_materialize_grads(False)
        kept = (None, None, None) if _is_absent(row_max) else (result, row_max, row_sum)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None = None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key, value, mask and sinks, those that are needed."""
        n_inputs = 7 + N_EXTRAS
        if grad_output is None and grad_lse is None:
            return (None,) * n_inputs
        query, key, value, seed, *rest = ctx.saved_tensors
        extras, outputs = Extras(*rest[:N_EXTRAS]), rest[N_EXTRAS:]
        if grad_output is None:
            grad_output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        needed = ctx.needs_input_grad
        asked = [*needed[:3], needed[4], needed[4 + Extras._fields.index("sinks")]]
        if torch.is_grad_enabled() or in_forward_mode():  # this backward is itself to be differentiated
            found = _differentiable_backward(
                grad_output, grad_lse, query, key, value, seed, extras, ctx.rules, asked
            )
        else:
            found = torch.ops.kernels.attention_backward.default(
                grad_output, grad_lse, query, key, value, seed, *extras, *outputs, *ctx.rules, asked
            )
        dq, dk, dv, dmask, dsinks = (grad if need else None for grad, need in zip(found, asked))
        grads = Extras(attn_mask=dmask, sinks=dsinks)
        return (dq, dk, dv, None, *grads, None, None, None)


def _differentiable_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor | None,
    extras: Extras,
    rules: Rules,
    asked: list[bool],
) -> list[torch.Tensor | None]:
    """The same gradients with a graph behind them: recomputed in plain PyTorch, which stores the L x S weights."""
    if seed is not None:
        raise NotImplementedError("double backward through attention dropout: not supported; use dropout_p=0.0")
    inputs = (query, key, value, extras.attn_mask, extras.sinks)
    return composed_gradients((grad_output, grad_lse), inputs, asked, rules, extras)


def _merged(x: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    """x (B, ...) with a dimension that vmap added at `dim`, or without one, as (size * B, ...)."""
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _merged_inputs(
    size: int, in_dims: Sequence[int | None], args: Sequence[Any], own_mask: bool
) -> tuple[list[Any], Extras]:
    """Query, key, value, seed and extras of `size` calls as those of one with `size` times the batch entries.

    own_mask: each call gets a mask of its own, which its gradient needs.
    """
    tensors, dims = args[: 4 + N_EXTRAS], in_dims[: 4 + N_EXTRAS]
    query, key, value = (_merged(x, dim, size) for x, dim in zip(tensors[:3], dims))
    seed, extras = tensors[3], Extras(*tensors[4:])
    if extras.query_starts is not None:
        raise NotImplementedError("vmap over packed sequences: not supported; pad them, with key_lengths")
    if seed is not None and dims[3] is None:
        raise NotImplementedError('vmap over attention dropout needs randomness="different"')
    batch = tensors[0].shape[0 if dims[0] is None or dims[0] > 0 else 1]
    merged = {}
    for name, x, dim in zip(Extras._fields, extras, dims[4:]):
        shared = name == "alibi_slopes" or (name in ("attn_mask", "sinks") and not own_mask)
        if x is None or (dim is None and x.shape[0] == 1 and shared):
            merged[name] = x
            continue
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        merged[name] = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
    return [query, key, value, None if seed is None else seed.select(dims[3], 0)], Extras(**merged)


def _is_absent(x: torch.Tensor) -> bool:
    """Whether x is the (0,) that stands for a result that is not there."""
    return x.ndim == 1 and x.numel() == 0


def _split_batch(found: Sequence[torch.Tensor], size: int) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """Results (size * B, ...) as (size, B, ...), and where vmap finds its dimension in each."""
    results = tuple(x if _is_absent(x) else x.unflatten(0, (size, -1)) for x in found)
    return results, tuple(None if _is_absent(x) else 0 for x in results)


@torch.library.register_vmap("kernels::attention_forward", lib=library)
def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
    """vmap adds batch entries."""
    size = info.batch_size
    inputs, extras = _merged_inputs(size, in_dims, args, own_mask=False)
    found = torch.ops.kernels.attention_forward(*inputs, *extras, *args[4 + N_EXTRAS :])
    return _split_batch(found, size)


@torch.library.register_vmap("kernels::attention_backward", lib=library)
def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
    """Likewise; a mask or sinks that batch entries share get the sum of their gradients."""
    size, output_mask = info.batch_size, args[-1]
    inputs, extras = _merged_inputs(size, in_dims[2:], args[2:], own_mask=output_mask[3] or output_mask[4])
    end = 6 + N_EXTRAS
    upstream = (_merged(x, dim, size) for x, dim in zip(args[:2], in_dims))
    outputs = (_merged(x, dim, size) for x, dim in zip(args[end : end + 3], in_dims[end:]))
    found = torch.ops.kernels.attention_backward(*upstream, *inputs, *extras, *outputs, *args[end + 3 :])
    grads = list(_split_batch(found, size)[0])
    for i, x, dim in ((3, args[6], in_dims[6]), (4, args[9], in_dims[9])):
        if x is not None and output_mask[i] and x.shape[0 if dim is None or dim > 0 else 1] == 1:
            grads[i] = grads[i].sum(1, keepdim=True)
    return tuple(grads), tuple(None if _is_absent(x) else 0 for x in grads)
