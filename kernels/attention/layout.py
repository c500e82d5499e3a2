"""How the tensors of attention lie in memory."""

from __future__ import annotations

import torch

WIDE = 1 << 22  # elements from one row or column to the next with which offsets in a tile of 128 by 256 reach 2^31


def is_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether offsets inside a tile of one of these tensors (..., rows, columns) need 64 bits."""
    return any(max(x.stride()[-2:]) >= WIDE for x in tensors if x is not None)


def rows_outside(x: torch.Tensor) -> bool:
    """Whether the memory of x (..., H, T, E) has the heads of a row together, as views of (..., T, H, E) do."""
    return x.stride(-3) < x.stride(-2)


def empty_rows(like: torch.Tensor, last: int) -> torch.Tensor:
    """An empty (B, H, L, last) tensor whose memory has heads and rows in the order in which `like` has them.

    So the result of a query that is a transposed view of (B, L, H, E) goes back to (B, L, H * E) without a copy.
    """
    b, h, n, e = like.shape
    if last == e and like.is_contiguous():
        return torch.empty_like(like)  # the same in a third of the time
    if rows_outside(like):  # no transposed view of a new tensor: what autograd takes for a view has no in-place methods
        return like.new_empty_strided((b, h, n, last), (n * h * last, last, h * last, 1))
    return like.new_empty((b, h, n, last))


def overlaps(x: torch.Tensor) -> bool:
    """Whether numbers of x share memory in other ways than by a stride of 0; compiled, whether they may."""
    if x.is_contiguous() or (x.ndim > 2 and x.transpose(-3, -2).is_contiguous()):
        return False
    if torch.compiler.is_compiling():  # which cannot sort symbols
        return True
    if x.ndim == 4:  # a part of (B, T, parts, H, E), as one product gives queries, keys and values
        (_, heads, length, size), (batch, head, row, column) = x.shape, x.stride()
        if column == 1 and size <= head and heads * head <= row and length * row <= batch:
            return False
    reach = 1  # memory that the dimensions so far go over
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def ordered_as(query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The output (..., H, L, Ev) with heads and rows in the order in which the query's memory has them."""
    if output.ndim < 3:
        return output
    if not rows_outside(query):
        return output.contiguous() if rows_outside(output) else output
    return output if rows_outside(output) else output.transpose(-3, -2).contiguous().transpose(-3, -2)


def for_query_heads(x: torch.Tensor, dim: int, heads: int) -> torch.Tensor:
    """x with Hkv key heads along `dim`, each repeated for the query heads, Hq of them in all, that share it.

    By indices: torch.export makes guards on a length of the strides of what `repeat_interleave` gives.
    """
    group = heads // max(x.shape[dim], 1)
    return x if group == 1 else x.index_select(dim, torch.arange(heads, device=x.device, dtype=torch.int64) // group)
