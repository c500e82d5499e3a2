"""What attention refuses, and how it says so: one line with the rule, what was found and what to do."""

from __future__ import annotations

import itertools
import sys

import torch

from kernels.backend import HALF, as_number, autocasts, check_tensor_types, shown

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
INTEGERS = (int, torch.SymInt)
LARGEST_SCALE = 1e38  # times log2(e) it is still a float32
ALIGNMENTS = ("top_left", "bottom_right")

__all__ = ["as_flag", "check", "check_options", "leads_of"]


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """Raise TypeError or ValueError in one line, with the rule, what was found and the remedy."""
    check_tensor_types({"query": query, "key": key, "value": value})
    dtype = query.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"query must be float16, bfloat16, float32 or float64, found {dtype}; convert it with .to()")
    _check_tensors(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, value, enable_gqa)
    dropout_p, scale = as_number(dropout_p), as_number(scale)
    if not isinstance(dropout_p, NUMBERS) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is a probability from 0 to 1, found {shown(dropout_p)}")
    if scale is not None and not (isinstance(scale, NUMBERS) and abs(scale) < LARGEST_SCALE):
        raise ValueError(f"scale must be a number that float32 holds, or None for 1 / sqrt(E), found {shown(scale)}")


def as_flag(name: str, x: object) -> bool:
    """x as True or False.

    Raises:
        TypeError: it is neither, nor a number.
    """
    if x is True or x is False:
        return x
    flag = as_number(x)
    if not isinstance(flag, (bool, int)):
        raise TypeError(f"{name} must be True or False, found {shown(x)}; pass one of them")
    return bool(flag)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    """Dtypes, devices and shapes of the three."""
    dtype, device, shape = query.dtype, query.device, query.shape
    if not torch.compiler.is_compiling() and (  # there lengths may be symbols, of which this would ask too much
        key.shape == shape
        and value.shape == shape
        and key.dtype == dtype
        and value.dtype == dtype
        and key.device == device
        and value.device == device
        and len(shape) > 2
        and shape[-1]
    ):
        return  # most calls: it saves them a dozen questions
    if not (key.dtype == value.dtype == dtype) and not autocasts(device):
        raise TypeError(
            f"query, key and value must share a dtype, found {dtype}, {key.dtype} and {value.dtype}; convert with .to()"
        )
    if not (key.device == value.device == device):
        raise ValueError(
            f"query, key and value must be on one device, found {device}, {key.device} and {value.device}; "
            f"move them with .to()"
        )
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError(
            f"query, key and value must have at least two dimensions, (..., L, E); {_shapes(query, key, value)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must have the same last dimension E; {_shapes(query, key, value)}; project one of them"
        )
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"the last dimensions E and Ev must be at least 1; {_shapes(query, key, value)}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key and value must have the same length S (next to last dimension); {_shapes(query, key, value)}"
        )
    _check_leading(query, key, value, enable_gqa)


def _shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """What messages say of them."""
    return f"found query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def leads_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> list[torch.Size]:
    """The dimensions before the last two of query, key and value, broadcast; with `enable_gqa` all but the heads."""
    leads = [query.shape[:-2], key.shape[:-2], value.shape[:-2]]
    if leads[0] == leads[1] == leads[2]:
        return leads
    if not enable_gqa:
        return [torch.broadcast_shapes(*leads)] * 3
    batch = leads[0][:-1]
    if not batch == leads[1][:-1] == leads[2][:-1]:  # a question that takes longer than all others of a call
        batch = torch.broadcast_shapes(*(lead[:-1] for lead in leads))
    return [batch + lead[-1:] for lead in leads]


def _check_leading(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    """The dimensions before the last two."""
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and (not enable_gqa or query.ndim > 2):
        return
    if not enable_gqa:
        if not _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2]):
            hint = "; for fewer key than query heads pass enable_gqa=True" if query.ndim > 2 else ""
            raise ValueError(
                f"the leading dimensions of query, key and value must broadcast; {_shapes(query, key, value)}{hint}"
            )
        return
    if min(query.ndim, key.ndim, value.ndim) < 3:
        raise ValueError(f"enable_gqa=True needs a dimension of heads, (..., H, L, E); {_shapes(query, key, value)}")
    heads = key.shape[-3]
    if value.shape[-3] != heads or heads == 0 or query.shape[-3] % heads:
        raise ValueError(
            f"with enable_gqa=True query heads must be a multiple of key and value heads; {_shapes(query, key, value)}"
        )
    before = query.shape[:-3], key.shape[:-3], value.shape[:-3]
    if not before[0] == before[1] == before[2] and not _broadcast(*before):
        raise ValueError(
            f"the dimensions before the heads of query, key and value must broadcast; {_shapes(query, key, value)}"
        )


def _check_mask(
    attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> None:
    """The mask's type, dtype, device and shape."""
    check_tensor_types({"attn_mask": attn_mask})
    dtypes = (torch.bool, torch.float32, query.dtype, *(HALF if autocasts(query.device) else ()))
    if attn_mask.dtype not in dtypes:
        raise TypeError(
            f"attn_mask must be bool (True = may attend), float32 or of the query's dtype {query.dtype}, "
            f"found {attn_mask.dtype}; convert it with .bool() or .to(query.dtype)"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, found {attn_mask.device}")
    target = (*leads_of(query, key, value, enable_gqa)[0], query.shape[-2], key.shape[-2])
    if attn_mask.ndim > len(target) or not _broadcast_to(attn_mask.shape, target):
        raise ValueError(
            f"attn_mask must broadcast to (..., Hq, L, S) = {target}, found {tuple(attn_mask.shape)}; "
            f"a mask of keys (B, S) becomes one by mask[:, None, None, :]"
        )


def _broadcast(*shapes: torch.Size) -> bool:
    """Whether the shapes broadcast."""
    columns = itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return all(a == 1 or b == 1 or a == b for sizes in columns for a, b in itertools.combinations(sizes, 2))


def check_options(
    query: torch.Tensor,
    lead: torch.Size,
    n_keys: int,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    deterministic: bool | None = None,
) -> None:
    """Raise TypeError or ValueError for an argument that PyTorch's attention does not have. lead: (..., Hq)."""
    if not isinstance(causal_alignment, str) or causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be 'top_left' or 'bottom_right', found {shown(causal_alignment)}")
    if window is not None:
        sides = tuple(map(as_number, window)) if isinstance(window, (tuple, list)) else ()
        if len(sides) != 2 or not all(x is None or (_is_integer(x) and 0 <= x <= sys.maxsize) for x in sides):
            raise ValueError(
                f"window must be (left, right), each the number of keys seen on that side, from 0 to {sys.maxsize}, or "
                f"None for all, found {shown(window)}"
            )
    softcap, deterministic = as_number(softcap), as_number(deterministic)
    if softcap is not None and not (isinstance(softcap, NUMBERS) and 0.0 < softcap < LARGEST_SCALE):
        raise ValueError(f"softcap must be a positive number, or None for no cap, found {shown(softcap)}")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise ValueError(f"deterministic must be True, False or None, found {shown(deterministic)}")
    if alibi_slopes is None and sinks is None and key_lengths is None:
        return
    heads, batch = lead[-1:] or torch.Size([1]), lead[:-1]
    for name, x, shape, example in (
        ("alibi_slopes", alibi_slopes, (*batch, *heads), "(Hq,)"),
        ("sinks", sinks, tuple(heads), "(Hq,)"),
        ("key_lengths", key_lengths, tuple(batch), "(B,)"),
    ):
        if x is None:
            continue
        check_tensor_types({name: x})
        whole = name == "key_lengths"
        if whole != (x.dtype in (torch.int32, torch.int64)) or (not whole and not x.is_floating_point()):
            kind = "int32 or int64" if whole else "floating point"
            raise TypeError(f"{name} must be {kind}, found {x.dtype}; convert it with .to()")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, found {x.device}; use .to()")
        fits = x.ndim <= len(shape) and _broadcast_to(x.shape, shape)
        if not fits or (name == "sinks" and tuple(x.shape) != shape):
            raise ValueError(f"{name} must have the shape {shape}, as in {example}, found {tuple(x.shape)}")
    if key_lengths is not None and query.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_lengths(key_lengths, n_keys)


def _check_lengths(key_lengths: torch.Tensor, n_keys: int) -> None:
    """The values, which only a CPU can be asked for at no cost; elsewhere they are clamped."""
    try:
        found = [] if key_lengths.numel() == 0 else [int(x) for x in key_lengths.aminmax()]
    except RuntimeError:  # no value to look at: vmap, fake tensors
        return
    if found and not 0 <= found[0] <= found[1] <= n_keys:
        raise ValueError(f"key_lengths must be from 0 to the {n_keys} keys there are, found {found[0]} to {found[1]}")


def _is_integer(x: object) -> bool:
    return isinstance(x, INTEGERS) and not isinstance(x, bool)


def _broadcast_to(shape: torch.Size, target: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape, with no more dimensions, expands to `target`."""
    return all(size == 1 or size == full for size, full in zip(shape, target[len(target) - len(shape) :]))
