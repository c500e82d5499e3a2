"""Dropout that is cheap on a CPU when little is dropped."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kernels.dropout import SPARSE_LIMIT, dropped_places

__all__ = ["Dropout"]


class SparseDropout(torch.autograd.Function):
    """x / (1 - p) with zeros at `places` of the flattened x: one pass over x and no mask kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, p: float) -> torch.Tensor:
        ctx.places, ctx.p = places, p
        return SparseDropout.apply_to(x, places, p)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return SparseDropout.apply_to(grads[0], ctx.places, ctx.p), None, None

    @staticmethod
    def apply_to(x: torch.Tensor, places: torch.Tensor, p: float) -> torch.Tensor:
        out = torch.mul(x, 1 / (1 - p), out=torch.empty(x.shape, dtype=x.dtype))  # contiguous whatever x is
        out.view(-1).index_fill_(0, places, 0.0)
        return out


class Dropout(nn.Dropout):
    """torch.nn.Dropout, with the gaps between dropped elements drawn where that is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or self.p > SPARSE_LIMIT:
            return F.dropout(x, self.p)
        return SparseDropout.apply(x, dropped_places(x.numel(), self.p), self.p)
