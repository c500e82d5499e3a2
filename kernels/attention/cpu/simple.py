"""Small calls of attention on a CPU, whose way to a kernel would take longer than the kernel: one query a head, as when
text is generated, few numbers, and self-attention of a model in training, with nothing more than is_causal. What other
calls are asked on their way, one by one, these are asked at once.

One query a head with a soft cap or sinks goes by the formula, here written for it; its few scores and its output show
what is NaN or infinite. So do heads that share many keys, which the formula reads once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import backend as backends
from kernels.attention.checks import ALIGNMENTS, LARGEST_SCALE, _broadcast_to
from kernels.attention.cpu.fused import Fused, _is_fused_with_gradients, fused_attention
from kernels.attention.cpu.short import is_short
from kernels.attention.formula import all_finite
from kernels.attention.layout import ordered_as, overlaps
from kernels.autograd import apply_at_once, is_followed
from kernels.backend import HALF, wants_gradient
from kernels.subclasses import PLAIN

FEW = 1024  # numbers in a tensor
MANY = 1 << 18  # products of a number of a query and one of a key, measured on one thread and on two
WHOLE = (torch.float32, torch.float64)
FLOATS = (*WHOLE, *HALF)
KNOWN = ("causal_alignment", "softcap", "sinks")  # options that a simple call may have


def simple_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    options: Mapping[str, Any],
    backend: str,
) -> torch.Tensor | None:
    """The output of `kernels.scaled_dot_product_attention` for a simple call; None for any other, right or wrong.

    Arguments as there, unchecked, without weights and log-sum-exp; no tensor has a `__torch_function__`. What PyTorch
    refuses is not asked about: it goes the general way too, which says what is wrong with it.
    """
    try:
        way = way_of(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, options, backend)
        if way == "":
            return None
        if way == "training":
            return _in_training(query, key, value, is_causal, scale)
        query = query.contiguous()
        if way == "formula":
            return _by_formula(query, key, value, attn_mask, scale, options.get("softcap"), options.get("sinks"))
        if attn_mask is None:
            return fused_attention(query, key, value, None, 0.0, False, scale, enable_gqa)
        if not _is_finite(key):  # before the kernel, which then finds the keys near by
            return None
        output = scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa)
        return output if _is_finite(output) else None
    except (RuntimeError, TypeError):
        return None


def way_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    options: Mapping[str, Any],
    backend: str,
) -> str:
    """How `simple_attention` runs a call: by PyTorch's "kernel", by the "formula", "training", or "", not at all."""
    if (
        not type(query) is type(key) is type(value) is torch.Tensor  # those of torch.export are not
        or not query.is_cpu
        or is_followed()
        or torch._C._is_any_autocast_enabled()
        or query.is_nested
        or key.is_nested
    ):
        return ""
    for name, x in options.items():
        if x is not None and name not in KNOWN:
            return ""
    causal_alignment = options.get("causal_alignment", "top_left")
    softcap, sinks = options.get("softcap"), options.get("sinks")
    if not (type(is_causal) is type(enable_gqa) is bool and type(causal_alignment) is type(backend) is str):
        return ""
    shape, others, dtype = query.shape, key.shape, query.dtype
    has_one_query = len(shape) == len(others) == 4 and shape[2] == 1
    is_plain = attn_mask is softcap is sinks is None
    is_alike = shape == others and len(shape) > 1 + enable_gqa and query.is_contiguous()
    is_training = (
        len(shape) == 4
        and not has_one_query
        and is_plain
        and shape == others
        and causal_alignment == "top_left"
        and torch.is_grad_enabled()
        and wants_gradient(query, key, value)
    )
    if (
        not (has_one_query or is_training or is_alike)
        or value.shape != others
        or 0 in shape
        or 0 in others
        or dtype not in FLOATS
        or not (type(dropout_p) is float and dropout_p == 0.0)
        or causal_alignment not in ALIGNMENTS
        or (is_causal and not (is_training or (has_one_query and causal_alignment == "bottom_right")))
        or not (backend == "torch" or (backend == "auto" and not backends.INTERPRETED))
        or not (scale is None or (type(scale) is float and 0.0 < scale < LARGEST_SCALE))
    ):
        return ""
    if is_training:
        return "training"
    if not has_one_query:
        return "kernel" if is_plain and query.numel() < FEW else ""
    (batch, heads, _, size), (_, own, n_keys, _) = shape, others
    if others[0] != batch or others[3] != size or (heads != own and not (enable_gqa and heads % own == 0)):
        return ""
    shares_many = heads != own and batch * heads * n_keys * size >= MANY
    if is_plain and not shares_many:
        return "kernel"
    if attn_mask is not None and not _fits(attn_mask, (torch.bool, dtype), (batch, heads, 1, n_keys)):
        return ""
    if sinks is not None and not _fits(sinks, (dtype,), (heads,)):
        return ""
    if torch.is_grad_enabled() and wants_gradient(query, key, value, attn_mask, sinks):
        return "kernel" if is_plain else ""
    is_whole = dtype in WHOLE and key.dtype == value.dtype == dtype and _is_flat(key) and _is_flat(value)
    if softcap is sinks is None:
        return "formula" if is_whole and shares_many else "kernel"
    is_capped = softcap is None or (type(softcap) is float and 0.0 < softcap < LARGEST_SCALE)
    return "formula" if is_whole and is_capped else ""


def _in_training(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> torch.Tensor | None:
    """What `route.attention` makes of such a call if it takes PyTorch's fused kernel, else None."""
    if is_short(query, key, value, None, 0.0) or overlaps(query) or (is_causal and not all_finite(key, value)):
        return None
    if not _is_fused_with_gradients(query, key, value, None, 0.0, is_causal, scale, False):
        return None
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    return ordered_as(query, apply_at_once(Fused, query, key, value, None, is_causal, scale))


def _is_flat(x: torch.Tensor) -> bool:
    """Whether x (B, H, S, E) is (B * H, S, E) too without a copy, of rows that BLAS reads as they are."""
    batch, head, row, column = x.stride()
    return column == 1 and row >= x.shape[3] and (batch == x.shape[1] * head or x.shape[0] == 1)


def _fits(x: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> bool:
    """Whether x is a plain tensor of one of the dtypes that has as many dimensions as `shape` and expands to it."""
    if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided or x.dtype not in dtypes:
        return False
    return x.shape == shape or (x.ndim == len(shape) and _broadcast_to(x.shape, shape))


def _by_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor | None:
    """`composed_attention` without gradients; None where a number is NaN or infinite, or a query sees no key."""
    (batch, heads, _, size), (_, own, n_keys, _) = query.shape, key.shape
    scale = size**-0.5 if scale is None else scale
    rows = batch * own, heads // own  # heads that share keys are the rows of one product
    q, k, v = query.view(*rows, size), key.view(rows[0], n_keys, size), value.view(rows[0], n_keys, size)
    scores = torch.baddbmm(q.new_empty((1, 1, 1)), q, k.mT, beta=0, alpha=scale / (softcap or 1.0))
    if not _is_finite(scores):
        return None
    if softcap is not None:
        scores.tanh_().mul_(softcap)
    if attn_mask is not None:
        of_heads = scores.view(batch, heads, 1, n_keys)
        if attn_mask.dtype == torch.bool:
            of_heads.masked_fill_(~attn_mask, -math.inf)
        else:
            of_heads.add_(attn_mask)
    if sinks is not None:
        of_rows = sinks.view(own, rows[1], 1)
        scores = torch.cat((scores, of_rows if batch == 1 else of_rows.repeat(batch, 1, 1)), -1)
    weights = scores.softmax(-1)
    output = torch.bmm(weights if sinks is None else weights[..., :n_keys], v)
    output.resize_(query.shape)  # not a view of the product, which could not be changed in place with a gradient
    return output if _is_finite(output) else None


def _is_finite(x: torch.Tensor) -> bool:
    """`all_finite` of a tensor with numbers and without a gradient."""
    return math.isfinite(x.sum().item())
