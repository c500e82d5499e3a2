"""Scaled dot-product attention, written to be read: two loops over one sequence, two loops over a batch, no loop.

    output = softmax(query key^T / sqrt(M)) value

K is the number of positions in a sequence, M the width of each query and key. Row i of the softmax holds the weights
with which position i mixes the values; each row sums to 1. All three functions are differentiable, run in the dtype
they are given, and are what the fast kernels are tested against.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, equation 1.
"""

import math

import torch

__all__ = [
    "scaled_dot_product_no_loop_batch",
    "scaled_dot_product_two_loop_batch",
    "scaled_dot_product_two_loop_single",
]


def scaled_dot_product_two_loop_single(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over one sequence, one pair of positions at a time.

    output[i] = sum_j softmax_j(query[i] . key[j] / sqrt(M)) value[j]

    Args:
        query: (K, M), floating point.
        key: (K, M).
        value: (K, M).

    Returns:
        (K, M), the dtype of the inputs.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    rows = []
    for one_query in query:
        scores = torch.stack([scale * torch.dot(one_query, one_key) for one_key in key])  # (K,)
        weights = torch.softmax(scores, dim=0)
        rows.append(weights @ value)
    return torch.stack(rows)


def scaled_dot_product_two_loop_batch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over N sequences at once, still one pair of positions at a time.

    Args:
        query: (N, K, M), floating point.
        key: (N, K, M).
        value: (N, K, M).

    Returns:
        (N, K, M), the dtype of the inputs.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    rows = []
    for i in range(query.shape[1]):
        scores = [scale * (query[:, i] * key[:, j]).sum(dim=-1) for j in range(key.shape[1])]  # K tensors of (N,)
        weights = torch.softmax(torch.stack(scores, dim=-1), dim=-1)  # (N, K)
        rows.append((weights.unsqueeze(-1) * value).sum(dim=1))
    return torch.stack(rows, dim=1)


def scaled_dot_product_no_loop_batch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over N sequences as two matrix products, with an optional mask.

    output = softmax(query key^T / sqrt(M)) value, where a blocked pair of positions gets the weight 0.

    Args:
        query: (N, K, M), floating point.
        key: (N, K, M).
        value: (N, K, M).
        mask: bool, broadcastable to (N, K, K), or None. True = blocked: mask[n, i, j] forbids query i to see key j.
            This is the opposite of the sense of `attn_mask` in PyTorch and in `kernels.scaled_dot_product_attention`.

    Returns:
        output: (N, K, M), the dtype of the inputs.
        weights: (N, K, K); a row sums to 1. A row with every key blocked has weights 0 and output 0.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (N, K, K)
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # The lowest finite number, not -inf: a row with every key blocked then stays finite until it is set to 0.
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
    return weights @ value, weights
