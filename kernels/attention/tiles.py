"""Tile sizes of the attention kernels: pure functions of kernel, head sizes, dtype, lengths, what is asked, and chip.

The tables were found by compiling candidates and reading the machine code (`python -m bench.loop_cost`): the tile whose
steady loop is predicted to be the fastest and spills nothing; a few bytes may be spilled outside of it. Where a GPU has
found a faster one, measured.py has it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from kernels.attention.call import Call
from kernels.attention.measured import SHORT_TILES, TILES
from kernels.launch import LAYOUTS

MAX_HEAD_SIZE = 2048  # largest E or Ev
MAX_BLOCK = 256  # largest E or Ev that one tile holds; wider heads are worked on in chunks
CHUNK_COLS = 128  # columns of a wide head that a program makes
LOOP_COLS = 64  # columns of a wide head that it multiplies at a time
SWIZZLED = 64  # columns of 16 bits from which on all tiles are laid out alike in shared memory
MAX_SHORT = 64  # queries and keys of the kernels for short sequences
MAX_SHORT_HEAD_SIZE = 128
FEW_ROWS = 32  # up to this many queries a small query tile wastes less than the large one


class Tile(NamedTuple):
    """Rows of queries and of keys a program works on at a time, and how it is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# What a call asks of a kernel, by the registers it takes: nothing; a causal mask; a window, a mask, a soft cap or
# slopes; dropout; more than one of mask, soft cap, slopes and dropout.
ASKED = ("plain", "causal", "mask", "dropout", "every")


def what_is_asked(call: Call) -> str:
    """The one of ASKED that stands for a call."""
    dear = sum(x is not None for x in (call.attn_mask, call.softcap, call.alibi_slopes, call.seed))
    if dear > 1:
        return "every"
    if call.seed is not None:
        return "dropout"
    return "mask" if dear or call.left is not None else "plain" if call.right is None else "causal"


def _tiles(*tiles: tuple[int, int, int, int]) -> dict[str, Tile]:
    """The tiles for ASKED; the last one given stands for the rest, too."""
    return {asked: Tile(*tiles[min(i, len(tiles) - 1)]) for i, asked in enumerate(ASKED)}


# What measured.py has for a key goes before what stands here. float32 has a table of its own, below.
# (kernel, chip): largest block of the head size -> tiles, for elements of 2 bytes. A chip without an entry takes that
# of the one before it.
_TABLES: dict[tuple[str, int], dict[int, dict[str, Tile]]] = {
    ("forward", 90): {
        64: _tiles((128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
        128: _tiles((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: _tiles((128, 64, 8, 2), (128, 32, 8, 2)),
    },
    ("query", 90): {
        64: _tiles((128, 64, 8, 2)),
        128: _tiles((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: _tiles((128, 32, 8, 1)),
    },
    ("key_value", 90): {
        64: _tiles((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
        128: _tiles((32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (16, 128, 8, 2)),
        256: _tiles((32, 32, 4, 1), (32, 32, 4, 1), (64, 32, 8, 1)),
    },
    ("mask", 90): {
        64: _tiles((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: _tiles((128, 32, 8, 1)),
    },
    ("forward", 80): {
        64: _tiles((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        128: _tiles((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2)),
        256: _tiles((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1)),
    },
    ("query", 80): {
        64: _tiles((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
        128: _tiles((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (128, 16, 8, 2)),
        256: _tiles((32, 32, 8, 1)),
    },
    ("key_value", 80): {
        64: _tiles((32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (16, 128, 8, 2)),
        128: _tiles((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 8, 2), (32, 32, 8, 2)),
        256: _tiles((16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1)),
    },
    ("mask", 80): {
        64: _tiles((128, 32, 8, 2)),
        128: _tiles((128, 32, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1), (128, 16, 8, 1)),
        256: _tiles((32, 32, 8, 1)),
    },
    ("forward", 100): {
        64: _tiles((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        128: _tiles((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: _tiles((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("query", 100): {
        64: _tiles((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        128: _tiles((128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        256: _tiles((128, 32, 8, 1), (128, 32, 8, 1), (64, 32, 8, 1)),
    },
    ("key_value", 100): {
        64: _tiles((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
        128: _tiles((32, 128, 8, 1), (32, 128, 8, 1), (16, 128, 8, 1)),
        256: _tiles((16, 64, 8, 1)),
    },
}
# float32 products run on the ordinary units unless TF32 is allowed, and need registers for both operands: one table.
_FLOAT32 = {64: _tiles((32, 32, 4, 2)), 128: _tiles((32, 32, 8, 2)), 256: _tiles((16, 16, 8, 1))}


def block_of(head_size: int) -> int:
    """The power of two, at least 16 (the least side of a matrix instruction), that holds `head_size`."""
    return max(16, 1 << (head_size - 1).bit_length())


@functools.lru_cache(LAYOUTS)
def whole_columns(e: int, ev: int) -> dict[str, int]:
    """The compile-time sizes of heads that are whole in a tile.

    The narrower of two blocks has SWIZZLED columns, or as many as the wider. Fewer are laid out otherwise in shared
    memory, where tiles of keys and values may take turns in one place, and of two layouts in one place ptxas 12.8, of
    Triton 3.6 and 3.7, makes wrong code for Hopper's matrix instructions (`reads_unset` in bench/compile_check.py).
    """
    least = min(SWIZZLED, block_of(max(e, ev)))
    return {"E": e, "EV": ev, "BLOCK_E": max(block_of(e), least), "BLOCK_EV": max(block_of(ev), least)}


@functools.lru_cache(LAYOUTS)
def column_blocks(e: int, ev: int) -> dict[str, int]:
    """The compile-time sizes of the head dimension: whole in a tile, or in chunks where E or Ev is too wide (LOOP)."""
    if max(e, ev) <= MAX_BLOCK:
        return {**whole_columns(e, ev), "LOOP": 0}
    return {"E": e, "EV": ev, "BLOCK_E": CHUNK_COLS, "BLOCK_EV": CHUNK_COLS, "LOOP": LOOP_COLS}


@functools.lru_cache(LAYOUTS)
def choose_tile(kernel: str, head_size: int, element_size: int, n_queries: int, capability: int, asked: str) -> Tile:
    """Tile of a kernel.

    Args:
        kernel: "forward", "query" (dQ), "key_value" (dK and dV) or "mask" (gradient of the mask).
        head_size: the larger of E and Ev, at most MAX_HEAD_SIZE.
        element_size: bytes of an input element, 2 or 4.
        n_queries: L.
        capability: compute capability times ten: 80, 90, 100 and so on.
        asked: what the call asks, one of ASKED. Heads in chunks always take the tiles for everything.
    """
    if capability >= 120:  # consumer Blackwell has the shared memory of 86 and 89, and their matrix instructions
        capability = 80
    chip = max(chip for name, chip in _TABLES if name == kernel and chip <= max(capability, 80))
    table = _FLOAT32 if element_size == 4 else _TABLES[kernel, chip]
    block = block_of(head_size)
    if head_size > MAX_BLOCK:
        block, asked = CHUNK_COLS, "every"
    tile = next(tiles for size, tiles in table.items() if size >= block)[asked]
    if element_size == 2 and (kernel, chip, block, asked) in TILES:
        tile = Tile(*TILES[kernel, chip, block, asked][0])
    if n_queries > FEW_ROWS:
        return tile
    # With 16 queries eight warps would make most scores twice; a tile of keys and their gradients keeps them.
    return tile._replace(block_q=16, num_warps=tile.num_warps if kernel == "key_value" else 4)


def choose_consumers(head_size: int, n_queries: int, is_causal: bool) -> int:
    """Warp groups of 64 queries in a program of the Hopper forward kernel.

    Three where their accumulators fit the registers, and tiles of 192 queries leave few of their rows empty, by
    themselves or because an edge cuts them; else two. (An H200 took a fifth less time with two where it was causal,
    a tenth less with three where it was not: bench/results/h200-2026-11-27-bccf14f1003d-second.jsonl.)
    """
    padded = (n_queries + 191) // 192 * 192
    return 3 if head_size == 64 and not is_causal and padded <= n_queries * 17 / 16 else 2


class ShortTile(NamedTuple):
    """Tiles that a program of the kernels for short sequences works on at a time, and sequences in each of them."""

    heads: int
    pack: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"HEADS": self.heads, "PACK": self.pack, "num_warps": self.num_warps, "num_stages": 1}


def max_short(head_size: int, element_size: int, capability: int) -> int:
    """Most queries and keys that fit the registers, by compiling, of the kernels for short sequences; see choose_tile.

    Scores of 64 by 64 leave little room for the rest: on chips of the Ampere family for the narrowest heads only.
    float32 products need registers for both operands.
    """
    is_ampere = capability < 90 or capability >= 120
    columns = block_of(head_size)
    if element_size == 4:
        return min(MAX_SHORT if capability == 90 else 32, 1024 // columns)
    return 32 if is_ampere and columns > 16 else MAX_SHORT


@functools.lru_cache(LAYOUTS)
def choose_short_tile(kernel: str, length: int, head_size: int, element_size: int) -> ShortTile:
    """Tile of a kernel for short sequences.

    Args:
        kernel: "forward" or "backward".
        length: the larger of L and S, 1 to MAX_SHORT.
        head_size: the larger of E and Ev, at most MAX_SHORT_HEAD_SIZE.
        element_size: bytes of an input element, 2 or 4.
    """
    rows, columns = block_of(length), block_of(head_size)
    if element_size == 2 and (kernel, length, columns) in SHORT_TILES:
        return ShortTile(*SHORT_TILES[kernel, length, columns][0])
    entries = (4096 if kernel == "forward" else 2048) // (1 if element_size == 2 else 4)
    heads = 1 if rows == 64 else max(1, min(128 // rows, entries // (rows * columns)))
    if kernel == "backward" and length == 2:  # of twice as many Triton 3.6 makes wrong code where heads are narrow
        heads = max(1, heads // 2)  # (spoils_a_pair in bench/compile_check.py)
    is_large = rows > 16 and rows * columns >= 1024 if element_size == 4 else rows == 64 and columns >= 64
    return ShortTile(heads, max(1, 16 // length), 8 if is_large else 4)
