"""Attention by its formula, in plain PyTorch: every rule, differentiable any number of times.

    x = cap tanh(scale query key^T / cap) - slope |place - j| + mask
    weights = exp(x) / (sum over the keys a query may see of exp(x) + exp(sink))
    output = dropout(weights) value

The reference that the kernels follow, what runs where no fused kernel knows a rule, and what double backward goes
through. It stores the L x S weights of each head. It looks at numbers only to leave out the care that NaN and Inf take,
and only where it can, so it runs under `torch.compile`, every transform of `torch.func` and forward mode as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.attention.call import LEARNED, Call
from kernels.attention.layout import for_query_heads
from kernels.backend import wants_gradient, without_autocast

Result = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def composed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    kept: torch.Tensor | None = None,
    *,
    need_lse: bool = True,
    with_care: bool = False,
) -> Result:
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
        need_lse: whether the lse is wanted.
        with_care: take NaN and Inf for granted, instead of looking for them.

    Returns:
        output: (B, Hq, L, Ev), dtype of the query.
        lse: (B, Hq, L), the natural log-sum-exp of what a query sees, its sink included; float32 or float64. Or None.
        weights: (B, Hq, L, S) before dropout, dtype of the query.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    is_narrow = query.dtype != dtype
    heads, n_queries, n_keys = *query.shape[1:3], key.shape[2]
    with without_autocast(query.device):
        q, k, v = (x.to(dtype) if is_narrow else x for x in (query, key, value))
        # Dropout is drawn once, whatever the numbers are: then nothing is left to be seen in the output.
        is_drawn = call.dropout_p > 0.0 and kept is None
        with_care = with_care or not all_finite(*((query, key, value) if is_drawn else (query, key)))
        if with_care:
            (q, bad_query), (k, bad_key), (v, bad_value) = (_finite_rows(x) for x in (q, k, v))
        cap = call.softcap or 1.0
        scores = _product(call.scale / max(cap, 1.0) * q, k.mT)
        if call.softcap:
            scores = cap * torch.tanh(scores if cap >= 1.0 else scores / cap)
        if call.alibi_slopes is not None:
            scores = scores + alibi(call, n_queries, n_keys, dtype)
        if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
            scores = scores + call.attn_mask.to(dtype)
        allowed = allowed_pairs(call, n_queries, n_keys, query.device)
        is_known = not (with_care or is_drawn)
        if allowed is not None and is_known and _may_add(allowed, v, call.sinks, wants_gradient(v, scores)):
            scores, allowed = scores + torch.where(allowed, scores.new_zeros(()), -math.inf), None
        weights, lse = _softmax(scores, allowed, call.sinks, need_lse)
        output = _product(_drop(weights, call.dropout_p, kept), v)
        if with_care:
            seen = True if allowed is None else allowed
            bad_key, bad_value = (for_query_heads(bad, 1, heads).mT for bad in (bad_key, bad_value))  # (B, Hq, 1, S)
            bad_scores = (seen & (bad_query | bad_key)).any(-1, keepdim=True)  # (B, Hq, L, 1)
            bad_output = bad_scores | (seen & bad_value).any(-1, keepdim=True)
            output = torch.where(bad_output, math.nan, output)
            lse = lse if lse is None else torch.where(bad_scores.squeeze(-1), math.nan, lse)
            weights = torch.where(bad_scores & seen, math.nan, weights)
        elif is_known and not all_finite(output):
            # Zero times NaN is NaN: a value is not finite, or a score that may not be seen.
            return composed_attention(query, key, value, call, kept, need_lse=need_lse, with_care=True)
    if is_narrow:
        output, weights = output.to(query.dtype), weights.to(query.dtype)
    return output, lse, weights


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
        output, lse, _ = composed_attention(query, key, value, own, need_lse=grads[1] is not None)
        return tuple(x for x, grad in zip((output, lse), grads) if x is not None and grad is not None)

    # Under vmap and other transforms of torch.func too, where torch.autograd.grad would find no graph.
    pull = torch.func.vjp(outputs, *(inputs[i] for i in learned))[1]
    found_grads = iter(pull(tuple(grad for grad in grads if grad is not None)))
    return [next(found_grads) if need else None for need in needed]


def without_idle_sides(call: Call, n_queries: int, n_keys: int) -> Call:
    """The call less the sides of the window that cut off no key from any query, as of a single query to decode."""
    if torch.compiler.is_exporting():  # where lengths are symbols, of which nothing may be asked
        return call
    offset = n_keys - n_queries if call.bottom_right else 0
    if call.right is not None and offset + call.right >= n_keys - 1:
        call = call._replace(right=None)
    if call.left is not None and offset + n_queries - 1 - call.left <= 0:
        call = call._replace(left=None)
    return call


def allowed_pairs(call: Call, n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor | None:
    """Which keys each query may see by all rules: bool, (B or 1, Hq or 1, L or 1, S or 1). None: all of them."""
    call = without_idle_sides(call, n_queries, n_keys)
    found = []
    if call.query_starts is not None and call.key_starts is not None:
        of_query, of_key = _sequences(call.query_starts, n_queries), _sequences(call.key_starts, n_keys)
        found.append((of_query[:, None] == of_key)[None, None])
    if call.key_lengths is not None:
        found.append(_numbers(n_keys, device) < call.key_lengths.reshape(-1, 1, 1, 1))
    if call.left is not None or call.right is not None:
        places, keys = _places(call, n_queries, n_keys, device)
        if call.right is not None:
            found.append(keys <= places + call.right)
        if call.left is not None:
            found.append(keys >= places - call.left)
    mask = call.attn_mask
    if mask is not None:
        found.append(mask if mask.dtype == torch.bool else mask != -math.inf)
    return functools.reduce(torch.Tensor.logical_and, found) if found else None


def alibi(call: Call, n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the distance between a query's place and a key adds to the score: (B or 1, Hq, L, S), in `dtype`.

    Source: Press et al. 2022, "Train Short, Test Long", section 3; both directions alike.
    """
    slopes = call.alibi_slopes
    assert slopes is not None
    places, keys = _places(call, n_queries, n_keys, slopes.device)
    slopes = slopes.to(dtype)[:, :, None, None]
    if call.query_starts is not None and slopes.shape[0] != 1:
        slopes = slopes[_sequences(call.query_starts, n_queries)].permute(2, 1, 0, 3)  # (1, Hq, L, 1)
    return -slopes * (places - keys).abs()


def _places(call: Call, n_queries: int, n_keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of queries, (B or 1, 1, L, 1), and of keys, (S,), of packed sequences each in its own."""
    queries, keys = _numbers(n_queries, device), _numbers(n_keys, device)
    if call.query_starts is not None and call.key_starts is not None:
        of_query, of_key = _sequences(call.query_starts, n_queries), _sequences(call.key_starts, n_keys)
        if call.bottom_right:
            queries = queries + (call.key_starts.diff() - call.query_starts.diff())[of_query]
        queries, keys = queries - call.query_starts[of_query], keys - call.key_starts[of_key]
        return queries[None, None, :, None], keys
    queries = queries[None, None, :, None]
    if call.bottom_right:
        n_used: int | torch.Tensor = n_keys
        if call.key_lengths is not None:
            n_used = call.key_lengths.clamp(0, n_keys)[:, None, None, None]
        queries = queries + (n_used - n_queries)
    return queries, keys


def _numbers(n: int, device: torch.device) -> torch.Tensor:
    """0 to n - 1."""
    return torch.arange(n, device=device, dtype=torch.int64)


def _sequences(starts: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Which of the packed sequences that start at `starts` (N + 1,) each row belongs to: int64 (n_rows,)."""
    rows = torch.arange(n_rows, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts, rows, right=True) - 1


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are known to be finite. False where none can be looked at: compiled, vmapped, fake tensors.

    One pass over each tensor; a sum that overflows costs speed only. Nor is a GPU asked, which would have to be waited
    for.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        for x in tensors:
            if not (x.is_cpu and math.isfinite((x.detach() if x.requires_grad else x).sum().item())):
                return False
    except RuntimeError:  # no value to look at
        return False
    return True


def _finite_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, H, T, E) with 0 in each row that holds a NaN or Inf, and which rows those are, (B, H, T, 1).

    Zero times NaN is NaN: a key that a query may not see would reach it through the products of forward and backward.
    """
    bad = ~torch.isfinite(x.detach().abs().amax(-1, keepdim=True))
    return torch.where(bad, 0.0, x), bad


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of a (B, Hq, M, K) and b (B, Hkv, K, N), each matrix of b for a group of heads: (B, Hq, M, N)."""
    heads, own = a.shape[1], b.shape[1]
    if heads == own:
        return a @ b
    group = heads // max(own, 1)
    if torch.compiler.is_compiling():  # where rows of all heads would be lengths that torch.export cannot prove
        return torch.einsum("bhgmk,bhkn->bhgmn", a.unflatten(1, (own, group)), b).flatten(1, 2)
    rows = a.reshape(a.shape[0], own, group * a.shape[2], a.shape[3])
    # Not a view of the product: what is a view made without gradients cannot be changed in place with them.
    return torch.ops.aten._unsafe_view.default(rows @ b, (a.shape[0], heads, a.shape[2], b.shape[3]))


def _softmax(
    scores: torch.Tensor, allowed: torch.Tensor | None, sinks: torch.Tensor | None, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (B, Hq, L, S) and, where needed, lse (B, Hq, L) of the scores that are allowed.

    A row with nothing to see is NaN in PyTorch's softmax, and so are the derivatives of its lse. Neither passes a
    constant, which is put in their place both before and after.
    """
    n_keys = scores.shape[-1]
    if allowed is not None:
        scores = torch.where(allowed, scores, -math.inf)
    if sinks is not None:
        sinks = _constant_at_minus_infinity(sinks.to(scores.dtype)).unsqueeze(-1).unsqueeze(-1)
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
    weights = torch.softmax(scores, -1)
    if sinks is not None:
        weights = weights.narrow(-1, 0, n_keys)
    if allowed is not None:
        weights = torch.where(allowed, weights, 0.0)
    if not need_lse:
        return weights, None
    # Not by torch.logsumexp, whose gradient takes a weight for 1 where the sum of a row drowns in its largest score. To
    # take that out changes no result, so no gradient needs to pass through it.
    top = scores.detach().amax(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    top = top.masked_fill(top == -math.inf, 0.0)
    lse = top + torch.log(torch.exp(scores - top.unsqueeze(-1)).sum(-1))
    return weights, _constant_at_minus_infinity(lse)


def _may_add(allowed: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, has_gradient: bool) -> bool:
    """Whether -inf may be added to scores that are not allowed, at a fifth of the time of leaving them out.

    Then each query must see a key or a sink, since a row of -inf is NaN. And no value may be so large, above 2^20, that
    its product with a gradient might overflow: times a weight of zero that is NaN.
    """
    try:
        sees = all_finite(sinks) if sinks is not None else bool(allowed.any(-1).all())
    except RuntimeError:  # no value to look at
        return False
    return sees and (not has_gradient or all_finite((value.detach() * 2.0**44).square()))


def _constant_at_minus_infinity(x: torch.Tensor) -> torch.Tensor:
    """x, of which no derivative passes where it is -inf."""
    return x.masked_fill(x == -math.inf, -math.inf)


def _drop(weights: torch.Tensor, dropout_p: float, kept: torch.Tensor | None) -> torch.Tensor:
    """Weights after dropout."""
    if kept is None:
        return torch.nn.functional.dropout(weights, dropout_p) if dropout_p else weights
    return weights * kept * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
