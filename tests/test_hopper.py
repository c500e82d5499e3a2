"""The Gluon kernels for Hopper chips: which calls they take, what they compile to, what they compute, in what order.

Gluon has no interpreter: without such a chip the kernels run in tests/gluon_emulator.py.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention import choice
from kernels.attention.rules import Extras, Rules
from kernels.attention.tiles import choose_consumers
from tests.attention_problem import check, problem
from tests.test_attention_features import call, formula

pytest.importorskip("triton")

from tests.gluon_emulator import Deadlock, Product, Shared, emulate  # noqa: E402

attention = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ON_GPU = (
    pytest.mark.gpu, pytest.mark.timeout(60), pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU"),
)  # fmt: skip


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with KERNELS_HOPPER=1."""
    monkeypatch.setattr(choice, "HOPPER_ASKED_FOR", choice.hopper_calls("1"))


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", id="gpu", marks=ON_GPU)])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, asked_for: None) -> str:
    """The device on which these kernels run: emulated, or a chip, where a test that hangs is ended."""
    if request.param == "cpu":
        emulated = emulate(seed=1)
        monkeypatch.setattr("kernels.attention.ops.capability", lambda _: 90)
        for name in "forward", "backward":
            launcher = getattr(emulated, f"launch_hopper_{name}")
            monkeypatch.setattr(f"kernels.attention.hopper_{name}.launch_hopper_{name}", launcher)
    return request.param


@pytest.fixture
def hopper_only(hopper: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """And no call may quietly go to the kernels for any shape."""
    for module in "general", "general_backward":
        monkeypatch.setattr(f"kernels.attention.{module}.choose_tile", lambda *_: pytest.fail("the general kernel ran"))
    return hopper


def shaped(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


# Which calls they take


def why(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras = Extras(), chip: int = 90, **rules: Any
) -> str:  # fmt: skip
    return choice.why_not_hopper(q, k, v, extras, Rules(1.0, **rules), chip)


@pytest.mark.usefixtures("asked_for")
def test_which_calls_it_takes() -> None:
    q, k = shaped((2, 8, 256, 64)), shaped((2, 2, 300, 64))
    assert why(q, k, k) == ""
    assert why(q, k, k, left=5, right=0, bottom_right=True, softcap=2.0) == ""
    assert why(q, k, k, Extras(key_lengths=torch.zeros(2, dtype=torch.int32))) == ""
    assert "compute capability 9.0, found 10.0" in why(q, k, k, chip=100)
    assert "found float32" in why(q.float(), k.float(), k.float())
    assert "found 96 and 96" in why(*(shaped((2, 2, 256, 96)) for _ in range(3)))
    assert "found 64 and 128" in why(q, k, shaped((2, 2, 300, 128)))
    assert "128 queries or more, found 100" in why(q[:, :, :100], k, k)
    assert "knows no sinks" in why(q, k, k, Extras(sinks=torch.zeros(1, 8)))
    assert "knows no attn_mask" in why(q, k, k, Extras(attn_mask=torch.zeros(1, 1, 1, 1)))
    assert "no dropout" in why(q, k, k, dropout_p=0.5)
    assert "TMA wants" in why(q, k[:1].expand(2, 2, 300, 64), k)
    assert "TMA wants" in why(q.mT.contiguous().mT, k, k)
    assert "found query" in why(torch.empty(2 * 8 * 256 * 64 + 1, dtype=q.dtype)[1:].view(q.shape), k, k)


def test_it_must_be_asked_for_where_no_gpu_has_shown_it_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    q = shaped((1, 1, 256, 64))
    monkeypatch.setattr(choice, "HOPPER_ASKED_FOR", choice.hopper_calls("0"))
    assert "KERNELS_HOPPER=1" in why(q, q, q)
    monkeypatch.setattr(choice, "HOPPER_ASKED_FOR", choice.hopper_calls("backward64 forward128"))
    assert "KERNELS_HOPPER=1" in why(q, q, q)
    assert choice.why_not_hopper(q, q, q, Extras(), Rules(1.0), 90, is_backward=True) == ""
    assert why(*(shaped((1, 1, 256, 128)) for _ in range(3))) == ""


def test_what_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "HOPPER", {("forward", 256): "a file"})
    assert choice.hopper_calls(None) == {("forward", 256)} and choice.hopper_calls("0") == frozenset()
    assert len(choice.hopper_calls("1")) == 5 and choice.hopper_calls("forward64") == {("forward", 64)}
    with pytest.raises(ValueError, match="must be 0, 1 or some of forward64 .* found 'backward256'"):
        choice.hopper_calls("forward64 backward256")


def test_three_consumers_where_rows_are_narrow_and_tiles_well_filled() -> None:
    lengths = (128, 192, 193, 300, 384, 1024, 2048, 5000)
    assert [choose_consumers(64, n) for n in lengths] == [2, 3, 2, 2, 3, 2, 3, 3]
    assert {choose_consumers(d, n) for d in (128, 256) for n in lengths} == {2}


# What they compile to


@pytest.mark.slow
def test_it_compiles_without_spills_and_leaves_a_product_in_flight() -> None:
    command = [sys.executable, "-m", "bench.compile_check", "--arch", "90", "--only", "hopper causal", "--jobs", "1"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "hopper_" in line]
    assert done.returncode == 0 and len(lines) == 5 and "0 do not" in done.stdout, done.stdout + done.stderr
    assert all("wgmma" in line for line in lines)


# What they compute


def launch_both(
    emulated: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, extras: Extras, rules: Rules,
    forward: bool = True, backward: bool = True,
) -> list[torch.Tensor]:  # fmt: skip
    """Output, dQ, dK and dV by both launchers, or one of the two; the backward alone is given what is right."""
    output, (row_max, row_sum) = torch.full_like(q, math.nan), torch.full((2, *q.shape[:3]), math.nan)
    launcher = emulated if forward else emulate(0)
    launcher.launch_hopper_forward(q, k, v, extras, rules, output, row_max, row_sum)
    if not backward:
        return [output]
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    delta = (grad.float() * output.float()).sum(-1)
    emulated.launch_hopper_backward(grad, q, k, v, extras, rules, row_max, row_sum, delta, *gradients)
    return [output, *gradients]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("dtype", "sizes"), [
    (torch.bfloat16, (1, 1, 1, 128, 128, 128, 128)), (torch.float16, (2, 4, 2, 300, 500, 64, 64)),
    (torch.float16, (1, 2, 1, 1000, 77, 128, 128)), (torch.bfloat16, (1, 1, 1, 257, 385, 256, 256)),
    (torch.bfloat16, (3, 5, 5, 129, 1, 64, 64)), (torch.bfloat16, (1, 2, 1, 192, 1, 64, 64)),
    (torch.bfloat16, (1, 4, 2, 1100, 500, 64, 64)), (torch.bfloat16, (2, 4, 2, 300, 500, 128, 128)),
], ids=str)  # fmt: skip
def test_output_and_gradients(sizes: tuple[int, ...], is_causal: bool, dtype: torch.dtype, hopper: str) -> None:
    check(problem(sizes, dtype, hopper, is_causal=is_causal), attention)


@pytest.mark.parametrize("sizes", [(2, 70, 10, 1024, 1024, 128, 128), (2, 70, 10, 1100, 1100, 64, 64)], ids=str)
@pytest.mark.parametrize("hopper", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_more_tiles_than_programs(sizes: tuple[int, ...], hopper: str) -> None:
    check(problem(sizes, torch.bfloat16, hopper, is_causal=True), attention)


FEATURES: dict[str, dict[str, Any]] = {
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"}, "softcap": {"softcap": 1.5},
    "window": {"window": (150, 0)}, "two-sided window": {"window": (37, 90)}, "narrow window": {"window": (0, 0)},
    "lengths": {"key_lengths": torch.tensor([0, 411, 128])},
    "all": {"is_causal": True, "causal_alignment": "bottom_right", "window": (200, 0), "softcap": 3.0,
            "key_lengths": torch.tensor([500, 130, 1])},
}  # fmt: skip


@pytest.mark.parametrize("d", choice.HOPPER_HEAD_SIZES["forward"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str, d: int, hopper_only: str) -> None:
    options = {name: x.to(hopper_only) if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()}
    arguments = call((3, 4, 2, 380, 500, d, d), torch.bfloat16, hopper_only)
    result = attention(**arguments, **options, enable_gqa=True, return_lse=True)
    output, lse, _ = formula(**{name: x.double() for name, x in arguments.items()}, **options)
    torch.testing.assert_close(result.output.double(), output, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_with_each_feature(feature: str, d: int, hopper_only: str) -> None:
    options = {name: x.to(hopper_only) if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()}
    arguments = call((3, 4, 2, 200, 500, d, d), torch.bfloat16, hopper_only)
    found = []
    for solve, dtype in ((attention, torch.bfloat16), (lambda **x: formula(**x)[0], torch.float64)):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in arguments.items()}
        gqa = {"enable_gqa": True} if solve is attention else {}
        output = solve(**leaves, **options, **gqa)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        found.append(torch.autograd.grad(output, list(leaves.values()), upstream))
    for ours, right in zip(*found):
        torch.testing.assert_close(ours.double(), right, rtol=4e-2, atol=4e-2)


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
    is_causal, bottom_right, softcap = some("causal", False, True), some("bottom", False, True), some("cap", 0.0, 0.7)
    used = some("used", None, *([some("n", 0, 1, n_keys // 2, n_keys) for _ in range(b)] for _ in range(2)))
    key_lengths = None if used is None else torch.tensor(used)
    right = 0 if is_causal and window[1] is None else min(0, window[1]) if is_causal else window[1]
    rules = Rules(1 / math.sqrt(d := some("d", 64, 128)), bottom_right=bottom_right, left=window[0], right=right,
                  softcap=softcap)  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    arguments = call((*shape, d, d), torch.bfloat16, "cpu")
    upstream = torch.randn(b, n_queries, shape[1], d).bfloat16().transpose(1, 2)
    emulated, extras = emulate(some("order", 1, 2, 3)), Extras(key_lengths=key_lengths)
    ours = launch_both(emulated, *arguments.values(), upstream, extras, rules)
    exact = [x.detach().double().requires_grad_() for x in arguments.values()]
    output, _, _ = formula(
        *exact, is_causal=is_causal, causal_alignment="bottom_right" if bottom_right else "top_left", window=window,
        softcap=softcap or None, key_lengths=key_lengths,
    )  # fmt: skip
    for found, right_one in zip(ours, (output, *torch.autograd.grad(output, exact, upstream.double()))):
        scale = right_one.abs().max().item() + 1e-3
        torch.testing.assert_close(found.double(), right_one.detach(), rtol=2e-2, atol=1e-2 * scale)


def test_nan_stays_where_it_may_be_seen(hopper_only: str) -> None:
    arguments = call((2, 2, 2, 512, 512, 128, 128), torch.bfloat16, hopper_only)
    lengths = torch.tensor([512, 300], device=hopper_only)
    clean = attention(**arguments, is_causal=True, key_lengths=lengths)
    for name in "key", "value":
        arguments[name] = arguments[name].clone()
        arguments[name][1, :, 300:] = math.nan
        arguments[name][0, :, 400] = math.inf
    found = attention(**arguments, is_causal=True, key_lengths=lengths)
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, :, :400], clean[0, :, :400])
    assert found[0, :, 400:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_only_cut_tiles_with_something_not_finite_are_rewritten(
    d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
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
        output = launch_both(emulate(row), q, k, v, q, Extras(), Rules(0.1, right=0), x is v, x is k)[0]
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


@pytest.mark.parametrize("hopper", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_repeated_runs_agree_bit_for_bit(hopper_only: str) -> None:
    arguments = call((4, 16, 16, 1500, 1500, 128, 128), torch.bfloat16, hopper_only)
    first = attention(**arguments, is_causal=True)
    assert all(torch.equal(attention(**arguments, is_causal=True), first) for _ in range(20))


WRONG = {
    "scale": ("scores = scores * scale\n", "scores = scores * scale * 1.02\n"),
    "one key too many on the right": ("place[:, None] + right)", "place[:, None] + right + 1)"),
    "one key too few on the left": ("place[:, None] - left)", "place[:, None] - left + 1)"),
    "open tiles begin too early": ("gl.minimum(gl.maximum(open_first, first), open_last)", "first"),
    "sum not shrunk": ("row_sum * shrink + gl.sum", "row_sum + gl.sum"),
    "the wrong statistic": ("gl.load(delta_ptr + row", "gl.load(lse_ptr + row"),
    "log-sum-exp in natural units": ("row_max + gl.log2(row_sum)", "row_max + gl.log2(row_sum) / 1.4427"),
    "dQ does not begin at zero": ("gl.zeros([ROWS * D], gl.float32", "gl.full([ROWS * D], 0.1, gl.float32"),
    "dV with the queries": ("left_operand), grad, dv", "left_operand), q, dv"),
    "half of dQ at the place of the other": ("tile * ROWS, INDEX * COLUMNS)", "tile * ROWS, (1 - INDEX) * COLUMNS)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found_out(name: str) -> None:
    old, new = WRONG[name]
    changed = 0

    def change(source: str) -> str:
        nonlocal changed
        changed += source.count(old)
        return source.replace(old, new)

    launch = Launch((1, 2, 1, 200, 400, 128), Rules(0.1, left=120, right=30))
    found = launch.run(emulate(0, change))
    assert changed == 1 and not agree(found, launch.run(emulate(0)))


# In what order things may happen


class Launch(NamedTuple):
    """A call of both launchers. Sizes are B, H, Hkv, L, S, D; broken: a value and a key of NaN that some may see."""

    sizes: tuple[int, int, int, int, int, int]
    rules: Rules
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
        extras = Extras(key_lengths=torch.tensor(self.lengths) if self.lengths else None)
        return launch_both(emulated, q, k, v, grad, extras, self.rules, forward, backward)


def agree(found: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether NaN is at the same places, and the numbers are the same but for the rounding of sums."""
    numbers = [(a.float().nan_to_num(), b.float().nan_to_num()) for a, b in zip(found, right)]
    in_place = all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, right))
    return in_place and all((a - b).norm() <= 0.01 * b.norm() for a, b in numbers)


@pytest.mark.parametrize("d", [64, 128])
def test_every_order_gives_the_same(d: int) -> None:
    """One to nine tiles, several pieces of work to a program, whole and cut."""
    for n in range(1, 10):
        rules = Rules(0.1, right=0, left=None if n % 2 else 200) if n % 3 else Rules(0.1)
        launch = Launch((1, 3, 1, 192 if d == 64 else 130, 128 * n - 5, d), rules)
        right = launch.run(emulate(0))
        assert not right[0].isnan().any()
        for seed in range(1, 3):
            assert agree(launch.run(emulate(seed)), right)


ORDER = re.compile(
    r"( +)((?:mbarrier\.(?:wait|arrive)|named_barrier|warp_group_barrier|fence_async_shared|tma\.store_wait)\(.*)"
)
LAUNCHES = [
    Launch((1, 3, 1, 130, 600, 128), Rules(0.1)), Launch((2, 3, 1, 192, 300, 64), Rules(0.1, right=0), (300, 100)),
    Launch((1, 3, 3, 300, 300, 128), Rules(0.1, left=70, right=60)),
    Launch((1, 3, 1, 192, 300, 64), Rules(0.1, right=0), broken=True),
]  # fmt: skip


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
