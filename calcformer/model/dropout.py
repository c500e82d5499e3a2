"""Dropout that is cheap on a CPU when little is dropped."""

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Dropout"]

# Above this share a number for every element is drawn faster than the gaps between dropped elements.
SPARSE_LIMIT = 0.1


def keep_scale(count: int, p: float) -> torch.Tensor:
    """`count` independent factors, float32: 0 with probability p, otherwise 1 / (1 - p).

    The distance from one success to the next in independent trials is geometric, so drawing the gaps between the
    dropped elements takes count * p random numbers and gives the same distribution as one number an element.
    """
    mean = count * p
    # Six standard deviations more than the mean: one call in 10^9 runs out of gaps and drops too few at the end.
    draws = int(mean + 6 * (mean * (1 - p)) ** 0.5) + 16
    place = torch.empty(draws, dtype=torch.float64).geometric_(p).cumsum_(0)
    scale = torch.full((count + 1,), 1 / (1 - p))
    scale.index_fill_(0, place.clamp_(max=count + 1).long() - 1, 0.0)
    return scale[:count]


class Dropout(nn.Dropout):
    """torch.nn.Dropout, with the gaps between dropped elements drawn where that is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or self.p > SPARSE_LIMIT or x.dtype != torch.float32:
            return F.dropout(x, self.p)
        return x * keep_scale(x.numel(), self.p).view(x.shape)
