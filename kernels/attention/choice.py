"""Which of the Triton kernels runs a call: a pure function of shapes, dtypes, rules and what is asked for."""

from __future__ import annotations

import os

import torch

from kernels.attention.measured import HOPPER
from kernels.attention.rules import Extras, Rules
from kernels.attention.tiles import MAX_SHORT_HEAD_SIZE, max_short

__all__ = ["is_wide", "needs_statistics", "why_not_hopper", "why_not_short"]

HOPPER_QUERIES = 128  # fewer leave one of its two warp groups without work
HOPPER_HEAD_SIZES = {"forward": (64, 128, 256), "backward": (64, 128)}


def hopper_calls(asked: str | None) -> frozenset[tuple[str, int]]:
    """Directions and head sizes that the Gluon kernels take.

    Args:
        asked: the environment variable KERNELS_HOPPER. None: those that a GPU has shown to be right and faster
            (measured.py); 0: none; 1: all; else some by name: "forward64 backward128".
    """
    if asked is None:
        return frozenset(HOPPER)
    names = {f"{name}{size}": (name, size) for name, sizes in HOPPER_HEAD_SIZES.items() for size in sizes}
    wanted = list(names) if asked == "1" else [] if asked == "0" else asked.split()
    for name in wanted:
        if name not in names:
            raise ValueError(f"KERNELS_HOPPER must be 0, 1 or some of {' '.join(names)}, by spaces, found {name!r}")
    return frozenset(names[name] for name in wanted)


HOPPER_ASKED_FOR = hopper_calls(os.environ.get("KERNELS_HOPPER"))


def is_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether offsets inside a tile (at most 128 by 256) could pass 2^31 with the strides of these tensors' rows."""
    return any(max(x.stride()[-2:]) >= 1 << 22 for x in tensors if x is not None)


def needs_statistics(extras: Extras, return_lse: bool, mask_learns: bool) -> str:
    """What needs the rows' maximum and sum to be kept; empty where nothing does."""
    if return_lse:
        return "the log-sum-exp"
    if extras.sinks is not None:
        return "a sink"
    if mask_learns:
        return "the gradient of a mask"
    return ""


def why_not_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras, statistics: str, capability: int
) -> str:  # fmt: skip
    """The reason the kernels for short sequences do not take a call that Triton runs; empty where they do.

    Args:
        query, key, value: (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev).
        statistics: what needs the rows' statistics, which they do not keep (`needs_statistics`).
        capability: compute capability of the device times ten.
    """
    if extras.query_starts is not None:
        return "they take no packed sequences"
    if statistics:  # before the sizes are looked at, which may be symbols
        return f"{statistics} needs statistics of the rows, which they do not keep"
    if 0 in (*query.shape, *key.shape, *value.shape):
        return "there is nothing to attend to"
    head_size = max(query.shape[3], value.shape[3])
    if head_size > MAX_SHORT_HEAD_SIZE:
        return f"they take heads of up to {MAX_SHORT_HEAD_SIZE}, found {head_size}"
    lengths, longest = (query.shape[2], key.shape[2]), max_short(head_size, query.element_size(), capability)
    if max(lengths) > longest:
        numbers = "float32 numbers" if query.dtype == torch.float32 else "16-bit numbers"
        what = f"{longest} queries and keys of {head_size} {numbers}"
        return f"they take up to {what} here, found {lengths[0]} and {lengths[1]}"
    if is_wide(query, key, value, extras.attn_mask):
        return "rows stand too far apart in memory for their offsets"
    return ""


def takes_tma(x: torch.Tensor) -> bool:
    """Whether TMA can copy boxes of a tensor of four dimensions and 16-bit numbers: rows at multiples of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()) if size > 1]
    return x.stride(3) == 1 and all(step and step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0


def why_not_hopper(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras, rules: Rules, capability: int,
    is_backward: bool = False,
) -> str:  # fmt: skip
    """The reason a Gluon kernel for Hopper chips does not take a call; empty where it does.

    Args:
        query, key, value: as for `why_not_short`.
        capability: compute capability of the device times ten.
    """
    e, ev = query.shape[3], value.shape[3]
    direction = "backward" if is_backward else "forward"
    head_sizes = HOPPER_HEAD_SIZES[direction]
    if capability != 90:
        return f"it is for compute capability 9.0, found {capability / 10}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, found {str(query.dtype).removeprefix('torch.')}"
    if e != ev or e not in head_sizes:
        return f"it takes heads of {', '.join(map(str, head_sizes))}, values as wide as keys, found {e} and {ev}"
    if query.shape[2] < HOPPER_QUERIES or 0 in (*query.shape, *key.shape):
        return f"it takes {HOPPER_QUERIES} queries or more, found {query.shape[2]}"
    for name in "attn_mask", "alibi_slopes", "sinks", "query_starts":
        if getattr(extras, name) is not None:
            return f"it knows no {name}"
    if rules.dropout_p:
        return "it has no dropout"
    if rules.scale <= 0.0:
        return f"it takes a scale above 0, found {rules.scale}"
    if is_backward and rules.deterministic:
        return "in which order it adds up the gradient of the query is not settled"
    if (direction, e) not in HOPPER_ASKED_FOR:
        return "no GPU has shown that it is right and faster here: the environment variable KERNELS_HOPPER=1 lets it"
    for name, x in ("query", query), ("key", key), ("value", value):
        if not takes_tma(x):
            return f"TMA wants rows at multiples of 16 bytes, found {name} with strides {tuple(x.stride())}"
    return ""
