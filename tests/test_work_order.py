"""In which order programs take heads and tiles: each once, as many heads in turn as share the cache."""

from __future__ import annotations

import functools

import pytest
import torch

import kernels
from kernels.attention.call import Call
from tests.conformance.judge import judge, make

triton = pytest.importorskip("triton")
tl = triton.language

from kernels.attention.arguments import heads_in_turn  # noqa: E402
from kernels.attention.pieces import find_work  # noqa: E402

attention = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
CAUSAL = Call(right=0)


@triton.jit
def list_work_kernel(head_ptr, tile_ptr, n_tiles, section):
    head, tile = find_work(tl.program_id(0), tl.num_programs(0) // n_tiles, n_tiles, section)
    tl.store(head_ptr + tl.program_id(0), head)
    tl.store(tile_ptr + tl.program_id(0), tile)


def list_work(n_heads: int, n_tiles: int, section: int, device: str) -> list[tuple[int, int]]:
    """Head and tile of every program."""
    heads, tiles = (torch.full((n_heads * n_tiles,), -1, dtype=torch.int32, device=device) for _ in range(2))
    list_work_kernel[(n_heads * n_tiles,)](heads, tiles, n_tiles, section)
    return list(zip(heads.tolist(), tiles.tolist()))


@pytest.mark.parametrize(("n_heads", "n_tiles", "section"), [(1, 1, 1), (5, 3, 2), (4, 1, 4), (3, 4, 1), (2, 3, 99)])
def test_every_tile_of_every_head_once(n_heads: int, n_tiles: int, section: int, device: str) -> None:
    found = list_work(n_heads, n_tiles, section, device)
    assert sorted(found) == [(head, tile) for head in range(n_heads) for tile in range(n_tiles)]


def test_heads_of_a_section_take_turns(device: str) -> None:
    expected = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert list_work(3, 3, 2, device) == expected


def test_no_product_overflows_32_bits(device: str) -> None:
    assert list_work(2, 4, 1 << 30, device) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]


def test_heads_in_turn_are_those_whose_keys_fit_half_the_cache() -> None:
    cpu = torch.device("cpu")
    assert heads_in_turn(1, 5 << 20, CAUSAL, cpu) == 5  # of 25 MiB
    assert heads_in_turn(4, 5 << 20, CAUSAL, cpu) == 20
    assert heads_in_turn(4, 26 << 20, CAUSAL, cpu) == 4
    assert heads_in_turn(4, 0, CAUSAL, cpu) > 1_000_000
    for same_length in Call(), Call(left=5, right=0):
        assert heads_in_turn(4, 5 << 20, same_length, cpu) == 4


@pytest.mark.parametrize("sizes", [(2, 6, 3, 150, 140, 16, 16), (1, 3, 1, 140, 70, 260, 8)], ids=["narrow", "wide"])
def test_any_order_gives_the_same(
    sizes: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    for module in ("general", "general_backward"):
        monkeypatch.setattr(f"kernels.attention.{module}.heads_in_turn", lambda *_: 2)
    judge(attention, make(sizes, device=device, is_causal=True))
