"""Attention by its formula, in plain PyTorch: every rule, differentiable any number of times.

    x = cap tanh(scale query key^T / cap) - slope |place - j| + mask
    weights = exp(x) / (sum over the keys a query may see of exp(x) + exp(sink))
    output = dropout(weights) value

The reference that the kernels follow, what runs where no fused kernel knows a rule, and what double backward goes
through. It stores the L x S weights of each head. Nothing in it depends on the numbers in a tensor, so it runs under
`torch.compile`, every transform of `torch.func` and forward mode as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.attention.layout import for_query_heads
from kernels.attention.call import LEARNED, Call
from kernels.backend import without_autocast


def composed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend, in float32 (float64 for float64 inputs) whatever autocast says.

    A query that may see no key gets output 0, weights 0, the sink as its lse (-inf without one), and sends no gradient
    to query, key or value. A NaN or Inf in a query, or in a key it may see, makes the query's output, lse and weights
    NaN; in a value it may see, the whole output row. Such a row sends back no gradient either.

    Args:
        query: (B, Hq, L, E).
        key: (B, Hkv, S, E), Hq a multiple of Hkv.
        value: (B, Hkv, S, Ev).
        call: what is asked for; mask, slopes and sinks are differentiable.
        kept: (B, Hq, L, S) bool, the weights that dropout keeps; None draws them from torch's generator.

    Returns:
        output: (B, Hq, L, Ev), dtype of the query.
        lse: (B, Hq, L), the natural log-sum-exp of what a query sees, its sink included; float32 or float64.
        weights: (B, Hq, L, S) before dropout, dtype of the query.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, n_queries = query.shape[1:3]
    kv_heads, n_keys = key.shape[1:3]
    group = heads // max(kv_heads, 1)
    with without_autocast(query.device):
        (q, bad_query), (k, bad_key), (v, bad_value) = (_finite_rows(x.to(dtype)) for x in (query, key, value))
        # Query heads as (Hkv, group): those of a group share their key head without a copy of it.
        shared = kv_heads, group
        scores = call.scale * torch.einsum("bhgle,bhse->bhgls", q.unflatten(1, shared), k).flatten(1, 2)
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.alibi_slopes is not None:
            scores = scores + alibi(call, n_queries, n_keys, dtype)
        if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
            scores = scores + call.attn_mask.to(dtype)
        allowed = allowed_pairs(call, n_queries, n_keys, query.device)
        sinks = None if call.sinks is None else call.sinks.to(dtype)[:, :, None, None]
        weights, lse = _softmax(scores, allowed, sinks)
        dropped = _drop(weights, call.dropout_p, kept)
        output = torch.einsum("bhgls,bhse->bhgle", dropped.unflatten(1, shared), v).flatten(1, 2)

        bad_key, bad_value = (for_query_heads(bad, 1, heads).mT for bad in (bad_key, bad_value))  # (B, Hq, 1, S)
        bad_scores = (allowed & (bad_query | bad_key)).any(-1, keepdim=True)  # (B, Hq, L, 1)
        bad_output = bad_scores | (allowed & bad_value).any(-1, keepdim=True)
        output = torch.where(bad_output, math.nan, output)
        lse = torch.where(bad_scores, math.nan, lse).squeeze(-1)
        weights = torch.where(bad_scores & allowed, math.nan, weights)
    return output.to(query.dtype), lse, weights.to(query.dtype)


def composed_gradients(
    grads: tuple[torch.Tensor | None, torch.Tensor | None],
    inputs: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    call: Call,
) -> list[torch.Tensor | None]:
    """The gradients of attention with a graph behind them, so that they can be differentiated: recomputed by formula.

    Args:
        grads: of output and lse; None for zero.
        inputs: query, key, value, and where they are learned mask and sinks.
        needed: which of the inputs want a gradient.
        call: of the call, without dropout.
    """
    learned = [i for i, need in enumerate(needed) if need]

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given: list[Any] = list(inputs)
        for i, x in zip(learned, tensors):
            given[i] = x
        query, key, value, *others = given
        own = call._replace(**dict(zip(LEARNED, others)))
        found = composed_attention(query, key, value, own)[:2]
        return tuple(x for x, grad in zip(found, grads) if grad is not None)

    # Under vmap and other transforms of torch.func too, where torch.autograd.grad would find no graph.
    pull = torch.func.vjp(outputs, *(inputs[i] for i in learned))[1]
    found_grads = iter(pull(tuple(grad for grad in grads if grad is not None)))
    return [next(found_grads) if need else None for need in needed]


def allowed_pairs(call: Call, n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
    """Which keys each query may see by all rules: bool, (B or 1, Hq or 1, L or 1, S)."""
    allowed, places, keys = _places(call, n_queries, n_keys, device)
    if call.right is not None:
        allowed = allowed & (keys <= places + call.right)
    if call.left is not None:
        allowed = allowed & (keys >= places - call.left)
    mask = call.attn_mask
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return allowed


def alibi(
    call: Call, n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What the distance between a query's place and a key adds to the score: (B or 1, Hq, L, S), in `dtype`.

    Source: Press et al. 2022, "Train Short, Test Long", section 3; both directions alike.
    """
    slopes = call.alibi_slopes
    assert slopes is not None
    _, places, keys = _places(call, n_queries, n_keys, slopes.device)
    slopes = slopes.to(dtype)[:, :, None, None]
    if call.query_starts is not None and slopes.shape[0] != 1:
        slopes = slopes[_sequences(call.query_starts, n_queries)].permute(2, 1, 0, 3)  # (1, Hq, L, 1)
    return -slopes * (places - keys).abs()


def _places(
    call: Call, n_queries: int, n_keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which keys are in use, and of a query's own sequence: bool (B or 1, 1, L or 1, S); the places of queries,
    (B or 1, 1, L, 1), and of keys, (1, 1, 1, S).
    """
    queries = torch.arange(n_queries, device=device, dtype=torch.int64)
    keys = torch.arange(n_keys, device=device, dtype=torch.int64)
    if call.query_starts is not None and call.key_starts is not None:
        of_query, of_key = _sequences(call.query_starts, n_queries), _sequences(call.key_starts, n_keys)
        if call.bottom_right:
            queries = queries + (call.key_starts.diff() - call.query_starts.diff())[of_query]
        queries, keys = queries - call.query_starts[of_query], keys - call.key_starts[of_key]
        in_use = (of_query[:, None] == of_key)[None, None]
        return in_use, queries[None, None, :, None], keys[None, None, None]
    queries, keys = queries[None, None, :, None], keys[None, None, None]
    n_used: int | torch.Tensor = n_keys
    if call.key_lengths is not None:
        n_used = call.key_lengths.clamp(0, n_keys)[:, None, None, None]
    if call.bottom_right:
        queries = queries + (n_used - n_queries)
    return keys < n_used, queries, keys


def _sequences(starts: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Which of the packed sequences that start at `starts` (N + 1,) each row belongs to: int64 (n_rows,)."""
    rows = torch.arange(n_rows, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts, rows, right=True) - 1


def _finite_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, H, T, E) with 0 in each row that holds a NaN or Inf, and which rows those are, (B, H, T, 1).

    Zero times NaN is NaN: a key that a query may not see would reach it through the products of forward and backward.
    """
    bad = ~torch.isfinite(x.detach().abs().amax(-1, keepdim=True))
    return torch.where(bad, 0.0, x), bad


def _softmax(
    scores: torch.Tensor, allowed: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, Hq, L, S) and lse (B, Hq, L, 1) of the scores that are allowed.

    The largest score is taken out before exp. That changes no result, so no gradient needs to pass through it.
    """
    scores = torch.where(allowed, scores, -math.inf)
    if scores.shape[-1]:
        top = scores.detach().amax(-1, keepdim=True)
    else:
        top = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = torch.where(top == -math.inf, 0.0, top)  # a row with nothing to see: exp gives 0, not NaN
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    return torch.where(allowed, weights / total, 0.0), lse  # again: so no gradient comes from forbidden values


def _drop(weights: torch.Tensor, dropout_p: float, kept: torch.Tensor | None) -> torch.Tensor:
    """Weights after dropout."""
    if kept is None:
        return torch.nn.functional.dropout(weights, dropout_p) if dropout_p else weights
    return weights * kept * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
