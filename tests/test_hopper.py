"""The Gluon kernels for Hopper chips: which calls they take, what they compute.

Gluon has no interpreter: without such a chip the kernels run in tests/gluon_emulator.py. What only runs there is in
test_hopper_order.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kernels
from kernels.attention import measured, plan
from kernels.attention.call import Call
from kernels.attention.plan import forced
from kernels.attention.tiles import choose_consumers
from tests.conformance.judge import judge, make

pytest.importorskip("triton")

from tests.gluon_emulator import emulate  # noqa: E402

attention = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
ON_GPU = (pytest.mark.gpu, pytest.mark.timeout(60), pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU"))


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With KERNELS_HOPPER=1."""
    monkeypatch.setenv("KERNELS_HOPPER", "1")


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", id="gpu", marks=ON_GPU)])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, asked_for: None) -> Iterator[str]:
    """The device on which these kernels run: emulated, or a chip, where a test that hangs is ended."""
    if request.param == "cpu":
        use(emulate(seed=1), monkeypatch)
    with forced(capability=90):
        yield request.param


def use(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let emulated launchers take the calls."""
    for name in "forward", "backward":
        launcher = getattr(emulated, f"launch_hopper_{name}")
        monkeypatch.setattr(f"kernels.attention.hopper_{name}.launch_hopper_{name}", launcher)


@pytest.fixture
def hopper_only(hopper: str) -> Iterator[str]:
    """And no call may quietly go to another kernel."""
    with forced(kernel="hopper"):
        yield hopper


def shaped(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


# Which calls they take


def why(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chip: int = 90, direction: str = "forward", **asked: Any
) -> str:
    return plan.why_not_hopper(q, k, v, Call(**asked), chip, direction)


@pytest.mark.usefixtures("asked_for")
def test_which_calls_it_takes() -> None:
    q, k = shaped((2, 8, 256, 64)), shaped((2, 2, 300, 64))
    assert why(q, k, k) == ""
    assert why(q, k, k, left=5, right=0, bottom_right=True, softcap=2.0) == ""
    assert why(q, k, k, key_lengths=torch.zeros(2, dtype=torch.int32)) == ""
    assert "compute capability 9.0, found 10.0" in why(q, k, k, chip=100)
    assert "found float32" in why(q.float(), k.float(), k.float())
    assert "found 96 and 96" in why(*(shaped((2, 2, 256, 96)) for _ in range(3)))
    assert "found 64 and 128" in why(q, k, shaped((2, 2, 300, 128)))
    assert "128 queries or more, found 100" in why(q[:, :, :100], k, k)
    assert "knows no sinks" in why(q, k, k, sinks=torch.zeros(1, 8))
    assert "knows no attn_mask" in why(q, k, k, attn_mask=torch.zeros(1, 1, 1, 1))
    assert "knows no dropout_p" in why(q, k, k, dropout_p=0.5)
    assert "TMA wants" in why(q, k[:1].expand(2, 2, 300, 64), k)
    assert "TMA wants" in why(q.mT.contiguous().mT, k, k)
    assert "found query" in why(torch.empty(2 * 8 * 256 * 64 + 1, dtype=q.dtype)[1:].view(q.shape), k, k)


def test_it_must_be_asked_for_where_no_gpu_has_shown_it_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    q = shaped((1, 1, 256, 64))
    monkeypatch.delenv("KERNELS_HOPPER", raising=False)
    monkeypatch.setattr(measured, "HOPPER", {})
    assert "KERNELS_HOPPER=1" in why(q, q, q)
    monkeypatch.setitem(measured.HOPPER, ("forward", 64), "a file")
    assert why(q, q, q) == ""
    monkeypatch.setenv("KERNELS_HOPPER", "0")  # asked at each call
    assert "KERNELS_HOPPER=1" in why(q, q, q)
    monkeypatch.setenv("KERNELS_HOPPER", "backward64 forward128")
    assert "KERNELS_HOPPER=1" in why(q, q, q)
    assert why(q, q, q, direction="backward") == ""
    assert why(*(shaped((1, 1, 256, 128)) for _ in range(3))) == ""


def test_what_may_be_asked_for() -> None:
    assert plan.hopper_calls("0") == frozenset()
    assert len(plan.hopper_calls("1")) == 5 and plan.hopper_calls("forward64") == {("forward", 64)}
    with pytest.raises(ValueError, match="must be 0, 1 or some of forward64 .* found 'backward256'"):
        plan.hopper_calls("forward64 backward256")


def test_three_consumers_where_rows_are_narrow_and_tiles_well_filled() -> None:
    lengths = (128, 192, 193, 300, 384, 1024, 2048, 5000)
    assert [choose_consumers(64, n, False) for n in lengths] == [2, 3, 2, 2, 3, 2, 3, 3]
    assert {choose_consumers(64, n, True) for n in lengths} == {2}
    assert {choose_consumers(d, n, False) for d in (128, 256) for n in lengths} == {2}


# What they compute


@pytest.mark.parametrize(
    ("dtype", "sizes", "is_causal"),
    [
        (torch.bfloat16, (1, 1, 1, 128, 128, 128, 128), False),
        (torch.float16, (2, 4, 2, 300, 500, 64, 64), False),
        (torch.float16, (1, 2, 1, 1000, 77, 128, 128), True),
        (torch.bfloat16, (1, 1, 1, 257, 385, 256, 256), False),
        (torch.bfloat16, (1, 1, 1, 257, 385, 256, 256), True),
        (torch.bfloat16, (3, 5, 5, 129, 1, 64, 64), True),
        (torch.bfloat16, (1, 2, 1, 192, 1, 64, 64), False),
        (torch.float16, (1, 2, 1, 1100, 500, 64, 64), True),
        (torch.float16, (1, 4, 2, 300, 500, 128, 128), True),
        (torch.bfloat16, (1, 1, 1, 300, 500, 128, 128), False),
    ],
    ids=str,
)
def test_output_and_gradients(sizes: tuple[int, ...], is_causal: bool, dtype: torch.dtype, hopper: str) -> None:
    judge(attention, make(sizes, dtype, hopper, is_causal=is_causal))


@pytest.mark.parametrize("sizes", [(2, 70, 10, 1024, 1024, 128, 128), (2, 70, 10, 1100, 1100, 64, 64)], ids=str)
@pytest.mark.parametrize("hopper", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_more_tiles_than_programs(sizes: tuple[int, ...], hopper: str) -> None:
    judge(attention, make(sizes, torch.bfloat16, hopper, is_causal=True))


FEATURES: dict[str, dict[str, Any]] = {
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 1.5},
    "window": {"window": (150, 0)},
    "two-sided window": {"window": (37, 90)},
    "narrow window": {"window": (0, 0)},
    "lengths": {"key_lengths": torch.tensor([0, 411, 128])},
    "all": {
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "window": (200, 0),
        "softcap": 3.0,
        "key_lengths": torch.tensor([500, 130, 1]),
    },
}


def check_feature(sizes: tuple[int, ...], options: dict[str, Any], device: str, with_gradients: bool) -> None:
    """Hold a call in bfloat16, its log-sum-exp as well, to the formula."""
    learned = ("query", "key", "value") if with_gradients else ()
    judge(attention, make(sizes, torch.bfloat16, device, results=("output", "lse"), learned=learned, **options))


@pytest.mark.parametrize("d", plan.HOPPER_HEAD_SIZES["forward"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str, d: int, hopper_only: str) -> None:
    check_feature((3, 1, 1, 260, 500, d, d), FEATURES[feature], hopper_only, with_gradients=False)


@pytest.mark.parametrize("d", plan.HOPPER_HEAD_SIZES["backward"])
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_with_each_feature(feature: str, d: int, hopper_only: str) -> None:
    check_feature((3, 1, 1, 200, 500, d, d), FEATURES[feature], hopper_only, with_gradients=True)


WRONG = {  # what is replaced by what, and where that shows first
    "scale off by 1 %": ("call.scale * LOG2_E", "call.scale * 1.01 * LOG2_E", "output"),
    "scale off by 1 % in the backward": ("[product]), before\n", "[product]), before * 1.01\n", "gradient of query"),
    "last key left out": ("(j < n_keys)", "(j < n_keys - 1)", "output"),
    "delta missing": ("dp - stats_s.index(2 * INDEX + 1).load(columns)[None, :]", "dp", "gradient of query"),
    "dK off by 1 %": ("dk = dk * call.scale", "dk = dk * call.scale * 1.01", "gradient of key"),
    "dV of weights that do not sum to 1": ("weights.to(DTYPE)", "(weights * 1.01).to(DTYPE)", "gradient of value"),
}


@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("d", plan.HOPPER_HEAD_SIZES["backward"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_slightly_wrong_kernel_is_rejected(wrong: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, where = WRONG[wrong]
    sources: list[str] = []

    def change(source: str) -> str:
        sources.append(source)
        return source.replace(old, new)

    use(emulate(1, change), monkeypatch)
    assert any(old in source for source in sources)
    with forced(capability=90), pytest.raises(AssertionError, match=f"{where}: error .* x PyTorch's by norm"):
        check_feature((1, 2, 1, 130, 200, d, d), {}, "cpu", with_gradients=True)


def test_nan_stays_where_it_may_be_seen(hopper_only: str) -> None:
    lengths = torch.tensor([512, 300])
    call = make((2, 2, 2, 512, 512, 128, 128), torch.bfloat16, hopper_only, is_causal=True, key_lengths=lengths)
    key, value = call.key.clone(), call.value.clone()
    for x in key, value:
        x[1, :, 300:], x[0, :, 400] = math.nan, math.inf
    clean, found = call.run(attention), call.replace(key=key, value=value).run(attention)
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, :, :400], clean[0, :, :400])
    assert found[0, :, 400:].isnan().all()


@pytest.mark.parametrize("hopper", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_repeated_runs_agree_bit_for_bit(hopper_only: str) -> None:
    call = make((4, 16, 16, 1500, 1500, 128, 128), torch.bfloat16, hopper_only, is_causal=True)
    first = call.run(attention)
    assert all(torch.equal(call.run(attention), first) for _ in range(20))
