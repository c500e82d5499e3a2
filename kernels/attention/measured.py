"""What GPUs have decided, each entry with the file of results it rests on (`python -m bench.gpu_first`).

What is not here goes by what compiling shows: the tables of tiles.py, and no Gluon kernel unless KERNELS_HOPPER asks.
"""

from __future__ import annotations

# The Gluon kernels for Hopper chips that were right and faster than the kernel for any shape, by direction and head
# size: ("forward", 128): "bench/results/....jsonl".
H200 = "bench/results/h200-2026-11-27-bccf14f1003d-second.jsonl"
HOPPER: dict[tuple[str, int], str] = {
    ("forward", 64): H200,
    ("forward", 128): H200,
    ("forward", 256): H200,
    ("backward", 64): H200,
    ("backward", 128): H200,
}

# Tiles that were faster than those of tiles.py, by kernel, chip, block of the head size and what is asked (ASKED):
# ("key_value", 90, 128, "causal"): ((32, 128, 8, 2), "bench/results/....jsonl"). For elements of 2 bytes.
TILES: dict[tuple[str, int, int, str], tuple[tuple[int, int, int, int], str]] = {}

# Tiles of the kernels for short sequences, by kernel, the larger of L and S, and block of the head size:
# ("backward", 9, 32): ((8, 1, 4), "bench/results/....jsonl"). For elements of 2 bytes.
SHORT_TILES: dict[tuple[str, int, int], tuple[tuple[int, int, int], str]] = {}
