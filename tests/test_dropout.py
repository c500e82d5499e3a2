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


def test_places_are_distinct_inside_and_independent() -> None:
    count, p, draws = 101, 0.1, 20_000
    hits = torch.zeros(count)
    both = 0.0
    for _ in range(draws // 20):
        places = dropped_places(count * 20, p)
        assert torch.equal(places, places.unique())
        assert places.numel() == 0 or (0 <= places[0] and places[-1] < count * 20)
        dropped = torch.zeros(20 * count).index_fill_(0, places, 1.0).view(20, count)
        hits += dropped.sum(0)
        both += (dropped[:, 0] * dropped[:, 1]).sum().item()
    deviation = (p * (1 - p) / draws) ** 0.5
    assert ((hits / draws - p).abs() < 5 * deviation).all(), "each place is dropped with the same probability"
    assert abs(both / draws - p * p) < 5 * (p * p / draws) ** 0.5, "and neighbours independently"
