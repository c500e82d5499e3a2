"""Dropout that is cheap on a CPU when little is dropped."""

import torch
from torch import nn

from kernels.dropout import add_dropped, dropout

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """torch.nn.Dropout by `kernels.dropout`."""

    @property
    def now(self) -> float:
        """The probability with which an element is dropped now: 0 in evaluation."""
        return self.p if self.training else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape, each element dropped with probability p, the others divided by 1 - p."""
        return dropout(x, self.p) if self.now else x

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + forward(x), both of one shape."""
        return add_dropped(x, residual, self.now)
