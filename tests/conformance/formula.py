"""The exact answer: attention with every rule there is, written out without a loop, in whatever dtype it is given.

    x_ij = softcap tanh(scale q_i k_j / softcap) - slope_h |i' - j| + mask_ij       i' = i + offset: the query's place
    P_ij = exp(x_ij) / (sum_j exp(x_ij) + exp(sink_h))                              over the keys that i may attend to
    output_i = sum_j P_ij v_j        lse_i = log(sum_j exp(x_ij) + exp(sink_h))

The offset is 0 ("top_left") or n - L ("bottom_right"), n the number of keys in use. Query i may attend to key j if
j < n, the mask allows it, j <= i' when causal, and i' - left <= j <= i' + right under a window.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1; slopes: Press et al. 2022, "Train Short, Test
Long", section 3; softcap: Gemma Team 2024, "Gemma 2", section 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Answer(NamedTuple):
    """output (..., Hq, L, Ev); lse (..., Hq, L), natural logarithm; weights (..., Hq, L, S), before dropout."""

    output: torch.Tensor
    lse: torch.Tensor
    weights: torch.Tensor


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> Answer:
    """Attention as above; differentiable in every floating-point tensor.

    Args:
        query: (..., Hq, L, E); key: (..., Hkv, S, E); value: (..., Hkv, S, Ev). Leading dimensions broadcast, and Hkv
            may divide Hq.
        attn_mask: bool (True = may attend) or added to the scores, broadcastable to (..., Hq, L, S).
        alibi_slopes, sinks: (Hq,) or (B, Hq). key_lengths: (B,).
        kept: (..., Hq, L, S) bool, the weights that dropout with probability `dropout_p` keeps.
    """
    n_keys = key.shape[-2]
    distance = distances(query, key, key_lengths, causal_alignment)
    allowed = torch.arange(n_keys, device=query.device) < keys_in_use(n_keys, key_lengths)
    key, value = (repeat_heads(x, query) for x in (key, value))
    left, right = window or (None, None)
    for reach, sign in ((left, 1), (right, -1), (0 if is_causal else None, -1)):
        if reach is not None:
            allowed = allowed & (sign * distance <= reach)

    wide = torch.promote_types(query.dtype, torch.float32)  # as PyTorch's softmax computes 16-bit inputs
    scores = query.to(wide) @ key.to(wide).mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(wide) * distance.abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        never = attn_mask == -math.inf
        allowed = allowed & ~never
        scores = scores + attn_mask.masked_fill(never, 0.0)
    scores = scores.masked_fill(~allowed, -math.inf)

    sink = scores.new_full((), -math.inf) if sinks is None else sinks.to(wide)[..., None, None]
    sink = sink.expand(*scores.shape[:-1], 1)
    top = torch.cat([scores, sink], -1).detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(-1, keepdim=True) + torch.exp(sink - top)
    empty = total == 0.0
    weights = exponentials / total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, -math.inf).squeeze(-1)
    weights = weights.to(query.dtype)
    used = weights if kept is None else weights * kept * enlarged(dropout_p)
    return Answer(used @ value, lse, weights)


def keys_in_use(n_keys: int, key_lengths: torch.Tensor | None) -> torch.Tensor | int:
    """How many keys there are, (B, 1, 1, 1) if it depends on the batch entry."""
    return n_keys if key_lengths is None else key_lengths.clamp(0, n_keys).reshape(-1, 1, 1, 1)


def distances(
    query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None = None, causal_alignment: str = "top_left"
) -> torch.Tensor:
    """i' - j, how far each key lies behind the place of each query: (L, S) or (B, 1, L, S)."""
    place: torch.Tensor = torch.arange(query.shape[-2], device=query.device)[:, None]
    if causal_alignment == "bottom_right":
        place = place + keys_in_use(key.shape[-2], key_lengths) - query.shape[-2]
    return place - torch.arange(key.shape[-2], device=query.device)


def enlarged(dropout_p: float) -> float:
    """By how much dropout multiplies what it keeps."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def repeat_heads(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """x (..., Hkv, S, D) with a copy of each head for every query head that shares it; one head broadcasts anyway."""
    if x.ndim < 3 or x.shape[-3] in (1, query.shape[-3]) or query.ndim < 3:
        return x
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
