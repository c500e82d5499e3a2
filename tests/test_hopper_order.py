"""The Gluon kernels for Hopper chips on tests/gluon_emulator.py, changed, watched, and in many orders of events."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention.call import Call
from tests.conformance.judge import compare, make

pytest.importorskip("triton")

from tests.gluon_emulator import Chip, Deadlock, Product, Shared, emulate  # noqa: E402


def launch_both(
    emulated: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    asked: Call,
    forward: bool = True,
    backward: bool = True,
) -> list[torch.Tensor]:
    """Output, dQ, dK and dV by both launchers, or one of the two; the backward alone is given what is right."""
    output, (row_max, row_sum) = torch.full_like(q, math.nan), torch.full((2, *q.shape[:3]), math.nan)
    launcher = emulated if forward else emulate(0)
    launcher.launch_hopper_forward(q, k, v, asked, output, row_max, row_sum)
    if not backward:
        return [output]
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    delta = (grad.float() * output.float()).sum(-1)
    pivot = torch.where(row_sum == 0, math.inf, (row_max + row_sum.log()) / math.log(2))
    total = torch.zeros(q.shape)
    statistics = torch.stack([pivot, delta, delta])
    emulated.launch_hopper_backward(grad, q, k, v, asked, statistics, total, *gradients)
    return [output, *gradients]


class Launch(NamedTuple):
    """A call of both launchers. Sizes are B, H, Hkv, L, S, D; broken: a value and a key of NaN that some may see."""

    sizes: tuple[int, int, int, int, int, int]
    asked: Call
    lengths: tuple[int, ...] = ()
    broken: bool = False

    def run(self, emulated: Any, forward: bool = True, backward: bool = True) -> list[torch.Tensor]:
        """What `launch_both` gives."""
        b, heads, kv_heads, n_queries, n_keys, d = self.sizes
        generator = torch.Generator().manual_seed(0)
        shapes = [(b, n_queries, heads, d)] * 2 + [(b, n_keys, kv_heads, d)] * 2
        q, grad, k, v = (torch.randn(s, generator=generator).bfloat16().transpose(1, 2) for s in shapes)
        if self.broken:
            v[:, :, n_keys // 2] = math.nan
            k[:, :, n_keys // 2 + 20] = math.nan
        asked = self.asked._replace(key_lengths=torch.tensor(self.lengths) if self.lengths else None)
        return launch_both(emulated, q, k, v, grad, asked, forward, backward)


def agree(found: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether NaN is at the same places, and the numbers are the same but for the rounding of sums."""
    numbers = [(a.float().nan_to_num(), b.float().nan_to_num()) for a, b in zip(found, right)]
    in_place = all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, right))
    return in_place and all((a - b).norm() <= 0.01 * b.norm() for a, b in numbers)


# What they compute


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(st.data())
def test_any_combination_means_what_its_parts_mean(data: st.DataObject) -> None:
    """Both launchers, in any order of events, against the formula."""

    def some(name: str, *values: Any) -> Any:
        return data.draw(st.sampled_from(values), name)

    lengths = 1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 256, 300, 390
    b, kv_heads, n_queries, n_keys = some("b", 1, 2), some("hkv", 1, 2), some("l", *lengths), some("s", *lengths)
    shape = (b, kv_heads * some("group", 1, 3), kv_heads, n_queries, n_keys)
    window = some("window", (None, None), (0, 0), (100, None), (None, 70), (64, 63), (1000, 1000))
    is_causal, bottom_right, softcap = some("causal", False, True), some("bottom", False, True), some("cap", None, 0.7)
    used = some("used", None, *([some("n", 0, 1, n_keys // 2, n_keys) for _ in range(b)] for _ in range(2)))
    key_lengths = None if used is None else torch.tensor(used)
    right = 0 if is_causal and window[1] is None else min(0, window[1]) if is_causal else window[1]
    asked = Call(
        key_lengths=key_lengths,
        scale=1 / math.sqrt(d := some("d", 64, 128)),
        bottom_right=bottom_right,
        left=window[0],
        right=right,
        softcap=softcap,
    )
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    call = make(
        (*shape, d, d),
        torch.bfloat16,
        is_causal=is_causal,
        causal_alignment="bottom_right" if bottom_right else "top_left",
        window=window,
        softcap=softcap,
        key_lengths=key_lengths,
    )
    ours = launch_both(emulate(some("order", 1, 2, 3)), *call.inputs, call.grad, asked)
    names = "output", "gradient of query", "gradient of key", "gradient of value"
    for one in compare(dict(zip(names, ours, strict=True)), call):
        one.judge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_only_cut_tiles_with_something_not_finite_are_rewritten(
    d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tiles of keys, both are cut for the first 128 queries, and only the second one for the others."""
    rewritten, spoiled, lines = [], [], 1024 // d  # lines that are rewritten at a time
    store, finish = Shared.store, Product.finish
    monkeypatch.setattr(
        Shared, "store", lambda self, x: (rewritten.extend([x] * (x.shape == (lines, d))), store(self, x))
    )
    monkeypatch.setattr(
        Product, "finish", lambda self: (spoiled.extend([self] * (not self.b.memory.isfinite().all())), finish(self))
    )
    q, k, v = (torch.randn(1, 1, 256, d, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    v[0, 0, 3, 1] = torch.finfo(dtype).max

    def run(x: torch.Tensor, row: int, column: int, number: float) -> torch.Tensor:
        rewritten.clear()
        spoiled.clear()
        right, x[0, 0, row, column] = x[0, 0, row, column].item(), number
        output = launch_both(emulate(row), q, k, v, q, Call(scale=0.1, right=0), x is v, x is k)[0]
        x[0, 0, row, column] = right
        return output

    clean = run(v, 0, 0, v[0, 0, 0, 0].item())
    assert not rewritten and not spoiled and clean.isfinite().all()
    for row, column, number in ((10, 0, math.nan), (127, d - 1, math.inf), (128, 5, -math.inf), (255, 6, math.nan)):
        output = run(v, row, column, number)
        assert torch.equal(output[:, :, :row], clean[:, :, :row])
        assert not output[:, :, row:, column].isfinite().any()
        assert len(rewritten) == 128 // lines
        assert len(spoiled) == (2 if row < 128 else 0)  # both consumers get the tile that is whole as it is
    run(k, 0, 0, 1.0)
    assert not rewritten
    run(k, 200, 9, math.inf)
    assert len(rewritten) == 128 // lines


WRONG = {
    "scale": ("    factor = before\n", "    factor = before * 1.02\n"),
    "one key too many on the right": ("place[:, None] + call.right)", "place[:, None] + call.right + 1)"),
    "one key too few on the left": ("place[:, None] - call.left)", "place[:, None] - call.left + 1)"),
    "open tiles begin too early": ("gl.minimum(gl.maximum(open_first, first), open_last)", "first"),
    "sum not shrunk": ("row_sum * shrink + gl.sum", "row_sum + gl.sum"),
    "the wrong statistic": ("gl.load(delta_ptr + row", "gl.load(lse_ptr + row"),
    "statistics in base 2": ("row_max * 0.6931471805599453", "row_max"),
    "dV with the queries": ("left_operand), grad, dv", "left_operand), q, dv"),
    "half of dQ at the place of the other": ("tile * ROWS, INDEX * COLUMNS)", "tile * ROWS, (1 - INDEX) * COLUMNS)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found_out(name: str) -> None:
    old, new = WRONG[name]
    changed = 0

    def change(source: str) -> str:
        nonlocal changed
        changed += source.count(old)
        return source.replace(old, new)

    launch = Launch((1, 2, 1, 200, 400, 128), Call(scale=0.1, left=120, right=30))
    found = launch.run(emulate(0, change))
    assert changed == 1 and not agree(found, launch.run(emulate(0)))


# In what order things may happen


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
def test_every_order_gives_the_same(d: int) -> None:
    """One to nine tiles, several pieces of work to a program, whole and cut."""
    for n in (1, 2, 4, 6, 9) if d == 64 else (1, 3, 5, 7, 8):
        asked = Call(scale=0.1, right=0, left=None if n % 2 else 200) if n % 3 else Call(scale=0.1)
        launch = Launch((1, 3, 1, 192 if d == 64 else 130, 128 * n - 5, d), asked)
        right = launch.run(emulate(0))
        assert not right[0].isnan().any()
        for seed in range(1, 3):
            assert agree(launch.run(emulate(seed)), right)


def test_keys_and_values_go_ahead_of_the_next_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is free long before that of the queries, from which the output of the work before is sent."""
    copied: list[str] = []
    load_tile = Chip.load_tile
    q, k, v = (torch.zeros(1, 4, n, 128, dtype=torch.bfloat16) for n in (128, 384, 384))
    names = {q.data_ptr(): "Q", k.data_ptr(): "K", v.data_ptr(): "V"}

    def record(self: Chip, desc: Any, *args: Any) -> None:
        copied.append(names[desc.x.data_ptr()])
        load_tile(self, desc, *args)

    monkeypatch.setattr(Chip, "load_tile", record)
    launch_both(emulate(0), q, k, v, q, Call(scale=0.1), backward=False)
    assert "".join(copied) == 2 * ("KQQVKVKVKVKQQVKV")  # two programs, two heads each


ORDER = re.compile(
    r"( +)((?:mbarrier\.(?:wait|arrive)|named_barrier|warp_group_barrier|fence_async_shared|tma\.store_wait)\(.*)"
)
LAUNCHES = [
    Launch((1, 3, 1, 130, 600, 128), Call(scale=0.1)),
    Launch((2, 3, 1, 192, 300, 64), Call(scale=0.1, right=0), (300, 100)),
    Launch((1, 3, 3, 300, 300, 128), Call(scale=0.1, left=70, right=60)),
    Launch((1, 3, 1, 192, 300, 64), Call(scale=0.1, right=0), broken=True),
]


def file(name: str) -> Path:
    return Path(kernels.__file__).parent / "attention" / f"hopper_{name}.py"


def steps_that_keep_order() -> Iterator[Any]:
    """The lines of the kernels that wait for others, tell them something, or keep what is stored in order."""
    for name in "forward", "backward", "pieces":
        for number, line in enumerate(file(name).read_text().splitlines()):
            if match := ORDER.fullmatch(line):
                yield pytest.param(name, number, id=f"{name}-{number + 1}-{match[2].split('  #')[0]}")


@functools.cache
def right_results(launch: Launch, backward: bool) -> list[torch.Tensor]:
    return launch.run(emulate(0), backward=backward)


@pytest.mark.long
@pytest.mark.parametrize(("name", "number"), list(steps_that_keep_order()))
def test_each_wait_and_arrival_is_needed(name: str, number: int) -> None:
    whole = file(name).read_text()

    def without(source: str) -> str:
        lines = source.splitlines()
        if source == whole:
            lines[number] = ORDER.sub(r"\1pass", lines[number])
        return "\n".join(lines)

    def is_broken(launch: Launch, seed: int) -> bool:
        right = right_results(launch, name != "forward")
        try:
            found = launch.run(emulate(seed, without), name != "backward", name != "forward")
        except (Deadlock, AssertionError):
            return True
        return not agree(found, right)

    assert any(is_broken(launch, seed) for seed in range(8) for launch in LAUNCHES)
