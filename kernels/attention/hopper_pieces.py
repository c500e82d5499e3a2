"""What the Gluon kernels for Hopper chips share: names, named barriers, key tiles that are needed, clean values."""

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.call import Call
from kernels.attention.score import LOG2_E
from kernels.launch import LAYOUTS

# Names before and after they were changed: of the copies in Triton 3.9, of the barrier in 3.7.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
warp_group_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# Named barriers; the compiler takes the first few.
BARRIER_A, BARRIER_B, BARRIER_C = gl.constexpr("9"), gl.constexpr("10"), gl.constexpr("11")


@gluon.jit
def named_barrier(VERB: gl.constexpr, NUMBER: gl.constexpr):
    """At a named barrier of two consumers: "sync" waits for the other one to come to it, "arrive" does not wait."""
    x = gl.full([128], 0, gl.int32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    code: gl.constexpr = "bar." + VERB + " " + NUMBER + ", 256; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(code, "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def keys_in_use(call, shape, b):
    """How many keys batch entry b has, and the offset of its queries' places."""
    n_keys = shape.S
    if call.key_lengths is not None:
        in_use = gl.load(call.key_lengths.ptr + b * call.key_lengths.stride_b)
        n_keys = gl.maximum(gl.minimum(n_keys, in_use), 0)
    offset = 0
    if call.bottom_right is not None:
        offset = n_keys - shape.L
    return n_keys, offset


@gluon.jit
def scales(call):
    """What scores are multiplied with for exp2, before a soft cap and, if there is one, after it."""
    before, after = call.scale * LOG2_E, 1.0
    if call.softcap is not None:
        before, after = call.scale / call.softcap, call.softcap * LOG2_E
    return before, after


@gluon.jit
def cap(scores, before, after):
    """Scores after a soft cap, in base 2: after tanh(before scores)."""
    return (1.0 - 2.0 / (1.0 + gl.exp2(scores * before * 2.885390081777927))) * after


@gluon.jit
def tile_bounds(call, shape, start_q, b, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """Which key tiles ROWS queries need.

    Returns:
        Keys in use; the offset of the places; the first tile and the last one needed, one at least; the tiles
        [open_first, open_last) that no edge cuts.
    """
    n_keys, offset = keys_in_use(call, shape, b)
    first, open_first, end, open_end = 0, 0, n_keys, n_keys
    if call.right is not None:
        place = start_q + offset
        end = gl.maximum(gl.minimum(n_keys, place + ROWS + call.right), 0)
        open_end = gl.maximum(gl.minimum(n_keys, place + 1 + call.right), 0)
        if call.left is not None:
            first = gl.maximum(place - call.left, 0) // BLOCK_K
            open_first = gl.cdiv(gl.maximum(place + ROWS - 1 - call.left, 0), BLOCK_K)
    last = gl.maximum(gl.cdiv(end, BLOCK_K) - 1, first)
    open_last = gl.minimum(gl.maximum(open_end // BLOCK_K, first), last)
    open_first = gl.minimum(gl.maximum(open_first, first), open_last)
    return n_keys, offset, first, last, open_first, open_last


@gluon.jit
def add_zeros(x, sums):
    """sums + 0 * x, two 16-bit numbers an instruction: NaN where x is NaN or Inf, or where sums was NaN."""
    kind: gl.constexpr = "bf16x2" if x.dtype == gl.bfloat16 else "f16x2"
    code: gl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0; fma.rn." + kind + " $0, $1, zero, $2; }"
    return gl.inline_asm_elementwise(code, "=r,r,r", [x, sums], x.dtype, is_pure=True, pack=2)


@gluon.jit
def clean_values(tile, good, D: gl.constexpr, BLOCK_K: gl.constexpr):
    """Replace NaN and Inf in a tile of K or V (BLOCK_K, D) by zero; good (BLOCK_K,): 1 for a key without any, else 0.

    To find out whether there is something to replace takes a load and four sums for eight numbers, a seventh of what
    it takes to write them.
    """
    CHUNK: gl.constexpr = max(1024 // D, 8)  # keys; eight are the least that stand together in shared memory
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    sums = gl.zeros([CHUNK, D], tile.dtype, layout)
    for i in gl.static_range(BLOCK_K // CHUNK):
        sums = add_zeros(tile.slice(i * CHUNK, CHUNK, 0).load(layout), sums)
    if gl.max((sums != sums).to(gl.int32).reshape([CHUNK * D]), 0) != 0:  # in one row: a warp votes at once
        for i in gl.static_range(BLOCK_K // CHUNK):
            chunk = tile.slice(i * CHUNK, CHUNK, 0)
            x = chunk.load(layout)
            finite = gl.abs(x.to(gl.float32)) < float("inf")
            good.slice(i * CHUNK, CHUNK, 0).store(gl.min(finite.to(gl.int32), 1))
            chunk.store(gl.where(finite, x, gl.zeros_like(x)))
        fence_async_shared()
    else:
        good.store(gl.full([BLOCK_K], 1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))


def descriptor(x: torch.Tensor, rows: Any, dtype: Any, columns: Any = 0) -> TensorDescriptor:
    """How TMA finds boxes of `rows` rows of one head of x (B, H, L or S, D), and of `columns` columns, 0 for all."""
    return TensorDescriptor(x, *_boxes(x.shape, x.stride(), int(rows), int(columns) or x.shape[3], dtype))


@functools.lru_cache(LAYOUTS)
def _boxes(shape: torch.Size, strides: tuple[int, ...], rows: int, columns: int, dtype: Any) -> tuple[Any, ...]:
    """Shape, strides, box and layout of the descriptors of such tensors."""
    steps = [stride if size > 1 else shape[3] for size, stride in zip(shape[:3], strides)]  # any, where unused
    return list(shape), [*steps, 1], [1, 1, rows, columns], shared_layout(1, 1, rows, columns, dtype)


@functools.cache
def shared_layout(*box_and_dtype: Any) -> gl.NVMMASharedLayout:
    """How a box of numbers of a dtype lies in shared memory."""
    *box, dtype = box_and_dtype
    return gl.NVMMASharedLayout.get_default_for(box, dtype)


def hopper_options(query: torch.Tensor, call: Call) -> dict[str, Any]:
    """The compile-time switches that both kernels share, and warps. GUARDED: an edge may cut a tile."""
    is_cut = not (call.key_lengths is None and call.left is None and call.right is None)
    dtype = gl.float16 if query.dtype == torch.float16 else gl.bfloat16
    return {"GUARDED": is_cut, "DTYPE": dtype, "num_warps": 4}
