"""Dropout drawn by the gaps between dropped elements."""

import pytest
import torch

from kernels.dropout import SPARSE_LIMIT, dropped_places, keep_factors


@pytest.mark.parametrize("p", [0.003, 0.01, SPARSE_LIMIT, 0.5])
def test_factors_are_zero_as_often_as_asked_and_keep_the_mean(p: float) -> None:
    factors = keep_factors((211, 1009), p)
    share = (factors == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / factors.numel()) ** 0.5
    assert torch.equal(factors[factors != 0].unique(), torch.tensor([1 / (1 - p)]))


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
