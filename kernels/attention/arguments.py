"""What launchers hand to the Triton kernels of attention: tensors with their strides, `Call` as kernels take it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kernels import launch
from kernels.attention.call import FAR, NO_TENSORS, Call
from kernels.attention.pieces import Dropout, Shape, Strided
from kernels.backend import INTERPRETED
from kernels.launch import LAYOUTS


def strided(x: torch.Tensor, call: Call) -> Strided:
    """x (B, H, rows, columns). Packed sequences all begin at one place; kernels look up where each starts."""
    stride_b, stride_h, stride_row, stride_col = x.stride()
    return Strided(x, stride_b if call.query_starts is None else 0, stride_h, stride_row, stride_col)


def row_strided(x: torch.Tensor, call: Call) -> Strided:
    """x (B, H, rows), contiguous along its rows."""
    return Strided(x, x.stride(0) if call.query_starts is None else 0, x.stride(1), 1, 0)


def broadcast(x: torch.Tensor) -> Strided:
    """A tensor of a call, from its first axis on: stride 0 along those of size 1; 1, a constant, for those it lacks."""
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]
    return Strided(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides, *(1,) * (4 - x.ndim))


def for_kernel(call: Call) -> Call:
    """The call as kernels take it: Triton makes constants of None and of 1, so it compiles what is asked for alone."""
    tensors = call.tensors
    given: list[Any] = [x if x is None else broadcast(x) for x in tensors]
    return Call(*given, *_numbers(call[len(tensors) :]))


@functools.lru_cache(LAYOUTS)
def _numbers(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The numbers of a call: flags as 1 or None, dropout as `Dropout`, and where there is a left side, a right one."""
    asked = Call._make((*NO_TENSORS, *numbers))
    p, right, dropout = asked.dropout_p, asked.right, None
    if p > 0.0:
        keep_scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0  # at probability 1 it keeps none
        dropout = Dropout(min(round(p * 2**32), 2**32 - 1) - 2**31, keep_scale)
    if asked.left is not None and right is None:
        right = FAR
    asked = asked._replace(dropout_p=dropout, right=right)  # type: ignore[arg-type]
    return tuple((1 if x else None) if isinstance(x, bool) else x for x in asked[len(NO_TENSORS) :])


def shape_of(query: torch.Tensor, key: torch.Tensor, call: Call) -> Shape:
    """Sizes of a call."""
    batch, n_queries, n_keys = call.lengths(query, key)
    return Shape(batch, query.shape[1], query.shape[1] // max(key.shape[1], 1), n_queries, n_keys)


def is_exact(dtype: torch.dtype, call: Call) -> bool:
    """Whether a row's largest score is subtracted before anything else: EXACT, see the top of score.py."""
    return dtype == torch.float32 or call.has_float_mask


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 products follow torch.get_float32_matmul_precision().

    "widen": to float32 first, since Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        return "widen"
    if dtype != torch.float32:
        return "ieee"  # says nothing of 16-bit inputs
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # PyTorch's newer setting, a precision a device, was used: it refuses the older question
        exact = torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    return "ieee" if exact else "tf32"


def heads_in_turn(group: int, shared_bytes: int, call: Call, device: torch.device) -> int:
    """Query heads that are worked on in turn, a tile of each.

    The longest tiles of all heads first would keep every multiprocessor busy to the end; one head after the other finds
    what its tiles share in L2. So: as many heads as have theirs there, or where all tiles are as long, one group.

    Args:
        group: query heads that share a key head.
        shared_bytes: what the tiles of a key head share, keys and values or queries and gradients.
    """
    is_causal = call.right is not None and call.left is None
    return group * max(1, launch.l2_bytes(device) // 2 // max(shared_bytes, 1)) if is_causal else group
