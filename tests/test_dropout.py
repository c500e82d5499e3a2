"""Dropout drawn by the gaps between dropped elements."""

import pytest
import torch

import kernels.dropout
from kernels.dropout import LEAST, SPARSE_LIMIT, add_dropped, dropout, dropped_places, keep_factors


@pytest.mark.parametrize("p", [0.003, 0.01, SPARSE_LIMIT, 0.3, 0.5, 0.9997])
def test_factors_are_zero_as_often_as_asked_and_keep_the_mean(p: float) -> None:
    factors = keep_factors((211, 1009), p)
    share = (factors == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / factors.numel()) ** 0.5
    assert torch.equal(factors[factors != 0].unique(), torch.tensor([1 / (1 - p)]))


def test_what_8_bits_lack_of_a_probability_is_dropped_by_places(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def places(count: int, p: float) -> torch.Tensor:
        asked.append(p)
        return torch.arange(3)

    monkeypatch.setattr(kernels.dropout, "dropped_places", places)
    p = 0.3  # lies between 76 and 77 of 256
    assert keep_factors((2, 4001), p)[0, :3].tolist() == [0, 0, 0]
    assert (1 - asked[0]) * (1 - 76 / 256) == pytest.approx(1 - p, rel=1e-12)
    keep_factors((2, 4001), 0.5)
    assert len(asked) == 1  # a half needs no more


def test_dropping_everything() -> None:
    assert torch.equal(keep_factors((3, 5), 1.0), torch.zeros(3, 5))


@pytest.mark.parametrize("p", [0.01, 0.1])
def test_places_are_equally_likely_and_independent(p: float) -> None:
    count, rounds = 199, 20_000
    dropped = torch.zeros(rounds, count, dtype=torch.float64)
    for row in dropped:
        row[dropped_places(count, p)] = 1
    deviation = (p * (1 - p) / rounds) ** 0.5
    assert (dropped.mean(dim=0) - p).abs().max() < 5 * deviation  # at every place, the first and the last too
    both = (dropped[:, 1:] * dropped[:, :-1]).mean().item()  # neighbours are independent
    assert both == pytest.approx(p * p, rel=0.25)


def test_places_repeat_with_their_seed() -> None:
    torch.manual_seed(3)
    first = dropped_places(997, 0.1)
    torch.manual_seed(3)
    assert torch.equal(dropped_places(997, 0.1), first)


def test_nothing_to_drop_from() -> None:
    assert keep_factors((0, 5), 0.1).shape == (0, 5)


@pytest.mark.parametrize("p", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_defaults_of_pytorch_change_nothing(p: float, dtype: torch.dtype) -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [keep_factors((211, 1009), p), dropout(x, p), add_dropped(x, x, p)]

    x = torch.ones(LEAST)
    expected = draw()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("p", [0.01, 0.5])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_a_sum_is_rounded_once(p: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As on the Triton kernels: the scaled numbers have no rounding of their own."""
    x, residual = (torch.randn(67, 64, dtype=torch.float64).to(dtype) for dtype in dtypes)
    found = add_dropped(x, residual, p)
    assert found.dtype == torch.promote_types(*dtypes)
    wide = torch.promote_types(dtypes[0], torch.float32)
    kept = (residual + x.to(wide) / (1 - p)).to(found.dtype)
    torch.testing.assert_close(found, torch.where((found - residual).abs() < 1e-30, residual.to(found.dtype), kept))
