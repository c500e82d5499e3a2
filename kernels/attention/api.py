"""The public attention: checks, choice of backend, and the call."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from kernels.attention import eager
from kernels.attention.ops import Attention
from kernels.attention.tiles import MAX_HEAD_SIZE
from kernels.backend import Choice, autocasts, choose

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
LARGEST_SCALE = 1e38  # times log2(e) it is still a float32

__all__ = ["Explanation", "explain", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend: mix the values by how well each query fits each key.

        output = dropout(softmax(scale * query key^T + attn_mask)) value

    Takes the place of `torch.nn.functional.scaled_dot_product_attention`: the positional arguments are the same. No
    L x S matrix is stored, forward or backward. A query that may attend to no key gets output 0 and sends back gradient
    0. NaN and Inf in keys and values that a query may not attend to never reach it; one that it may attend to makes its
    whole output row NaN under a mask. Dropout draws from torch's generator, so `torch.manual_seed` repeats it.

    Args:
        query: (..., Hq, L, E), float16, bfloat16, float32, or float64 on the CPU; any strides. Also (L, E), (N, L, E).
        key: (..., Hkv, S, E), dtype and device of the query.
        value: (..., Hkv, S, Ev). Leading dimensions of the three broadcast.
        attn_mask: broadcastable to (..., Hq, L, S). bool: True = may attend. Floating point: added to the scores
            (natural units; -inf forbids), and differentiable. With `is_causal` both apply.
        dropout_p: probability, 0 to 1, of dropping each weight; the others are divided by 1 - dropout_p.
        is_causal: query i may attend to keys 0 to i only (counted from the top left when L != S).
        scale: factor of the scores; None for 1 / sqrt(E).
        enable_gqa: query heads share key and value heads, Hq / Hkv of them each (grouped-query attention).
        backend: "triton" for this package's kernels, "torch" for PyTorch's own, "auto" for the former where they can
            run; `kernels.explain` tells which.

    Returns:
        (..., Hq, L, Ev), dtype of the query (under autocast: of autocast), heads and rows ordered in memory as its are.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices, dropout_p or backend do not fit, or backend="triton" cannot run.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1; online softmax and backward as in Dao 2023,
    "FlashAttention-2", section 3.1; shared heads: Ainslie et al. 2023, "GQA", section 2.2.
    """
    _check(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    if _choose(query, value, backend).backend == "torch":
        return eager.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if autocasts(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    lead, q, k, v, mask = _four_dimensional(query, key, value, attn_mask, enable_gqa)
    if torch.compiler.is_compiling():  # Dynamo refuses an autograd.Function that is given one tensor twice
        k, v = k.view_as(k), v.view_as(v)
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0.0 else None
    output = Attention.apply(q, k, v, mask, seed, float(dropout_p), is_causal, float(scale))[0]
    return output if query.ndim == 4 else output.reshape(*lead, *output.shape[-2:])


class Explanation(NamedTuple):
    """Which kernel runs a call, and why not the other ones."""

    kernel: str
    why_not: dict[str, str]  # kernel: reason

    def __str__(self) -> str:
        """One line a kernel."""
        return "\n".join([f"runs on {self.kernel}", *(f"not on {k}: {reason}" for k, reason in self.why_not.items())])


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> Explanation:
    """Say which kernel `scaled_dot_product_attention` would run for these arguments, and why not each faster one.

    Runs nothing. Arguments and errors as there.
    """
    _check(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    choice = _choose(query, value, backend)
    if choice.backend == "triton":
        return Explanation("triton general", {})
    return Explanation("torch scaled_dot_product_attention", {"triton general": choice.reason})


def _choose(query: torch.Tensor, value: torch.Tensor, backend: str) -> Choice:
    """The backend for a checked call."""
    head_size = max(query.shape[-1], value.shape[-1])
    unsupported = ""
    if head_size > MAX_HEAD_SIZE:
        unsupported = f"heads wider than {MAX_HEAD_SIZE} are not covered yet, found {head_size}"
    dtype = query.dtype
    if autocasts(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
    return choose(backend, query.device, dtype, unsupported)


def _four_dimensional(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool,
) -> tuple[torch.Size, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The lead (..., Hq); views (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev); mask (B or 1, Hq or 1, L or 1, S or 1).

    Copies only where more than two leading dimensions cannot be merged by strides.
    """
    leads = _leads(query, key, value, enable_gqa)
    lead = leads[0]
    q, k, v = (
        _merge_batch(x if x.shape[:-2] == to else x.expand(*to, *x.shape[-2:]))
        for x, to in zip((query, key, value), leads)
    )
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (len(lead) + 2 - attn_mask.ndim) + tuple(attn_mask.shape))
        if attn_mask.ndim > 4 and any(size != 1 for size in attn_mask.shape[:-3]):
            attn_mask = attn_mask.expand(*lead[:-1], *attn_mask.shape[-3:])
        attn_mask = _merge_batch(attn_mask)
    return lead, q, k, v, attn_mask


def _leads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> list[torch.Size]:
    """The dimensions before the last two of query, key and value, broadcast; with `enable_gqa` all but the heads."""
    leads = [query.shape[:-2], key.shape[:-2], value.shape[:-2]]
    if leads[0] == leads[1] == leads[2]:
        return leads
    if not enable_gqa:
        return [torch.broadcast_shapes(*leads)] * 3
    batch = torch.broadcast_shapes(*(lead[:-1] for lead in leads))
    return [batch + lead[-1:] for lead in leads]


def _merge_batch(x: torch.Tensor) -> torch.Tensor:
    """View x (..., H, L, E) as (B, H, L, E); a (L, E) has one head, an (N, L, E) has N."""
    if x.ndim == 4:
        return x
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """Raise TypeError or ValueError in one line, with the rule, what was found and the remedy."""
    dtype, device = query.dtype, query.device
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"query must be float16, bfloat16, float32 or float64, found {dtype}; convert it with .to()")
    if not (key.dtype == value.dtype == dtype) and not autocasts(device):
        raise TypeError(
            f"query, key and value must share a dtype, found {dtype}, {key.dtype} and {value.dtype}; convert with .to()"
        )
    if not (key.device == value.device == device):
        raise ValueError(
            f"query, key and value must be on one device, found {device}, {key.device} and {value.device}; "
            f"move them with .to()"
        )
    shapes = f"found query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not 2 <= query.ndim == key.ndim == value.ndim:
        raise ValueError(f"query, key and value must have the same number of dimensions, at least 2; {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same last dimension E; {shapes}; project one of them")
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"the last dimensions E and Ev must be at least 1; {shapes}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must have the same length S (next to last dimension); {shapes}")
    _check_leading(query, key, value, enable_gqa, shapes)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, value, enable_gqa)
    if not isinstance(dropout_p, NUMBERS) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is a probability from 0 to 1, found {dropout_p!r}")
    if scale is not None and not (isinstance(scale, NUMBERS) and abs(scale) < LARGEST_SCALE):
        raise ValueError(f"scale must be a number that float32 holds, or None for 1 / sqrt(E), found {scale!r}")


def _check_leading(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool, shapes: str) -> None:
    """The dimensions before the last two."""
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and (not enable_gqa or query.ndim > 2):
        return
    if not enable_gqa:
        if not _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2]):
            hint = "; for fewer key than query heads pass enable_gqa=True" if query.ndim > 2 else ""
            raise ValueError(f"the leading dimensions of query, key and value must broadcast; {shapes}{hint}")
        return
    if query.ndim < 3:
        raise ValueError(f"enable_gqa=True needs a dimension of heads, (..., H, L, E); {shapes}")
    heads = key.shape[-3]
    if value.shape[-3] != heads or heads == 0 or query.shape[-3] % heads:
        raise ValueError(f"with enable_gqa=True query heads must be a multiple of key and value heads; {shapes}")
    if not _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3]):
        raise ValueError(f"the dimensions before the heads of query, key and value must broadcast; {shapes}")


def _check_mask(
    attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> None:
    """The mask's dtype, device and shape."""
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in (torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask must be bool (True = may attend), float32 or of the query's dtype {query.dtype}, "
            f"found {attn_mask.dtype}; convert it with .bool() or .to(query.dtype)"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, found {attn_mask.device}")
    target = (*_leads(query, key, value, enable_gqa)[0], query.shape[-2], key.shape[-2])
    fits = attn_mask.ndim <= len(target) and all(
        size == 1 or size == full for size, full in zip(reversed(attn_mask.shape), reversed(target))
    )
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to (..., Hq, L, S) = {target}, found {tuple(attn_mask.shape)}; "
            f"a mask of keys (B, S) becomes one by mask[:, None, None, :]"
        )


def _broadcast(*shapes: torch.Size) -> bool:
    """Whether the shapes, equally long, broadcast."""
    return all(a == 1 or b == 1 or a == b for sizes in zip(*shapes) for a, b in itertools.combinations(sizes, 2))
