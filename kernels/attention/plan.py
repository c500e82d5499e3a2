"""Which of the Triton kernels runs a call, with which tiles, and why each faster one does not: one place for that."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from kernels import launch
from kernels.attention import measured
from kernels.attention.call import Call
from kernels.attention.layout import is_wide
from kernels.attention.tiles import (
    MAX_SHORT_HEAD_SIZE,
    ShortTile,
    Tile,
    choose_short_tile,
    choose_tile,
    max_short,
    what_is_asked,
)
from kernels.launch import LAYOUTS

__all__ = ["HOPPER_HEAD_SIZES", "KERNELS", "Plan", "forced", "plan"]

KERNELS = ("short", "hopper", "general")  # the fastest first
HOPPER_QUERIES = 128  # fewer leave one of its two warp groups without work
HOPPER_HEAD_SIZES = {"forward": (64, 128, 256), "backward": (64, 128)}
HOPPER_KNOWS = {"key_lengths", "scale", "softcap", "left", "right", "bottom_right", "deterministic"}  # of a call
UNKNOWN_TO_HOPPER = [(i, name) for i, name in enumerate(Call._fields) if name not in HOPPER_KNOWS]


class Plan(NamedTuple):
    """What runs a call.

    kernel: one of KERNELS, or of a backward that is never to be short, of the last two. why_not: reasons, for each
    kernel before it. The others are what `tile` asks about.
    """

    kernel: str
    why_not: dict[str, str]
    query: torch.Tensor
    value: torch.Tensor
    call: Call
    n_keys: int
    capability: int

    def tile(self, name: str) -> Any:
        """The tile of one of the kernel's launches, a `Tile`, or `ShortTile` for short sequences.

        Args:
            name: "forward", "backward" (short sequences), "query" (dQ), "key_value" (dK and dV), "mask" (its gradient).
        """
        if _forced.tile is not None and isinstance(_forced.tile, ShortTile) == (self.kernel == "short"):
            return _forced.tile
        q, head_size = self.query, max(self.query.shape[-1], self.value.shape[-1])
        if self.kernel == "short":
            return choose_short_tile(name, max(q.shape[2], self.n_keys), head_size, q.element_size())
        n_queries = q.shape[2] if self.call.max_queries is None else self.call.max_queries
        return choose_tile(name, head_size, q.element_size(), n_queries, self.capability, what_is_asked(self.call))


class Forced(NamedTuple):
    """What `forced` decides; None: nothing."""

    kernel: str | None = None
    tile: Tile | ShortTile | None = None
    capability: int | None = None


_forced = Forced()


def forces() -> Forced:
    """What is forced at the moment."""
    return _forced


@contextlib.contextmanager
def forced(
    kernel: str | None = None, tile: Tile | ShortTile | None = None, capability: int | None = None
) -> Iterator[None]:
    """Within it calls run as tests, tuning and benchmarks want it; what is None, or was forced before, stays.

    Args:
        kernel: one of KERNELS, which need not have been shown to be faster. A call that it cannot take raises a
            ValueError. Empty for that which would run.
        tile: of every launch of kernels that have such tiles.
        capability: of the device, times ten, for what is chosen by it.
    """
    global _forced
    before = _forced
    wanted = {"kernel": kernel, "tile": tile, "capability": capability}
    _forced = before._replace(**{name: x for name, x in wanted.items() if x is not None})  # type: ignore[arg-type]
    try:
        yield
    finally:
        _forced = before


def plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    direction: str = "forward",
    statistics: str = "",
    among: tuple[str, ...] = KERNELS,
) -> Plan:
    """What runs a call that Triton takes.

    Args:
        query, key, value: (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev).
        direction: "forward" or "backward".
        statistics: who needs the rows' maximum and sum to be kept, or, backward, kept them; empty for nobody.
        among: kernels to choose from. A caller that asks only for shapes leaves "hopper" out, which looks at memory.
    """
    capability = _forced.capability or launch.capability(query.device)
    why_not: dict[str, str] = {}
    for name in among[:-1]:
        if direction == "backward" and not statistics:  # only the kernel for short sequences can go without
            reason = ""
        elif _forced.kernel and _forced.kernel != name:
            reason = f"the {_forced.kernel} kernel was asked for"
        elif name == "short":
            reason = why_not_short(query, key, value, call, statistics, capability)
        else:
            reason = why_not_hopper(query, key, value, call, capability, direction)
        if not reason:
            return Plan(name, why_not, query, value, call, key.shape[2], capability)
        if name == _forced.kernel:
            raise ValueError(f"the {name} kernel was asked for and cannot run: {reason}")
        why_not[name] = reason
    return Plan("general", why_not, query, value, call, key.shape[2], capability)


@functools.cache
def hopper_calls(asked: str) -> frozenset[tuple[str, int]]:
    """Directions and head sizes that the environment variable KERNELS_HOPPER asks of the Gluon kernels.

    Args:
        asked: 0 for none; 1 for all; else some by name: "forward64 backward128".
    """
    names = {f"{name}{size}": (name, size) for name, sizes in HOPPER_HEAD_SIZES.items() for size in sizes}
    wanted = list(names) if asked == "1" else [] if asked == "0" else asked.split()
    for name in wanted:
        if name not in names:
            raise ValueError(f"KERNELS_HOPPER must be 0, 1 or some of {' '.join(names)}, by spaces, found {name!r}")
    return frozenset(names[name] for name in wanted)


def needs_statistics(call: Call, return_lse: bool, mask_learns: bool) -> str:
    """What needs the rows' maximum and sum to be kept; empty where nothing does."""
    if return_lse:
        return "the log-sum-exp"
    if call.sinks is not None:
        return "a sink"
    if mask_learns:
        return "the gradient of a mask"
    return ""


def why_not_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, statistics: str, capability: int
) -> str:
    """The reason the kernels for short sequences do not take a call that Triton runs; empty where they do.

    Args:
        query, key, value: as for `plan`.
        statistics: what needs the rows' statistics, which they do not keep (`needs_statistics`).
        capability: compute capability of the device times ten.
    """
    if call.query_starts is not None:
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
        return _too_long(longest, head_size, query.dtype, *lengths)
    if is_wide(query, key, value, call.attn_mask):
        return "rows stand too far apart in memory for their offsets"
    return ""


@functools.lru_cache(LAYOUTS)
def _too_long(longest: int, head_size: int, dtype: torch.dtype, n_queries: int, n_keys: int) -> str:
    """A reason for most calls, and so made once."""
    numbers = "float32 numbers" if dtype == torch.float32 else "16-bit numbers"
    what = f"{longest} queries and keys of {head_size} {numbers}"
    return f"they take up to {what} here, found {n_queries} and {n_keys}"


def takes_tma(x: torch.Tensor) -> bool:
    """Whether TMA can copy boxes of a tensor of four dimensions and 16-bit numbers: rows at multiples of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()) if size > 1]
    return x.stride(3) == 1 and all(step and step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0


def why_not_hopper(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, capability: int, direction: str = "forward"
) -> str:
    """The reason a Gluon kernel for Hopper chips does not take a call; empty where it does.

    Args:
        query, key, value, direction: as for `plan`.
        capability: compute capability of the device times ten.
    """
    e, ev = query.shape[3], value.shape[3]
    head_sizes = HOPPER_HEAD_SIZES[direction]
    if capability != 90:
        return f"it is for compute capability 9.0, found {capability / 10}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, found {str(query.dtype).removeprefix('torch.')}"
    if e != ev or e not in head_sizes:
        return f"it takes heads of {', '.join(map(str, head_sizes))}, values as wide as keys, found {e} and {ev}"
    if query.shape[2] < HOPPER_QUERIES or 0 in (*query.shape, *key.shape):
        return f"it takes {HOPPER_QUERIES} queries or more, found {query.shape[2]}"
    for i, unknown in UNKNOWN_TO_HOPPER:
        if isinstance(call[i], torch.Tensor) or call[i]:
            return f"it knows no {unknown}"
    if call.scale <= 0.0:
        return f"it takes a scale above 0, found {call.scale}"
    if direction == "backward" and call.deterministic:
        return "in which order it adds up the gradient of the query is not settled"
    asked = os.environ.get("KERNELS_HOPPER")
    may_run = measured.HOPPER if asked is None else hopper_calls(asked)
    if (direction, e) not in may_run and _forced.kernel != "hopper":
        return "no GPU has shown that it is right and faster here: the environment variable KERNELS_HOPPER=1 lets it"
    for name, x in ("query", query), ("key", key), ("value", value):
        if not takes_tma(x):
            return f"TMA wants rows at multiples of 16 bytes, found {name} with strides {tuple(x.stride())}"
    return ""
