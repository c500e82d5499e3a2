"""Which elements dropout drops, drawn cheaply on a CPU when they are few."""

import torch

# Above this probability a number for every element is drawn faster than the gaps between dropped elements.
SPARSE_LIMIT = 0.1


def dropped_places(count: int, p: float) -> torch.Tensor:
    """Which of `count` elements are dropped, each with probability p by itself: ascending int64 places, on the CPU.

    The distance from one success to the next in independent trials is geometric, so drawing the gaps between the
    dropped elements takes count * p random numbers and gives the same distribution as one number an element.
    """
    mean = count * p
    # Six standard deviations more than the mean: one call in 10^9 runs out of gaps and drops too few at the end.
    draws = int(mean + 6 * (mean * (1 - p)) ** 0.5) + 16
    # The gaps start at 1, and so the first place at 0; sums of whole numbers stay exact in float64.
    place = torch.empty(draws, dtype=torch.float64).geometric_(p).cumsum_(0).sub_(1).long()
    return place[: int(torch.searchsorted(place, count))]


def keep_factors(shape: tuple[int, ...], p: float) -> torch.Tensor:
    """A float32 tensor of `shape` on the CPU: 0 with probability p, else 1 / (1 - p)."""
    if p >= 1.0:
        return torch.zeros(shape)
    if p > SPARSE_LIMIT:
        return torch.empty(shape).bernoulli_(1.0 - p).div_(1.0 - p)
    factors = torch.full(shape, 1.0 / (1.0 - p))
    factors.view(-1).index_fill_(0, dropped_places(factors.numel(), p), 0.0)
    return factors
