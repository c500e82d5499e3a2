"""The search for tiles: which candidates there are, what is timed, and what is called wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import tune  # noqa: E402
from bench.rows import read_rows  # noqa: E402
from bench.tune import Search, Try  # noqa: E402
from kernels.attention import plan  # noqa: E402
from kernels.attention.call import Call  # noqa: E402
from kernels.attention.plan import forced  # noqa: E402
from kernels.attention.tiles import ShortTile, Tile  # noqa: E402

CPU = torch.device("cpu")
SHORT = Search("short backward", 16, 5)


def test_searches_are_found_by_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(set(map(str, tune.searches([])))) == len(tune.searches([])) == 3 * 3 * 3 + 2 * 5 * 3
    assert list(map(str, tune.searches(["query", "D64"]))) == ["query D64"]  # its name
    assert list(map(str, tune.searches(["D64", "query"]))) == ["query D64", "query D64 causal", "query D64 dropout"]
    assert tune.main(["short", "forward", "L9", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"short forward L9 D{size}" for size in (16, 32, 64)]
    found = tune.searches("D256 key_value or forward D64".split())  # alternatives, in their order
    assert list(map(str, found)) == ["key_value D256", "key_value D256 causal", "key_value D256 dropout", "forward D64"]
    with pytest.raises(SystemExit):
        tune.main(["sideways"])


@pytest.mark.parametrize("search", tune.searches([]), ids=str)
def test_the_table_is_a_candidate_and_each_once(search: Search) -> None:
    found = search.candidates(90)
    assert found[0] == search.own(90) and len(set(found)) == len(found) >= 20
    assert isinstance(found[0], ShortTile if search.is_short else Tile)


def test_candidates_are_timed_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, whose times mean nothing."""
    search = Search("short forward", 16, 9)
    monkeypatch.setattr(tune, "SHORT_BATCH", 2)
    others = [ShortTile(1, 1, 4), ShortTile(2, 1, 1), ShortTile(8, 16, 4)]  # sixteen sequences fit no tile
    tries = [Try(str(search), tile, False, 0, 0) for tile in others]
    timed = list(tune.time_candidates(search, [*tries, Try(str(search), search.own(90), True, 0, 0)], CPU))
    assert timed[0].is_own and [attempt.problem == "" for attempt in timed] == [True, True, True, False]
    assert all(set(attempt.seconds) == {"full", "causal"} for attempt in timed[:3])


def test_a_tile_that_gives_other_numbers_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(search: Search, device: str) -> object:
        return lambda call: [torch.full((3,), {4: 1.1, 16: math.nan}.get(plan._forced.tile.heads, 1.0))]

    monkeypatch.setattr(tune, "prepare", prepare)
    tries = [Try(str(SHORT), ShortTile(heads, 1, 4), heads == 2, 0, 0) for heads in (2, 4, 8, 16)]
    assert [attempt.problem for attempt in tune.time_candidates(SHORT, tries, CPU)] == ["", "wrong", "", "wrong"]


@pytest.mark.parametrize("search", [Search("forward", 64, 4096), Search("query", 64, 4096), SHORT], ids=str)
def test_a_forced_tile_is_the_one_that_is_launched(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention import general, general_backward, short_backward

    launched = []

    class Recorder:
        def __getitem__(self, grid: object) -> object:
            return lambda *_, **options: launched.append(options)

    monkeypatch.setattr(general, "forward_kernel", Recorder())
    monkeypatch.setattr(general_backward, "query_kernel", Recorder())
    monkeypatch.setattr(short_backward, "short_backward_kernel", Recorder())
    tile = search.candidates(90)[5]
    with forced(tile=tile):
        tune.prepare(search, "meta")(Call())
    assert len(launched) == 1 and tile.options().items() <= launched[0].items()


def test_the_best_come_first() -> None:
    def attempt(heads: int, microseconds: float, problem: str = "") -> Try:
        return Try("short", ShortTile(heads, 1, 4), heads == 1, 40, 0, problem, {"full": microseconds / 1e6})

    tries = [attempt(1, 9), attempt(2, 8), attempt(4, 1, "wrong"), attempt(8, 3), attempt(16, 5)]
    lines = list(tune.show(tries))
    assert [line.split()[1] for line in lines] == ["1x1x4", "8x1x4", "16x1x4", "2x1x4"]
    assert "table" in lines[0] and lines[1].endswith("full      3.0 us")


@pytest.mark.long
def test_without_a_gpu_it_compiles(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench.tune", "short", "forward", "L5", "D16", "--jobs", "1", "--arch", "90"]
    subprocess.run([*command, f"--rows={file}"], env={**os.environ, "TRITON_INTERPRET": "0"}, check=True, timeout=300)
    rows = read_rows(file)
    assert len(rows) == len(Search("short forward", 16, 5).candidates(90))
    assert all(row["registers"] > 0 or row["problem"] for row in rows) and rows[0]["is_own"]
