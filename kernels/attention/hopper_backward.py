"""Fused attention for Hopper chips: the backward kernel in Gluon, for 16-bit inputs with heads of 64 or 128.

Formulas as in general_backward.py, all on transposed scores: with P^T and dS^T in registers, dV = P^T dO and
dK = dS^T Q need no exchange between threads. A program owns 128 keys of a key head, 64 for each of two consumers, and
walks over the queries that see them, 64 at a time; a producer copies Q and dO of those into rings (TMA). For dQ both
consumers lay dS^T into shared memory, each multiplies by half of the columns of K, and the product is added to a
float32 buffer in memory by TMA. In which order programs add is not settled: repeated runs agree but for rounding.
Where that may not be, general_backward.py makes dQ by a kernel of its own, for seven products instead of five.

K is cleaned of NaN and Inf once, where an edge can cut a tile: in dQ they would be multiplied by zeros. A key that had
some makes the scores NaN of those queries that may see it, also where an infinite score would have weighed nothing.

Work of one head: 10 L S E flops (half when causal). Bytes: K, V, dK and dV once, Q and dO once for each 128 keys, from
L2 mostly; dQ is added to L2 as often, in float32.
"""

from typing import Any

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core as gluon_core
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.again import copy_into, run_kernel
from kernels.attention.arguments import for_kernel, heads_in_turn, shape_of
from kernels.attention.call import Call
from kernels.attention.hopper_pieces import (
    BARRIER_A,
    cap,
    clean_values,
    descriptor,
    hopper_options,
    keys_in_use,
    load_tile,
    named_barrier,
    scales,
    shared_layout,
    store_tile,
    warp_group_barrier,
)
from kernels.attention.pieces import find_work
from kernels.attention.plan import takes_tma
from kernels.launch import cdiv, launch_on, settle

ROWS, KEYS = gl.constexpr(64), gl.constexpr(128)  # queries of a step; keys of a program
HALF = KEYS // 2  # keys of a consumer: the rows of a warp group's matrix instruction
COLUMNS = gl.constexpr(64)  # of dQ that are added to memory at a time
SLOTS = {64: 2, 128: 3}  # tiles of Q, and of dO, in shared memory, by head size: at 64 a third made nothing faster
KV_FULL, KV_READY = gl.constexpr(0), gl.constexpr(1)  # barriers, and where the others begin
Q_FULL, GRAD_FULL, Q_EMPTY, BARRIERS = (gl.constexpr(2 + i * max(SLOTS.values())) for i in range(4))
REGISTERS = gl.constexpr(240)


@gluon_core.builtin
def add_tile(desc: Any, coordinates: Any, source: Any, _semantic: Any = None) -> None:
    """Add a tile in shared memory to memory, by TMA; the language has no name for it yet."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coordinates, source.handle)


@gluon.jit
def find_keys(shape, n_tiles, section):
    """First key, key head and batch entry of this program. The first keys see the most queries: the longest first."""
    head, tile = find_work(gl.program_id(0), gl.num_programs(0) // n_tiles, n_tiles, section)
    n_kv_heads = shape.n_heads // shape.group
    return tile * KEYS, head % n_kv_heads, head // n_kv_heads


@gluon.jit
def query_bounds(call, shape, start_k, b):
    """Which tiles of ROWS queries see KEYS keys: keys in use, offset, first tile, the one after the last, and the tiles
    [open_first, open_last) that no edge cuts."""
    n_keys, offset = keys_in_use(call, shape, b)
    L = shape.L
    first, end, open_first, open_last = 0, gl.cdiv(L, ROWS), 0, L // ROWS
    if call.right is not None:
        row = start_k - offset - call.right  # the first that sees the first key
        first = gl.minimum(gl.maximum(row, 0), L) // ROWS
        open_first = gl.cdiv(gl.maximum(row + KEYS - 1, 0), ROWS)
        if call.left is not None:
            # The first that sees none any more.
            beyond = gl.maximum(gl.minimum(L, start_k + KEYS - offset + call.left), 0)
            end = gl.cdiv(beyond, ROWS)
            open_last = gl.minimum(open_last, gl.maximum(start_k - offset + call.left + 1, 0) // ROWS)
    end = gl.maximum(gl.where(start_k < n_keys, end, first), first)
    open_last = gl.where(start_k + KEYS <= n_keys, open_last, 0)
    open_first = gl.minimum(gl.maximum(open_first, first), end)
    open_last = gl.minimum(gl.maximum(open_last, open_first), end)
    return n_keys, offset, first, end, open_first, open_last


@gluon.jit
def producer(
    q_desc,
    k_desc,
    v_desc,
    grad_desc,
    rows_s,
    keys_s,
    flags_s,
    signals,
    call,
    shape,
    n_tiles,
    section,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    GUARDED: gl.constexpr,
):
    """Copy K and V once, then Q and dO of every tile of queries of every query head, in the order of the consumers."""
    group = shape.group
    start_k, h_kv, b = find_keys(shape, n_tiles, section)
    _, _, first, end, _, _ = query_bounds(call, shape, start_k, b)
    mbarrier.expect(signals.index(KV_FULL), 2 * k_desc.block_type.nbytes)
    load_tile(k_desc, [b, h_kv, start_k, 0], signals.index(KV_FULL), keys_s.index(0))
    load_tile(v_desc, [b, h_kv, start_k, 0], signals.index(KV_FULL), keys_s.index(1))
    n_rows = end - first
    for count in range(gl.maximum(group * n_rows, 1)):
        if count < group * n_rows:  # some query sees the keys
            slot = count % SLOTS
            mbarrier.wait(signals.index(Q_EMPTY + slot), (count // SLOTS & 1) ^ 1)
            place = [b, h_kv * group + count // n_rows, (first + count % n_rows) * ROWS, 0]
            mbarrier.expect(signals.index(Q_FULL + slot), q_desc.block_type.nbytes)
            load_tile(q_desc, place, signals.index(Q_FULL + slot), rows_s.index(2 * slot))
            mbarrier.expect(signals.index(GRAD_FULL + slot), grad_desc.block_type.nbytes)
            load_tile(grad_desc, place, signals.index(GRAD_FULL + slot), rows_s.index(2 * slot + 1))
        if GUARDED:
            if count == 0:  # only now, so that the first queries are under way meanwhile
                mbarrier.wait(signals.index(KV_FULL), 0)
                clean_values(keys_s.index(0).reshape([KEYS, D]), flags_s, D, KEYS)
                mbarrier.arrive(signals.index(KV_READY), count=1)


@gluon.jit
def load_statistics(lse_ptr, delta_ptr, shape, b, h, tile):
    """Log-sum-exp and delta of ROWS queries, a number a thread at most; those past the end weigh nothing."""
    i = tile * ROWS + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    row = (b * shape.n_heads + h).to(gl.int64) * shape.L + i
    lse = gl.load(lse_ptr + row, mask=i < shape.L, other=float("inf"))
    return lse, gl.load(delta_ptr + row, mask=i < shape.L, other=0.0)


@gluon.jit
def start_dq(ds, k):
    """Start dS K for dS^T (KEYS, ROWS) and columns of K (KEYS, COLUMNS), both in shared memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    empty = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    return warpgroup_mma(ds.permute((1, 0)), k, empty, use_acc=False, is_async=True)


@gluon.jit
def add_queries(dq, dq_desc, buffer, b, h, row, column):
    """Add dq (ROWS, COLUMNS) to memory, by way of a buffer."""
    tma.store_wait(0)  # what was added before has left the buffer
    warp_group_barrier()
    buffer.reshape([ROWS, COLUMNS]).store(dq)
    fence_async_shared()
    warp_group_barrier()
    add_tile(dq_desc, [b, h, row, column], buffer)


@gluon.jit
def step(
    dk,
    dv,
    lse,
    delta,
    tile,
    count,
    h,
    b,
    j,
    bad,
    n_keys,
    offset,
    call,
    shape,
    before,
    after,
    first,
    end,
    lse_ptr,
    delta_ptr,
    dq_desc,
    stats_s,
    rows_s,
    k,
    v,
    k_half,
    ds_s,
    dq_s,
    signals,
    INDEX: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    GUARDED: gl.constexpr,
    CHECKED: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """dK and dV with what one tile of queries adds to them, its dQ on the way to memory; lse and delta of the next."""
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # (HALF, ROWS)
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # (HALF, D)
    columns: gl.constexpr = gl.SliceLayout(0, tall)
    left_operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    slot, phase = count % SLOTS, count // SLOTS & 1
    q, grad = rows_s.index(2 * slot).reshape([ROWS, D]), rows_s.index(2 * slot + 1).reshape([ROWS, D])
    stats_s.index(2 * INDEX).store(lse)  # the meeting of the step before came after its last read
    stats_s.index(2 * INDEX + 1).store(delta)
    warp_group_barrier()
    # What the next step needs is asked for now.
    is_last = tile + 1 == end
    next_h = gl.where(is_last & ((h + 1) % shape.group != 0), h + 1, h)
    lse, delta = load_statistics(lse_ptr, delta_ptr, shape, b, next_h, gl.where(is_last, first, tile + 1))
    mbarrier.wait(signals.index(Q_FULL + slot), phase)
    empty = gl.zeros([HALF, ROWS], gl.float32, tall)
    product = warpgroup_mma(k, q.permute((1, 0)), empty, use_acc=False, is_async=True)
    mbarrier.wait(signals.index(GRAD_FULL + slot), phase)
    second = warpgroup_mma(v, grad.permute((1, 0)), empty, use_acc=False, is_async=True)
    scores, factor = warpgroup_mma_wait(1, deps=[product]), before
    if call.softcap is not None:
        scores = cap(scores, before, after)
        factor = 1.0
        ratio = scores * (1.0 / after)
    if GUARDED:
        scores = scores + bad[:, None]
    weights = gl.exp2(scores * factor - stats_s.index(2 * INDEX).load(columns)[None, :])
    if CHECKED:
        i = tile * ROWS + gl.arange(0, ROWS, columns)
        allowed = (j < n_keys)[:, None] & (i < shape.L)[None, :]
        if call.right is not None:
            allowed = allowed & (j[:, None] <= i[None, :] + (offset + call.right))
        if call.left is not None:
            allowed = allowed & (j[:, None] >= i[None, :] + (offset - call.left))
        weights = gl.where(allowed, weights, 0.0)
    third = warpgroup_mma(gl.convert_layout(weights.to(DTYPE), left_operand), grad, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[second])
    ds = weights * (dp - stats_s.index(2 * INDEX + 1).load(columns)[None, :])
    if call.softcap is not None:
        ds = ds * (1.0 - ratio * ratio)
    if CHECKED:
        ds = gl.where(allowed, ds, 0.0)
    ds = ds.to(DTYPE)
    fourth = warpgroup_mma(gl.convert_layout(ds, left_operand), q, dk, is_async=True)
    turn = ds_s.index(count % 2)
    turn.slice(INDEX * HALF, HALF, 0).store(ds)
    fence_async_shared()
    named_barrier("sync", BARRIER_A)  # both halves of dS^T are there, and of the step before none is read any more
    if D == 2 * COLUMNS:
        fifth = start_dq(turn, k_half)
        dv = warpgroup_mma_wait(2, deps=[third])
        dk = warpgroup_mma_wait(1, deps=[fourth])
        mbarrier.arrive(signals.index(Q_EMPTY + slot), count=1)
        dq = warpgroup_mma_wait(0, deps=[fifth]) * call.scale
        add_queries(dq, dq_desc, dq_s.index(INDEX), b, h, tile * ROWS, INDEX * COLUMNS)
    else:  # half of its columns are too few for a matrix instruction: the consumers take turns
        dv = warpgroup_mma_wait(1, deps=[third])
        dk = warpgroup_mma_wait(0, deps=[fourth])
        mbarrier.arrive(signals.index(Q_EMPTY + slot), count=1)
        if count % 2 == INDEX:
            dq = warpgroup_mma_wait(0, deps=[start_dq(turn, k_half)]) * call.scale
            add_queries(dq, dq_desc, dq_s.index(INDEX), b, h, tile * ROWS, 0)
    return dk, dv, lse, delta


@gluon.jit
def consumer(
    INDEX: gl.constexpr,
    dq_desc,
    dk_desc,
    dv_desc,
    lse_ptr,
    delta_ptr,
    rows_s,
    keys_s,
    flags_s,
    stats_s,
    ds_s,
    dq_s,
    signals,
    call,
    shape,
    n_tiles,
    section,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    GUARDED: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """dK and dV of HALF of the keys, and half of the columns of what the program's KEYS keys add to dQ."""
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    start_k, h_kv, b = find_keys(shape, n_tiles, section)
    n_keys, offset, first, end, open_first, open_last = query_bounds(call, shape, start_k, b)
    before, after = scales(call)
    k = keys_s.index(0).reshape([KEYS, D]).slice(INDEX * HALF, HALF, 0)
    v = keys_s.index(1).reshape([KEYS, D]).slice(INDEX * HALF, HALF, 0)
    k_half = keys_s.index(0).reshape([KEYS, D])
    if D == 2 * COLUMNS:
        k_half = k_half.slice(INDEX * COLUMNS, COLUMNS, 1)
    j = start_k + INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(1, tall))
    dk, dv = gl.zeros([HALF, D], gl.float32, wide), gl.zeros([HALF, D], gl.float32, wide)
    bad = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, tall))
    if GUARDED:
        mbarrier.wait(signals.index(KV_READY), 0)
        good = flags_s.slice(INDEX * HALF, HALF, 0).load(gl.SliceLayout(1, tall))
        bad = gl.where(good == 0, float("nan"), 0.0)
    else:
        mbarrier.wait(signals.index(KV_FULL), 0)
    count = 0
    lse, delta = load_statistics(lse_ptr, delta_ptr, shape, b, h_kv * shape.group, first)
    for member in range(shape.group):
        h = h_kv * shape.group + member
        for PART in gl.static_range(3):  # tiles cut at one edge, open ones, tiles cut at the other edge
            low, high = open_last, end
            if PART == 0:
                low, high = first, open_first
            if PART == 1:
                low, high = open_first, open_last
            for tile in range(low, high):
                dk, dv, lse, delta = step(
                    dk,
                    dv,
                    lse,
                    delta,
                    tile,
                    count,
                    h,
                    b,
                    j,
                    bad,
                    n_keys,
                    offset,
                    call,
                    shape,
                    before,
                    after,
                    first,
                    end,
                    lse_ptr,
                    delta_ptr,
                    dq_desc,
                    stats_s,
                    rows_s,
                    k,
                    v,
                    k_half,
                    ds_s,
                    dq_s,
                    signals,
                    INDEX,
                    D,
                    SLOTS,
                    GUARDED,
                    PART != 1,
                    DTYPE,
                )
                count += 1
    named_barrier("sync", BARRIER_A)  # nobody reads the keys any more
    dk = dk * call.scale
    if call.key_lengths is not None:  # keys that are not in use: a weight of zero times NaN is NaN
        unused = start_k + INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(1, wide)) >= n_keys
        dk, dv = gl.where(unused[:, None], 0.0, dk), gl.where(unused[:, None], 0.0, dv)
    k.store(dk.to(DTYPE))
    v.store(dv.to(DTYPE))
    fence_async_shared()
    named_barrier("sync", BARRIER_A)
    if INDEX == 0:
        store_tile(dk_desc, [b, h_kv, start_k, 0], keys_s.index(0))
    else:
        store_tile(dv_desc, [b, h_kv, start_k, 0], keys_s.index(1))
    tma.store_wait(0)


# barrier    count  a phase of it completes when                who waits for it
# kv_full    1      K and V have been copied                    the producer, to clean K, or else the consumers
# kv_ready   1      K has been cleaned                          both consumers, before anything else
# q_full     1      a tile of Q has been copied                 both consumers, before they multiply by it
# grad_full  1      a tile of dO has been copied                both consumers, before they multiply by it
# q_empty    2      both consumers' products with both are done the producer, before it copies into that slot
#
# Slots and phases are counted as in hopper_forward.py. The consumers meet once a step, after both have laid down dS^T:
# who has passed knows that the other one's products of the step before, waited for before the meeting, read dS^T no
# more, and so the two halves of ds_s can take turns. They meet twice at the end, before and after dK and dV replace K
# and V.


@gluon.jit
def hopper_backward_kernel(
    q_desc,
    k_desc,
    v_desc,
    grad_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    lse_ptr,
    delta_ptr,
    call,
    shape,
    n_tiles,
    section,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    DS_LAYOUT: gl.constexpr,
    GUARDED: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """dK and dV of KEYS keys of one key head, summed over its query heads, and what they add to dQ.

    q_desc, grad_desc: of (B, H, L, D) in boxes of ROWS; k_desc, v_desc, dk_desc, dv_desc: of (B, n_kv_heads, S, D)
    in boxes of KEYS; dq_desc: of (B, H, L, D) float32, zero at first, in boxes of ROWS by COLUMNS.
    lse_ptr (B, H, L) float32: base-2 log-sum-exp, inf for a query that may attend to nothing. delta_ptr (B, H, L)
    float32. call, shape: as for forward_kernel. n_tiles: of KEYS keys. section: key heads that are worked on in turn.
    GUARDED: an edge may cut a tile.
    """
    # Few allocations: each is handed to the warp groups as several registers.
    rows_s = gl.allocate_shared_memory(DTYPE, [2 * SLOTS, 1, 1, ROWS, D], q_desc.layout)  # Q and dO in turn
    keys_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, KEYS, D], k_desc.layout)  # K, V
    ds_s = gl.allocate_shared_memory(DTYPE, [2, KEYS, ROWS], DS_LAYOUT)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 1, 1, ROWS, COLUMNS], dq_desc.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [4, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    flags_s = gl.allocate_shared_memory(gl.int32, [KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    signals = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(signals.index(KV_FULL), count=1)
    mbarrier.init(signals.index(KV_READY), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(signals.index(Q_FULL + slot), count=1)
        mbarrier.init(signals.index(GRAD_FULL + slot), count=1)
        mbarrier.init(signals.index(Q_EMPTY + slot), count=2)  # both consumers
    gl.warp_specialize([
        (producer, (
            q_desc, k_desc, v_desc, grad_desc, rows_s, keys_s, flags_s, signals, call, shape, n_tiles, section,
            D, SLOTS, GUARDED,
        )),
        (consumer, (
            0, dq_desc, dk_desc, dv_desc, lse_ptr, delta_ptr, rows_s, keys_s, flags_s, stats_s, ds_s, dq_s, signals,
            call, shape, n_tiles, section, D, SLOTS, GUARDED, DTYPE,
        )),
        (consumer, (
            1, dq_desc, dk_desc, dv_desc, lse_ptr, delta_ptr, rows_s, keys_s, flags_s, stats_s, ds_s, dq_s, signals,
            call, shape, n_tiles, section, D, SLOTS, GUARDED, DTYPE,
        )),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip


settle(hopper_backward_kernel)


def launch_hopper_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    statistics: torch.Tensor,
    total: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Launch the backward kernel. Arguments as of `launch_backward` in general_backward.py; all gradients are made.

    total: zeros (B, Hq, L, E) float32, to which programs add dQ.
    """
    d, shape = query.shape[3], shape_of(query, key, call)
    n_tiles = cdiv(shape.S, int(KEYS))
    options = hopper_options(query, call)
    dtype = options["DTYPE"]
    grad = grad if takes_tma(grad) else grad.contiguous()
    section = heads_in_turn(1, 2 * shape.group * shape.L * d * query.itemsize, call, query.device)
    with launch_on(query.device):
        run_kernel(
            hopper_backward_kernel,
            (n_tiles * key.shape[1] * shape.batch,),
            descriptor(query, ROWS, dtype),
            descriptor(key, KEYS, dtype),
            descriptor(value, KEYS, dtype),
            descriptor(grad, ROWS, dtype),
            descriptor(total, ROWS, gl.float32, COLUMNS),
            descriptor(dk, KEYS, dtype),
            descriptor(dv, KEYS, dtype),
            statistics[0],
            statistics[2],
            for_kernel(call),
            shape,
            n_tiles,
            section,
            D=d,
            SLOTS=SLOTS[d],
            DS_LAYOUT=shared_layout(int(KEYS), int(ROWS), dtype),
            **options,
        )
    copy_into(dq, total)
