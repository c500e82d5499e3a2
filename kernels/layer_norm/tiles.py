"""Tile sizes of the norm kernels: pure functions of kernel, width of a row, dtype and what is asked.

They depend on the row alone, never on how many rows there are, so that a row's result is the same in every batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

from kernels.launch import LAYOUTS

FORWARD_BYTES = 4096  # of input a program of 4 warps reads at once: 2 loads of 16 bytes a thread
FORWARD_ROW_BYTES = 65536  # longest row held in registers, 64 bytes a thread of 32 warps
FORWARD_CHUNK_BYTES = 8192  # of a longer row read at once by 16 warps: one load of 16 bytes a thread
BACKWARD_ELEMENTS = 1024  # of each input a program of 4 warps holds: 8 a thread, 4 arrays of which stay in registers
BACKWARD_ROW = 8192  # longest row whose sums stay in registers beside it, half of it where these are crowded
BACKWARD_CHUNK = 4096  # columns of a longer row read at once by 8 warps
SMALLEST_BLOCK = 4  # columns: those of one draw of random numbers
WARPS_PER_MULTIPROCESSOR = 16  # half of what 64 registers a thread let be resident: fewer partial sums to add


class Tile(NamedTuple):
    """Rows and columns a program works on at a time, and how it is launched.

    chunked: a row has more columns than a tile and is walked in chunks.
    """

    rows: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    chunked: bool = False


# Of the kernels whose tile is the same for every row: sums of columns where they are a pass of their own; of the
# partial sums of programs (rows: programs).
FIXED = {"columns": Tile(8, 128, 4, 3), "reduce": Tile(64, 16, 4)}
_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(**tiles: Tile) -> Iterator[None]:
    """Within it the kernels named take these tiles, in tests, tuning and benchmarks."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def choose_tile(kernel: str, n_cols: int, element_size: int = 4, crowded: bool = False) -> Tile:
    """Tile of a kernel.

    Args:
        kernel: "forward", "backward", "columns" or "reduce".
        n_cols: N.
        element_size: bytes of an input element.
        crowded: dropout's random numbers, or undoing weight and bias, take registers of the backward too.
    """
    return _forced.get(kernel) or FIXED.get(kernel) or _choose(kernel, n_cols, element_size, crowded)


@functools.lru_cache(LAYOUTS)
def _choose(kernel: str, n_cols: int, element_size: int, crowded: bool) -> Tile:
    """The tile of the kernels that walk rows."""
    block_n = max(1 << (n_cols - 1).bit_length(), SMALLEST_BLOCK)
    if kernel == "forward":
        row_bytes = block_n * element_size
        if row_bytes > FORWARD_ROW_BYTES:
            return Tile(1, FORWARD_CHUNK_BYTES // element_size, 16, chunked=True)
        return Tile(max(1, FORWARD_BYTES // row_bytes), block_n, min(max(row_bytes // 1024, 4), 32))
    # The addresses of odd rows, which load one by one, take registers as well.
    if n_cols > (BACKWARD_ROW // 2 if n_cols % 2 or crowded else BACKWARD_ROW):
        return Tile(1, BACKWARD_CHUNK, 8, chunked=True)
    # With 16 warps on a multiprocessor the loads of one stage are 16 KiB of two-byte or 32 KiB of four-byte elements.
    # To reach 4.3 TB/s over 132 multiprocessors at a latency of 800 ns, an estimate, 26 KB must be under way on each,
    # so the former prefetch two tiles and the latter one.
    num_stages = 3 if element_size == 2 else 2
    return Tile(max(1, BACKWARD_ELEMENTS // block_n), block_n, min(max(block_n // 256, 4), 16), num_stages)


def n_programs(n_tiles: int, n_column_blocks: int, num_warps: int, n_multiprocessors: int) -> int:
    """Programs that share `n_tiles` row tiles of each of `n_column_blocks`: what the chip holds at once, at most."""
    resident = n_multiprocessors * WARPS_PER_MULTIPROCESSOR // num_warps
    return min(n_tiles, max(1, resident // n_column_blocks))
