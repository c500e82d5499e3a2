"""Dropout that is cheap on a CPU when little is dropped."""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.dropout import keep_factors

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """torch.nn.Dropout, whose mask is drawn by `keep_factors` on a CPU: most of its time goes into drawing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape, each element dropped with probability p, the others divided by 1 - p."""
        return x * keep_factors(x.shape, self.p) if self._draws_factors(x) else F.dropout(x, self.p, self.training)

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + forward(x), both of one shape, in one pass where the factors are at hand."""
        if self._draws_factors(x):
            return torch.addcmul(residual, x, keep_factors(x.shape, self.p))
        return residual + F.dropout(x, self.p, self.training)

    def _draws_factors(self, x: torch.Tensor) -> bool:
        if not self.training or self.p == 0 or torch.compiler.is_compiling():
            return False
        return x.device.type == "cpu" and x.dtype == torch.float32
