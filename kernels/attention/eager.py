"""Attention through PyTorch's own kernels, with this package's rules where PyTorch's differ.

PyTorch lets NaN and Inf of keys that a query may not see into its result (zero times NaN is NaN), and refuses
`attn_mask` together with `is_causal`. Here neither happens.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention.short_cpu import short_attention

# Entries of one head's scores up to which `short_attention` is faster on a CPU: PyTorch's fused kernel has no dropout.
MANY = 32  # heads over the batch; for fewer, one call into PyTorch costs less than several
SHORT = 128
SHORT_WITH_DROPOUT = 4096


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Arguments and result as for `kernels.scaled_dot_product_attention`; differentiable as often as PyTorch's."""
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        least = torch.finfo(query.dtype).min  # "least of all", which must not become -inf, "never"
        attn_mask = attn_mask.clamp(min=least).masked_fill(attn_mask == -math.inf, -math.inf).to(query.dtype)
    if attn_mask is not None and attn_mask.ndim < 2:  # PyTorch wants an axis of queries
        attn_mask = attn_mask.reshape(1, -1)
    if attn_mask is not None and is_causal:
        attn_mask, is_causal = _with_causal(attn_mask, query.shape[-2], key.shape[-2]), False
    sees_all = attn_mask is None and not is_causal
    if sees_all or _all_finite(key, value):
        if _is_short(query, key, value, attn_mask, dropout_p):
            return short_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    # Take keys with a NaN or Inf out, then give NaN to each query that may see one of them.
    bad = ~(torch.isfinite(key).all(-1) & torch.isfinite(value).all(-1))
    key, value = (x.masked_fill(bad.unsqueeze(-1), 0) for x in (key, value))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if enable_gqa:
        bad = bad.repeat_interleave(query.shape[-3] // bad.shape[-2], -2)
    return output.masked_fill(_may_see(bad, attn_mask, query.shape[-2]).unsqueeze(-1), math.nan)


def _is_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float
) -> bool:
    """Whether `short_attention` takes the call, and faster than PyTorch's kernels would (bench/bench_attention.py)."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return False
    if query.ndim != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    scores = query.shape[-2] * key.shape[-2]
    heads = query.shape[0] * query.shape[1]
    if heads < MANY or not 0 < scores <= (SHORT_WITH_DROPOUT if dropout_p else SHORT):
        return False
    if attn_mask is None:
        return True
    try:
        return attn_mask.dtype == torch.bool and bool(attn_mask.any(-1).all())
    except RuntimeError:  # no value to look at: vmap, fake tensors
        return False


def _with_causal(attn_mask: torch.Tensor, n_queries: int, n_keys: int) -> torch.Tensor:
    """The mask (..., L or 1, S or 1) with keys after their query forbidden too: (..., L, S)."""
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool, device=attn_mask.device).tril()
    return attn_mask & causal if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~causal, -math.inf)


def _may_see(bad: torch.Tensor, attn_mask: torch.Tensor | None, n_queries: int) -> torch.Tensor:
    """Which queries (..., L or 1) may attend to one of the keys that are `bad` (..., S). No mask: causal."""
    if bad.shape[-1] == 0:
        return bad.new_zeros((*bad.shape[:-1], n_queries))
    if attn_mask is None:
        seen = bad.int().cummax(-1).values.bool()  # (..., S): one of the keys up to here
        return seen[..., torch.arange(n_queries, device=bad.device).clamp(max=bad.shape[-1] - 1)]
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
    return (allowed & bad.unsqueeze(-2)).any(-1)


def _all_finite(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are known to be finite. False where that cannot be asked: under torch.compile and vmap.

    One pass over each tensor; a sum that overflows costs speed only. Nor is a GPU asked, which would have to be waited
    for.
    """
    if torch.compiler.is_compiling() or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    try:
        return all(math.isfinite(tensor.detach().sum().item()) for tensor in tensors)
    except RuntimeError:  # no value to look at: vmap, fake tensors
        return False
