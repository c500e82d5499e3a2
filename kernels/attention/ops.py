"""Attention as registered operations, and the autograd function outside them.

`torch.ops.kernels.attention_forward` and `attention_backward` run the Triton kernels: on CUDA tensors, or on CPU
tensors when Triton's interpreter is on. They take four-dimensional tensors, return new ones and change none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.attention import eager
from kernels.backend import why_not_triton

library = torch.library.Library("kernels", "FRAGMENT")
library.define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, float dropout_p, "
    "bool is_causal, float scale) -> (Tensor output, Tensor row_max, Tensor row_sum)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, "
    "Tensor output, Tensor row_max, Tensor row_sum, float dropout_p, bool is_causal, float scale, bool[4] output_mask) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def empty_rows(like: torch.Tensor, last: int) -> torch.Tensor:
    """An empty (B, H, L, last) tensor whose memory has heads and rows in the order in which `like` has them.

    So the result of a query that is a transposed view of (B, L, H, E) goes back to (B, L, H * E) without a copy.
    """
    b, h, n, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((b, n, h, last)).transpose(1, 2)
    return like.new_empty((b, h, n, last))


def new_outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty output (B, Hq, L, Ev) and statistics row_max, row_sum (B, Hq, L) float32."""
    row_max = query.new_empty(query.shape[:3], dtype=torch.float32)
    return empty_rows(query, value.shape[-1]), row_max, torch.empty_like(row_max)


def new_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> list[torch.Tensor]:
    """Empty gradients of query, key, value and mask; (0,) where `output_mask` says that one is not needed.

    Key and value come together: one kernel makes both.
    """
    key_or_value = output_mask[1] or output_mask[2]
    needed = (output_mask[0], key_or_value, key_or_value)
    grads = [empty_rows(x, x.shape[-1]) if n else x.new_empty((0,)) for x, n in zip((query, key, value), needed)]
    if attn_mask is None or not output_mask[3]:
        return [*grads, query.new_empty((0,))]
    return [*grads, attn_mask.new_empty(attn_mask.shape)]


def _require_triton(query: torch.Tensor) -> None:
    reason = why_not_triton(query.device, query.dtype)
    if reason:
        raise NotImplementedError(f"kernels::attention runs on Triton alone, and {reason}; call the public function")


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _require_triton(query)
    from kernels.attention.general import launch_forward

    outputs = new_outputs(query, value)
    launch_forward(query, key, value, attn_mask, seed, dropout_p, is_causal, scale, *outputs)
    return outputs


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    _require_triton(query)
    from kernels.attention.general_backward import launch_backward

    grads = new_gradients(query, key, value, attn_mask, output_mask)
    launch_backward(
        grad_output, query, key, value, attn_mask, seed, output, row_max, row_sum, dropout_p, is_causal, scale,
        *(grad if grad.ndim == 4 else None for grad in grads),
    )  # fmt: skip
    return tuple(grads)


for _key in ("CPU", "CUDA"):
    library.impl("attention_forward", _forward, _key)
    library.impl("attention_backward", _backward, _key)


@torch.library.register_fake("kernels::attention_forward", lib=library)
def _fake_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return new_outputs(query, value)


@torch.library.register_fake("kernels::attention_backward", lib=library)
def _fake_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    return tuple(new_gradients(query, key, value, attn_mask, rest[-1]))


@register_flop_formula(torch.ops.kernels.attention_forward)
def forward_flops(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """Two products, as PyTorch counts its own attention: causal masks count in full."""
    b, h, n_queries, e = query
    return 2 * b * h * n_queries * key[2] * (e + value[3])


@register_flop_formula(torch.ops.kernels.attention_backward)
def backward_flops(_grad: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """The five products of the formula; the kernels recompute two of them once more."""
    b, h, n_queries, e = query
    return 2 * b * h * n_queries * key[2] * (3 * e + 2 * value[3])


class Attention(torch.autograd.Function):
    """The registered operations with backward, and double backward by recomputation in PyTorch."""

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        seed: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output and statistics as the operation gives them; only the output is differentiable."""
        return torch.ops.kernels.attention_forward.default(
            query, key, value, attn_mask, seed, dropout_p, is_causal, scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep inputs and output (references, no copies), two numbers a row, and the dropout's seed."""
        *tensors, ctx.dropout_p, ctx.is_causal, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key, value and mask, those that are needed."""
        if grad_output is None:
            return (None,) * 8
        needed = list(ctx.needs_input_grad[:4])
        query, key, value, attn_mask, seed, *outputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: this backward is itself to be differentiated
            grads = _differentiable_backward(ctx, grad_output, needed)
        else:
            found = torch.ops.kernels.attention_backward.default(
                grad_output, query, key, value, attn_mask, seed, *outputs,
                ctx.dropout_p, ctx.is_causal, ctx.scale, needed,
            )  # fmt: skip
            grads = [grad if need else None for grad, need in zip(found, needed)]
        return (*grads, None, None, None, None)


def _differentiable_backward(ctx: Any, grad_output: torch.Tensor, needed: list[bool]) -> list[torch.Tensor | None]:
    """The same gradients with a graph behind them: recomputed in plain PyTorch, which stores the L x S weights."""
    query, key, value, attn_mask, seed, *_ = ctx.saved_tensors
    if seed is not None:
        raise NotImplementedError("double backward through attention dropout: not supported; use dropout_p=0.0")
    # Aliases: partial derivatives, also where one input is another or comes from it.
    query, key, value, attn_mask = (
        x.view_as(x) if need else x for x, need in zip((query, key, value, attn_mask), needed)
    )
    inputs = [x for x, need in zip((query, key, value, attn_mask), needed) if need]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        output = eager.attention(
            query, key, value, attn_mask, 0.0, ctx.is_causal, ctx.scale, key.shape[1] != query.shape[1]
        )
    found = iter(torch.autograd.grad(output, inputs, grad_output, create_graph=True))
    return [next(found) if need else None for need in needed]
