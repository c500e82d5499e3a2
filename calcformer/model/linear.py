"""A linear layer that is fast on any CPU."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Linear"]

# PyTorch multiplies float32 matrices with MKL, which on processors that are not Intel's leaves half of the vector unit
# idle. oneDNN, which PyTorch carries too, does not, and this is the one operation that hands it float32 rows as they
# are (torch.compile emits it). It is not public: where it is missing, PyTorch's own linear does the work.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a (M, K) times the transpose of b (N, K), plus bias (N,): (M, N)."""
    assert ONEDNN is not None
    return ONEDNN(a, b, bias, "none", [], "")


class OneDnnLinear(torch.autograd.Function):
    """x weight^T + bias, forward and backward by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """x (M, K), weight (N, K), bias (N,) to (M, N)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        return product(grad, weight.t()), product(x.t(), grad.t()).t(), grad.sum(0)


class Linear(nn.Linear):
    """torch.nn.Linear with a bias, its products by oneDNN on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) to (..., out_features)."""
        plain = (
            ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0
            or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        )  # fmt: skip
        if plain:
            return F.linear(x, self.weight, self.bias)
        rows = OneDnnLinear.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)
