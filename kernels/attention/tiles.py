"""Tile sizes of the attention kernels: pure functions of head sizes, dtype, lengths and chip."""

from __future__ import annotations

from typing import NamedTuple

MAX_HEAD_SIZE = 256  # largest E or Ev one tile holds
FEW_ROWS = 32  # up to this many queries a small query tile wastes less than the large one


class Tile(NamedTuple):
    """Rows of queries and of keys a program works on at a time, and how it is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def block_of(head_size: int) -> int:
    """The power of two, at least 16 (the least side of a matrix instruction), that holds `head_size`."""
    return max(16, 1 << (head_size - 1).bit_length())


def forward_tile(head_size: int, element_size: int, n_queries: int, capability: int) -> Tile:
    """Tile of the forward kernel.

    Args:
        head_size: the larger of E and Ev.
        element_size: bytes of an input element, 2 or 4.
        n_queries: L.
        capability: compute capability times ten, 80, 90 or 100 and on.
    """
    block = block_of(head_size)
    if element_size == 4:
        tile = {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 16, 4, 2)}
    elif capability >= 90:
        tile = {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 64, 4, 2)}
    else:
        tile = {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 32, 8, 3), 256: (64, 32, 4, 2)}
    return _shorten(Tile(*tile[block]), n_queries)


def backward_tile(head_size: int, element_size: int, n_queries: int, capability: int) -> Tile:
    """Tile of the backward kernels; arguments as for `forward_tile`."""
    block = block_of(head_size)
    if element_size == 4:
        tile = {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)}
    elif capability >= 90:
        tile = {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)}
    else:
        tile = {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)}
    return _shorten(Tile(*tile[block]), n_queries)


def _shorten(tile: Tile, n_queries: int) -> Tile:
    """The tile with fewer query rows when there are few queries."""
    return tile._replace(block_q=16, num_warps=4) if n_queries <= FEW_ROWS else tile
