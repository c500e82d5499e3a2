"""Layer norm and RMS norm, written to be read: two loops, and no loop.

    layer norm: output = (input - mean) / sqrt(variance + eps) * weight + bias
    RMS norm:   output = input / sqrt(mean(input^2) + eps) * weight

Mean and variance are taken over the N features of one row, never over the batch; the variance is the biased one
(divided by N, not N - 1). All functions are differentiable, run in the dtype they are given, and are what the fast
kernels are tested against.

Source: Ba, Kiros and Hinton 2016, "Layer Normalization", section 3, equation 4; Zhang and Sennrich 2019, "Root Mean
Square Layer Normalization", section 4, equation 4; eps as in `torch.nn.LayerNorm` and `torch.nn.RMSNorm`.
"""

import torch

__all__ = ["layer_norm_no_loop", "layer_norm_two_loop", "rms_norm_no_loop", "rms_norm_two_loop"]


def layer_norm_two_loop(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm one number at a time: a loop over rows, and inside it loops over columns.

    Args:
        input: (M, N), floating point: M rows of N features.
        weight: (N,), the factor of each column.
        bias: (N,), added to each column.
        eps: added to the variance, so that a constant row divides by sqrt(eps) and not by 0.

    Returns:
        (M, N), the dtype of the input.
    """
    rows = []
    for row in input:
        mean = sum(row) / len(row)
        variance = sum((x - mean) ** 2 for x in row) / len(row)
        rows.append(torch.stack([(x - mean) / (variance + eps) ** 0.5 * w + b for x, w, b in zip(row, weight, bias)]))
    return torch.stack(rows)


def layer_norm_no_loop(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension in four lines.

    Args:
        input: (..., N), floating point.
        weight: (N,).
        bias: (N,).
        eps: added to the variance.

    Returns:
        (..., N), the dtype of the input.
    """
    mean = input.mean(dim=-1, keepdim=True)  # (..., 1)
    centred = input - mean
    variance = (centred**2).mean(dim=-1, keepdim=True)  # (..., 1)
    return centred / torch.sqrt(variance + eps) * weight + bias


def rms_norm_two_loop(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm one number at a time. Arguments and result as for `layer_norm_two_loop`."""
    rows = []
    for row in input:
        mean_square = sum(x**2 for x in row) / len(row)
        rows.append(torch.stack([x / (mean_square + eps) ** 0.5 * w for x, w in zip(row, weight)]))
    return torch.stack(rows)


def rms_norm_no_loop(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension. Arguments and result as for `layer_norm_no_loop`."""
    mean_square = (input**2).mean(dim=-1, keepdim=True)  # (..., 1)
    return input / torch.sqrt(mean_square + eps) * weight
