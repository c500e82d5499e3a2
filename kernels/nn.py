"""Modules that take the place of their torch.nn namesakes and load the same state_dict."""

from typing import Any

import torch

from kernels.attention.module import MultiheadAttention
from kernels.backend import as_number
from kernels.layer_norm.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.layer_norm.checks import sizes_of

__all__ = ["LayerNorm", "MultiheadAttention", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` computed by `kernels.layer_norm`: same arguments, same parameters, same results.

    With a residual, `kernels.add_layer_norm`: the sum of a residual connection and the norm after it in one pass.
    """

    def __init__(self, normalized_shape: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(sizes_of(normalized_shape), *arguments, **options)
        self.eps = as_number(self.eps)

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        prenorm: bool = False,
    ) -> Any:
        """Normalise the trailing `normalized_shape` of `input` (..., *normalized_shape); same shape and dtype back.

        Args:
            residual: the shape of the input: residual + dropout(input) is normalised. None for the input alone.
            dropout_p: probability with which an element of the input is dropped; the caller makes it 0 in evaluation.
            prenorm: return the sum as well.
        """
        if residual is None:
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return add_layer_norm(
            input,
            residual,
            self.weight,
            self.bias,
            self.eps,
            dropout_p=dropout_p,
            prenorm=prenorm,
            normalized_shape=self.normalized_shape,
        )


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` computed by `kernels.rms_norm`, or with a residual by `kernels.add_rms_norm`."""

    def __init__(self, normalized_shape: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(sizes_of(normalized_shape), *arguments, **options)
        self.eps = as_number(self.eps)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, dropout_p: float = 0.0, prenorm: bool = False
    ) -> Any:
        """As `LayerNorm`."""
        if residual is None:
            return rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return add_rms_norm(
            x,
            residual,
            self.weight,
            self.eps,
            dropout_p=dropout_p,
            prenorm=prenorm,
            normalized_shape=self.normalized_shape,
        )
