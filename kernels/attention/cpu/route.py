"""Attention through PyTorch's own kernels, with this package's rules where PyTorch's differ: the way of a call on a
CPU that is not a simple one (`simple.py`), and on a GPU of one with backend="torch" or that Triton cannot run.

PyTorch lets NaN and Inf of keys that a query may not see into its result (zero times NaN is NaN), and refuses
`attn_mask` together with `is_causal`. Here neither happens. Rules that PyTorch does not have become a mask for its
kernels where they can, and otherwise run as the formula is written. From here a call goes one of three ways: PyTorch's
function (`fused.py`), many short sequences at once (`short.py`), the formula (`../formula.py`).
"""

from __future__ import annotations

import math

import torch

from kernels.attention.call import Call
from kernels.attention.cpu.fused import fused_attention
from kernels.attention.cpu.short import is_short, short_attention
from kernels.attention.formula import alibi, all_finite, allowed_pairs, composed_attention, without_idle_sides
from kernels.attention.layout import for_query_heads, ordered_as, overlaps
from kernels.autograd import transformed
from kernels.backend import as_autocast, autocasts, wants_gradient, without_autocast

# Of a call, what PyTorch's function takes or a mask for it can say; what else is asked for goes by the formula.
MASK_SAYS = {
    "attn_mask",
    "key_lengths",
    "alibi_slopes",
    "scale",
    "dropout_p",
    "left",
    "right",
    "bottom_right",
    "deterministic",
    "key_starts",
    "max_queries",
    "max_keys",
}
NAMES = {"softcap": "a soft cap", "query_starts": "packed sequences"}
BEYOND_MASKS = [(i, NAMES.get(name, name)) for i, name in enumerate(Call._fields) if name not in MASK_SAYS]


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
    if autocasts(query.device):
        query, key, value = as_autocast(query, key, value)
        with without_autocast(query.device):  # it would make -inf of the mask's finfo.min
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None:
        attn_mask = _as_pytorch_takes_it(attn_mask, query, key.shape[-2])
    if attn_mask is None and is_causal and scale is not None and scale <= 0:  # PyTorch multiplies its -inf by it
        attn_mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    if attn_mask is not None and is_causal:
        attn_mask, is_causal = _with_causal(attn_mask, query.shape[-2], key.shape[-2]), False
    if overlaps(query):  # PyTorch's kernel gives its output the strides of the query
        query = query.contiguous()
    sees_all = attn_mask is None and not is_causal
    # The output shows a NaN or Inf in a value, times a weight of zero too, but for a gradient too late. (Of an infinite
    # key the weights may be numbers.)
    by_output = not (sees_all or dropout_p or wants_gradient(query, key, value, attn_mask))
    if sees_all or all_finite(*((key,) if by_output else (key, value))):
        if is_short(query, key, value, attn_mask, dropout_p):
            output = short_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        else:
            output = fused_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if not by_output or all_finite(output):
            return ordered_as(query, output)
    # Take keys with a NaN or Inf out, then give NaN to each query that may see one of them.
    bad = ~(torch.isfinite(key).all(-1) & torch.isfinite(value).all(-1))
    key, value = (x.masked_fill(bad.unsqueeze(-1), 0) for x in (key, value))
    output = fused_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if enable_gqa:
        bad = for_query_heads(bad, -2, query.shape[-3])
    output = output.masked_fill(_may_see(bad, attn_mask, query.shape[-2]).unsqueeze(-1), math.nan)
    return ordered_as(query, output)


def extended_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, *, need_lse: bool, need_weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Attention by all rules: through PyTorch's kernels where a mask can say them, else by the formula.

    Args:
        query: (B, Hq, L, E).
        key: (B, Hkv, S, E), Hq a multiple of Hkv.
        value: (B, Hkv, S, Ev).
        call: what is asked for.
        need_lse: the formula gives it; PyTorch's kernels keep theirs to themselves.
        need_weights: likewise.

    Returns:
        output (B, Hq, L, Ev); lse (B, Hq, L) and weights (B, Hq, L, S), as `composed_attention` has them, or None.
    """
    query, key, value = as_autocast(query, key, value)
    if why_not_fused(query, key, value, call, need_lse, need_weights):
        output, lse, weights = composed_attention(query, key, value, call, need_lse=need_lse)
        return ordered_as(query, output), lse, weights if need_weights else None
    attn_mask, is_causal = _as_mask(call, query, key.shape[2])
    gqa = not query.shape[1] == key.shape[1]  # a bool also where sizes are symbols
    return attention(query, key, value, attn_mask, call.dropout_p, is_causal, call.scale, gqa), None, None


def why_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> list[str]:
    """What PyTorch's kernels cannot give to a call even of PyTorch's own arguments."""
    if not torch.compiler.is_compiling() and 0 in (query.numel(), key.numel(), value.numel()):
        # They divide by the number of heads, and forget a batch of none that the value alone has.
        return ["an answer where there is nothing to attend to"]
    if transformed():
        return ["what transforms of torch.func and forward mode ask for"]
    is_float = attn_mask is not None and attn_mask.dtype != torch.bool
    if is_float and query.is_cpu and torch.compiler.is_compiling() and torch.is_grad_enabled():
        return ["the gradient under large masks (see cpu/fused.py) in compiled code, which cannot look at numbers"]
    return []


def why_not_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, need_lse: bool, need_weights: bool
) -> str:
    """The reason why PyTorch's kernels cannot run a call, whatever mask they are given; empty when they can."""
    slopes = call.alibi_slopes
    asked = [name for i, name in BEYOND_MASKS if isinstance(call[i], torch.Tensor) or call[i]]
    asked += ["the log-sum-exp"] * need_lse + ["the weights"] * need_weights
    asked += ["a gradient of slopes"] * wants_gradient(slopes) + why_formula(query, key, value, call.attn_mask)
    if asked:
        return f"it has no way to give {' and '.join(asked)}"
    if slopes is not None and query.device.type != "cpu" and query.dtype.itemsize <= 2:
        return "distances times slopes do not fit a mask of 16-bit numbers"
    return ""


def _as_mask(call: Call, query: torch.Tensor, n_keys: int) -> tuple[torch.Tensor | None, bool]:
    """The rules as PyTorch's `attn_mask`, (B or 1, Hq or 1, L or 1, S) or None, and `is_causal`."""
    n_queries = query.shape[2]
    top_left = not call.bottom_right or (not torch.compiler.is_exporting() and n_queries == n_keys)
    call = without_idle_sides(call, n_queries, n_keys)
    if call.key_lengths is None and call.alibi_slopes is None and call.left is None:
        if call.right is None or (call.right == 0 and top_left):
            return call.attn_mask, call.right is not None
    allowed = allowed_pairs(call, n_queries, n_keys, query.device)
    bias = None
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        bias = call.attn_mask
    if call.alibi_slopes is not None:
        distances = alibi(call, n_queries, n_keys, torch.promote_types(query.dtype, torch.float32))
        bias = distances if bias is None else distances + bias
    if bias is None or allowed is None:
        return allowed if bias is None else bias, False
    return torch.where(allowed, bias, -math.inf), False


def _as_pytorch_takes_it(attn_mask: torch.Tensor, query: torch.Tensor, n_keys: int) -> torch.Tensor:
    """The mask with axes of queries and, on a GPU, of keys, and where it is float of a dtype that fits the query's."""
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):  # of another half, under autocast
        attn_mask = attn_mask.float()
    if attn_mask.dtype not in (torch.bool, query.dtype) and not query.is_cpu:
        # A GPU wants the query's dtype, in which "least of all" must not become -inf, "never".
        least = max(torch.finfo(query.dtype).min, torch.finfo(attn_mask.dtype).min)
        attn_mask = attn_mask.clamp(min=least).masked_fill(attn_mask == -math.inf, -math.inf).to(query.dtype)
    attn_mask = attn_mask.reshape(1, -1) if attn_mask.ndim < 2 else attn_mask
    if attn_mask.shape[-1] == 1 and not query.is_cpu:  # PyTorch's kernel there refuses one number for all keys
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], n_keys).contiguous()
    return attn_mask


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
