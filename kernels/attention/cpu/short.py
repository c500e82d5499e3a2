"""Attention over short sequences on a CPU, by PyTorch's plain operations.

For a hundred heads of ten queries and keys, PyTorch's fused kernel spends its time on the parts of each small problem,
its softmax is slow along a last axis of ten, and its autograd makes strided gradients that are slow to gather. Here the
formula runs over all heads at once, in place, and the backward is written out so that each gradient comes out compact.

Bytes: the scores are stored, 4 L S a head, which is less than the inputs as long as S is below E.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels.backend import wants_gradient
from kernels.dropout import keep_factors

# Where it is faster than PyTorch's kernels, measured on one thread. It makes more calls into PyTorch, so it needs many
# queries, counted over all heads, and rows of keys that do not fill a vector, at which PyTorch's kernels are slow.
VECTOR = 16
ENOUGH = {  # queries, by (dropout, mask): forward alone, and with gradients
    (False, False): (2400, 1400),
    (False, True): (1100, 850),
    (True, False): (520, 350),
    (True, True): (520, 350),
}
ENOUGH_SCORES = 16384  # with dropout, which PyTorch's fused kernel does not have, also for rows of vectors
MOST_SCORES = 65536  # of one head
FEWEST = 3  # queries or keys of one head: below, its products are of vectors
WIDEST = 32  # E or Ev without dropout
TINY_PRODUCT = 400  # multiplications below which PyTorch's batched product is a plain loop


def is_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float
) -> bool:
    """Whether `short_attention` takes the call, and faster than PyTorch's kernels would."""
    if torch.compiler.is_compiling() or query.dtype != torch.float32:
        return False
    if query.ndim != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    n_queries, n_keys = query.shape[2], key.shape[2]
    rows, scores = query.shape[0] * query.shape[1] * n_queries, n_queries * n_keys
    without, with_gradients = ENOUGH[dropout_p > 0.0, attn_mask is not None]
    if rows < with_gradients or min(n_queries, n_keys) < FEWEST:
        return False
    enough = rows >= without or wants_gradient(query, key, value)
    if dropout_p:
        enough = (enough if n_keys < VECTOR else rows * n_keys >= ENOUGH_SCORES) and scores <= MOST_SCORES
    else:
        sizes = query.shape[3], value.shape[3]
        enough = enough and max(n_queries, n_keys) < VECTOR and max(sizes) <= WIDEST
        enough = enough and scores * min(sizes) >= TINY_PRODUCT
    if not enough or query.device.type != "cpu":
        return False
    try:
        for tensor in (query, key, value):
            tensor.data_ptr()
        return attn_mask is None or (attn_mask.dtype == torch.bool and bool(attn_mask.any(-1).all()))
    except RuntimeError:  # no memory, no numbers to look at: fake tensors
        return False


def short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention in float32, for finite keys and values, each query seeing at least one key.

    Args:
        query: (B, H, L, E); key: (B, H, S, E); value: (B, H, S, Ev).
        attn_mask: bool, True = may attend, broadcastable to (B, H, L, S); or None.
        dropout_p, is_causal, scale: as in `kernels.scaled_dot_product_attention`.

    Returns:
        (B, H, L, Ev).
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (*query.shape[:-1], key.shape[-2])
    bias = None
    if is_causal:
        bias = query.new_full(scores[-2:], -math.inf).triu_(1)
    if attn_mask is not None:
        forbidden = query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
        bias = forbidden if bias is None else bias + forbidden
    kept = None
    if dropout_p:
        kept = keep_factors((scores[0] * scores[1], *scores[2:]), dropout_p)
    if bias is not None and bias.ndim > 2:
        bias = bias.expand(*scores[:2], *bias.shape[-2:]).reshape(-1, *bias.shape[-2:])
    return ShortAttention.apply(query, key, value, bias, kept, float(scale))


def scaled_products(a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """scale * a @ b + bias for a (N, P, Q) and b (N, Q, R), bias broadcastable to (N, P, R): (N, P, R)."""
    if bias is None:
        return torch.baddbmm(a.new_empty(()).expand(1, 1, 1), a, b, beta=0, alpha=scale)
    return torch.baddbmm(bias, a, b, alpha=scale)


def compact(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, E) as (B H, T, E), contiguous: one copy of a strided view, for all products that read it."""
    return x.reshape(-1, *x.shape[-2:])


class ShortAttention(torch.autograd.Function):
    """(softmax(scale * query key^T + bias) * kept) value; bias (N or 1, L or 1, S or 1) and kept (N, L, S), N = B H."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        kept: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Output (B, H, L, Ev)."""
        q, k, v = (compact(x) for x in (query, key, value))
        weights = scaled_products(q, k.mT, scale, bias)
        if weights.shape[2] < VECTOR:
            weights.sub_(weights.amax(-1, keepdim=True)).exp_()
            weights.div_(weights.sum(-1, keepdim=True))
        else:
            weights = weights.softmax(-1)
        output = torch.bmm(weights if kept is None else weights * kept, v)
        ctx.save_for_backward(query, key, value, bias, kept, q, k, v, weights)
        ctx.scale = scale
        # Not a view of the product: what autograd takes for one has no in-place methods.
        return torch.ops.aten._unsafe_view(output, (*query.shape[:-1], v.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        *inputs, bias, kept, q, k, v, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # this backward is itself to be differentiated, so all of it needs a graph
            q, k, v = (compact(x) for x in inputs)
            weights = torch.softmax(scaled_products(q, k.mT, ctx.scale, bias), -1)
        grad = compact(grad)
        dropped = weights if kept is None else weights * kept
        grad_weights = torch.bmm(grad, v.mT)
        grad_weights = grad_weights if kept is None else grad_weights * kept
        pulled = weights * grad_weights
        grad_scores = torch.addcmul(pulled, weights, pulled.sum(-1, keepdim=True), value=-1)
        grads = (
            scaled_products(grad_scores, k, ctx.scale),
            scaled_products(grad_scores.mT, q, ctx.scale),
            torch.bmm(dropped.mT, grad),
        )
        return (*(x.view(like.shape) for x, like in zip(grads, inputs)), None, None, None)
