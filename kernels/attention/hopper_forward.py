"""Fused attention for Hopper chips: the forward kernel in Gluon, for 16-bit inputs with heads of 64, 128 or 256.

    O = softmax(scale * Q K^T) V      with causal and window limits, key lengths, soft cap, shared key heads

One warp group, the producer, copies tiles from memory (TMA); two others, the consumers, or three where heads are
narrow, hold 64 queries each and multiply. Tiles of K and V stand in rings of SLOTS. A consumer issues Q K^T of the next
tile before it waits for P V of this one, so that the softmax of one product runs beside the other; named barriers let
the consumers take turns at the matrix unit (FlashAttention-3: Shah et al. 2024, sections 3.1 and 3.2). Programs stay,
and walk over tiles of queries, the longest first, over as many heads at a time as have their keys and values in L2. The
first keys and values for the next queries are copied, and looked at, while the output for these is on its way.

Key tiles are walked from the last to the first: the first one seen is the one on the diagonal. Those that an edge cuts
are GUARDED: a weight of zero times NaN is NaN, so the producer looks for NaN and Inf in V before it hands it over,
takes them out where there are some, and tells by flags which keys had them.

Work of one head: 4 L S E flops (half when causal). Bytes: Q and O once, K and V once for each tile of queries, from L2
mostly; 8 a row for the statistics, which are those of general.py.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels import launch
from kernels.again import run_kernel
from kernels.attention.arguments import for_kernel, heads_in_turn, shape_of
from kernels.attention.call import Call
from kernels.attention.hopper_pieces import (
    BARRIER_A,
    BARRIER_B,
    BARRIER_C,
    cap,
    clean_values,
    descriptor,
    hopper_options,
    load_tile,
    named_barrier,
    scales,
    store_tile,
    tile_bounds,
    warp_group_barrier,
)
from kernels.attention.pieces import find_work
from kernels.attention.tiles import choose_consumers
from kernels.launch import cdiv, launch_on, settle

ROWS = gl.constexpr(64)  # queries of a consumer: the rows of a warp group's matrix instruction
# Of a consumer's thread, by how many consumers there are. The producer has what is left: of 168 a thread of three warp
# groups, or of 128 a thread of four. (Two consumers with 240 spill no less, and leave it so few that it spills.)
REGISTERS = {2: 232, 3: 160}
SLOTS = {64: 3, 128: 3, 256: 2}  # tiles of K, and of V, in shared memory, by head size: as many as it has room for
Q_FULL, Q_EMPTY, V_RAW = gl.constexpr(0), gl.constexpr(3), gl.constexpr(6)  # barriers, and where the others begin
K_FULL, K_EMPTY, V_FULL, V_EMPTY, BARRIERS = (gl.constexpr(7 + i * max(SLOTS.values())) for i in range(5))


@gluon.jit
def hand_over(number, raw, tiles_s, flags_s, signals, BLOCK_K: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr):
    """Pass on the tile of V that is number `number` of all and `raw` of those cut, once it is there and clean."""
    slot = number % SLOTS
    mbarrier.wait(signals.index(V_RAW), raw & 1)
    clean_values(tiles_s.index(2 * slot + 1).reshape([BLOCK_K, D]), flags_s.index(slot), D, BLOCK_K)
    mbarrier.arrive(signals.index(V_FULL + slot), count=1)


@gluon.jit
def producer(
    q_desc,
    k_desc,
    v_desc,
    q_s,
    tiles_s,
    flags_s,
    signals,
    call,
    shape,
    n_tiles,
    section,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    GUARDED: gl.constexpr,
):
    """Copy the tiles of every piece of work of this program to shared memory, in the order of the consumers."""
    count = 0  # key tiles copied so far
    raw = 0  # tiles of V looked at so far
    turn = 0  # pieces of work so far
    n_heads = shape.batch * shape.n_heads
    for work in range(gl.program_id(0), n_tiles * n_heads, gl.num_programs(0)):
        head, tile = find_work(work, n_heads, n_tiles, section)
        start_q = (n_tiles - 1 - tile) * CONSUMERS * ROWS  # the longest first
        b = head // shape.n_heads
        h = head % shape.n_heads
        _, _, first, last, open_first, open_last = tile_bounds(call, shape, start_q, b, CONSUMERS * ROWS, BLOCK_K)
        was_cut = last < first  # of the tile before: there is none
        for seen in range(last - first + 2):  # once more than there are tiles, for what comes after the last
            tile = last - seen
            slot = count % SLOTS
            phase = count // SLOTS & 1
            place = [b, h // shape.group, tile * BLOCK_K, 0]
            if tile >= first:
                mbarrier.wait(signals.index(K_EMPTY + slot), phase ^ 1)
                mbarrier.expect(signals.index(K_FULL + slot), k_desc.block_type.nbytes)
                load_tile(k_desc, place, signals.index(K_FULL + slot), tiles_s.index(2 * slot))
            if GUARDED:
                if was_cut:  # its values are looked at only now, so that K of this one is under way meanwhile
                    hand_over(count - 1, raw, tiles_s, flags_s, signals, BLOCK_K, D, SLOTS)
                    raw += 1
            # The memory of the queries holds output until the work before is done: K and V have gone ahead of them.
            if seen == gl.minimum(turn, 1):
                for i in gl.static_range(CONSUMERS):
                    mbarrier.wait(signals.index(Q_EMPTY + i), (turn & 1) ^ 1)
                    mbarrier.expect(signals.index(Q_FULL + i), q_desc.block_type.nbytes)
                    load_tile(q_desc, [b, h, start_q + i * ROWS, 0], signals.index(Q_FULL + i), q_s.index(i))
            if tile >= first:
                mbarrier.wait(signals.index(V_EMPTY + slot), phase ^ 1)
                full = V_FULL + slot
                if GUARDED:
                    was_cut = (tile >= open_last) | (tile < open_first)
                    full = gl.where(was_cut, V_RAW, full)
                mbarrier.expect(signals.index(full), v_desc.block_type.nbytes)
                load_tile(v_desc, place, signals.index(full), tiles_s.index(2 * slot + 1))
                count += 1
        turn += 1


@gluon.jit
def multiply_keys(q, tiles_s, signals, count, BLOCK_K: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr):
    """Start Q K^T with the tile of K that is number `count`, once it is there."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    slot = count % SLOTS
    mbarrier.wait(signals.index(K_FULL + slot), count // SLOTS & 1)
    k = tiles_s.index(2 * slot).reshape([BLOCK_K, D]).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([ROWS, BLOCK_K], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def multiply_values(weights, acc, tiles_s, signals, count, BLOCK_K: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr):
    """Start acc + P V with the tile of V that is number `count`, once it is there."""
    slot = count % SLOTS
    mbarrier.wait(signals.index(V_FULL + slot), count // SLOTS & 1)
    return warpgroup_mma(weights, tiles_s.index(2 * slot + 1).reshape([BLOCK_K, D]), acc, is_async=True)


@gluon.jit
def online_softmax(
    scores, row_max, row_sum, place, tile, n_keys, call, before, after, BLOCK_K: gl.constexpr, CHECKED: gl.constexpr
):
    """One step of the online softmax: weights (ROWS, BLOCK_K) float32, shrink, row_max, row_sum, and who may attend.

    place: of the queries (ROWS,) beside the keys. CHECKED: some query may not attend to some key of the tile.
    """
    factor = before
    if call.softcap is not None:
        scores = cap(scores, before, after)
        factor = 1.0
    j = tile * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, scores.type.layout))
    allowed = (j < n_keys)[None, :]
    if CHECKED:
        if call.right is not None:
            allowed = allowed & (j[None, :] <= place[:, None] + call.right)
        if call.left is not None:
            allowed = allowed & (j[None, :] >= place[:, None] - call.left)
        scores = gl.where(allowed, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * factor)
    pivot = new_max
    if CHECKED:
        pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores * factor - pivot[:, None])
    shrink = gl.exp2(row_max - pivot)
    return weights, shrink, new_max, row_sum * shrink + gl.sum(weights, 1), allowed


@gluon.jit
def mark_nonfinite(weights, allowed, flags_s, signals, count, SLOTS: gl.constexpr):
    """NaN for the weights of keys whose values were NaN or Inf, where a query may attend to them: a cut tile."""
    slot = count % SLOTS
    mbarrier.wait(signals.index(V_FULL + slot), count // SLOTS & 1)  # the flags come with the values
    good = flags_s.index(slot).load(gl.SliceLayout(0, weights.type.layout))
    return gl.where(allowed & (good == 0)[None, :], float("nan"), weights)


@gluon.jit
def step(
    q,
    tiles_s,
    flags_s,
    signals,
    weights,
    acc,
    row_max,
    row_sum,
    count,
    place,
    tile,
    n_keys,
    call,
    before,
    after,
    ME: gl.constexpr,
    NEXT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CHECKED: gl.constexpr,
):
    """Q K^T of tile number `count` and its softmax, beside P V of the one before: weights, acc, row_max, row_sum.

    CHECKED: an edge cuts the tile. To look at every score takes registers, so one product then follows the other.
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot_before = (count - 1) % SLOTS
    named_barrier("sync", ME)
    if CHECKED:
        sum_ = multiply_values(weights, acc, tiles_s, signals, count - 1, BLOCK_K, D, SLOTS)
        acc = warpgroup_mma_wait(0, deps=[sum_])
        mbarrier.arrive(signals.index(V_EMPTY + slot_before), count=1)
        product = multiply_keys(q, tiles_s, signals, count, BLOCK_K, D, SLOTS)
        named_barrier("arrive", NEXT)
        scores = warpgroup_mma_wait(0, deps=[product])
    else:
        product = multiply_keys(q, tiles_s, signals, count, BLOCK_K, D, SLOTS)
        sum_ = multiply_values(weights, acc, tiles_s, signals, count - 1, BLOCK_K, D, SLOTS)
        named_barrier("arrive", NEXT)
        scores = warpgroup_mma_wait(1, deps=[product])
    mbarrier.arrive(signals.index(K_EMPTY + count % SLOTS), count=1)
    p, shrink, row_max, row_sum, allowed = online_softmax(
        scores, row_max, row_sum, place, tile, n_keys, call, before, after, BLOCK_K, CHECKED
    )
    if CHECKED:
        p = mark_nonfinite(p, allowed, flags_s, signals, count, SLOTS)
    else:
        acc = warpgroup_mma_wait(0, deps=[sum_])
        mbarrier.arrive(signals.index(V_EMPTY + slot_before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, wide))[:, None]
    return gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, wide, 2)), acc, row_max, row_sum


@gluon.jit
def consumer(
    ME: gl.constexpr,
    NEXT: gl.constexpr,
    INDEX: gl.constexpr,
    out_desc,
    row_max_ptr,
    row_sum_ptr,
    q_s,
    tiles_s,
    flags_s,
    signals,
    call,
    shape,
    n_tiles,
    section,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    GUARDED: gl.constexpr,
):
    """Output and statistics of ROWS queries of every piece of work of this program. ME, NEXT: named barriers."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, narrow)
    before, after = scales(call)
    q = q_s.index(INDEX).reshape([ROWS, D])
    if INDEX == CONSUMERS - 1:
        named_barrier("arrive", NEXT)  # the first consumer begins
    count = 0
    turn = 0
    n_heads = shape.batch * shape.n_heads
    for work in range(gl.program_id(0), n_tiles * n_heads, gl.num_programs(0)):
        head, tile = find_work(work, n_heads, n_tiles, section)
        start_q = (n_tiles - 1 - tile) * CONSUMERS * ROWS  # the longest first
        b = head // shape.n_heads
        n_keys, offset, first, last, open_first, open_last = tile_bounds(
            call, shape, start_q, b, CONSUMERS * ROWS, BLOCK_K
        )
        place = start_q + offset + INDEX * ROWS + gl.arange(0, ROWS, rows)  # of the queries, beside the keys
        acc = gl.zeros([ROWS, D], gl.float32, wide)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, rows)
        row_sum = gl.zeros([ROWS], gl.float32, rows)
        mbarrier.wait(signals.index(Q_FULL + INDEX), turn & 1)
        named_barrier("sync", ME)
        product = multiply_keys(q, tiles_s, signals, count, BLOCK_K, D, SLOTS)
        named_barrier("arrive", NEXT)
        scores = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(signals.index(K_EMPTY + count % SLOTS), count=1)
        p, _, row_max, row_sum, allowed = online_softmax(
            scores, row_max, row_sum, place, last, n_keys, call, before, after, BLOCK_K, True
        )
        if GUARDED:
            if (last >= open_last) | (last < open_first):
                p = mark_nonfinite(p, allowed, flags_s, signals, count, SLOTS)
        weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, wide, 2))
        count += 1
        for PART in gl.static_range(3):  # tiles cut at the right edge, open ones, tiles cut at a window's left
            low, high = first, open_first
            if PART == 0:
                low, high = open_last, last
            if PART == 1:
                low, high = open_first, open_last
            if PART == 1 or call.left is not None or (PART == 0 and call.right is not None):
                for seen in range(high - low):
                    weights, acc, row_max, row_sum = step(
                        q,
                        tiles_s,
                        flags_s,
                        signals,
                        weights,
                        acc,
                        row_max,
                        row_sum,
                        count,
                        place,
                        high - 1 - seen,
                        n_keys,
                        call,
                        before,
                        after,
                        ME,
                        NEXT,
                        BLOCK_K,
                        D,
                        SLOTS,
                        PART != 1,
                    )
                    count += 1
        sum_ = multiply_values(weights, acc, tiles_s, signals, count - 1, BLOCK_K, D, SLOTS)
        acc = warpgroup_mma_wait(0, deps=[sum_])
        mbarrier.arrive(signals.index(V_EMPTY + (count - 1) % SLOTS), count=1)
        inverse = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)  # zero: no key allowed
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, wide))[:, None]
        i = start_q + INDEX * ROWS + gl.arange(0, ROWS, rows)
        stats = head.to(gl.int64) * shape.L
        gl.store(row_max_ptr + stats + i, row_max * 0.6931471805599453, mask=i < shape.L)  # in natural units
        gl.store(row_sum_ptr + stats + i, row_sum, mask=i < shape.L)
        q.store(acc.to(q.dtype))  # the queries are not needed any more
        fence_async_shared()
        warp_group_barrier()
        store_tile(out_desc, [b, head % shape.n_heads, start_q + INDEX * ROWS, 0], q_s.index(INDEX))
        tma.store_wait(0)
        mbarrier.arrive(signals.index(Q_EMPTY + INDEX), count=1)
        turn += 1


# barrier  count  a phase of it completes when                         who waits for it
# q_full   1      ROWS queries have been copied                          their consumer, before its first product
# q_empty  1      their consumer's output has left the same memory     the producer, before it copies the next queries
# k_full   1      a tile of K has been copied                          every consumer, before it multiplies by it
# k_empty  2 or 3 every consumer's product with it is done             the producer, before it copies into that slot
# v_full   1      a tile of V has been copied, or, if cut, cleaned     every consumer, before it multiplies by it
# v_empty  2 or 3 every consumer's product with it is done             the producer, before it copies into that slot
# v_raw    1      a cut tile of V has been copied                      the producer, before it cleans it
#
# Tile number n of K, and of V, counted over all pieces of work, is in slot n % SLOTS and in phase n // SLOTS of its
# barriers; queries number t are in phase t of theirs, cut tile number r in phase r of v_raw. Who waits for "full" waits
# for the parity of that phase; who waits for "empty" for that of the phase before, which goes through where there was
# none. An expected copy is the one arrival of its barrier. The turns go round: a consumer waits at the named barrier
# ME for the one before it, and comes to NEXT when it has issued its products. tests/test_hopper_order.py runs this on a
# CPU in many orders, and finds that each wait and each arrival is needed.


@gluon.jit
def hopper_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    row_max_ptr,
    row_sum_ptr,
    call,
    shape,
    n_tiles,
    section,
    BLOCK_K: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    GUARDED: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """Output and statistics of this program's share of the tiles of ROWS queries a consumer.

    q_desc, k_desc, v_desc, out_desc: descriptors of (B, H, rows, D) in boxes (1, 1, ROWS or BLOCK_K, D).
    row_max_ptr, row_sum_ptr (B, n_heads, L) float32. call, shape: as for forward_kernel. n_tiles: of queries, a head.
    section: heads that are walked over together. GUARDED: an edge may cut a tile.
    """
    # Few allocations: each is handed to the warp groups as several registers.
    q_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    tiles_s = gl.allocate_shared_memory(DTYPE, [2 * SLOTS, 1, 1, BLOCK_K, D], k_desc.layout)  # K and V in turn
    flags_s = gl.allocate_shared_memory(gl.int32, [SLOTS, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    signals = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(signals.index(Q_FULL + i), count=1)
        mbarrier.init(signals.index(Q_EMPTY + i), count=1)
    mbarrier.init(signals.index(V_RAW), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(signals.index(K_FULL + slot), count=1)
        mbarrier.init(signals.index(V_FULL + slot), count=1)
        mbarrier.init(signals.index(K_EMPTY + slot), count=CONSUMERS)
        mbarrier.init(signals.index(V_EMPTY + slot), count=CONSUMERS)
    # Two lists, each whole: of one that is put together from parts Triton forgets which values are compile-time ones.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (producer, (
                q_desc, k_desc, v_desc, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
            (consumer, (
                BARRIER_A, BARRIER_B, 0,
                out_desc, row_max_ptr, row_sum_ptr, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
            (consumer, (
                BARRIER_B, BARRIER_A, 1,
                out_desc, row_max_ptr, row_sum_ptr, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, (
                q_desc, k_desc, v_desc, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
            (consumer, (
                BARRIER_A, BARRIER_B, 0,
                out_desc, row_max_ptr, row_sum_ptr, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
            (consumer, (
                BARRIER_B, BARRIER_C, 1,
                out_desc, row_max_ptr, row_sum_ptr, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
            (consumer, (
                BARRIER_C, BARRIER_A, 2,
                out_desc, row_max_ptr, row_sum_ptr, q_s, tiles_s, flags_s, signals, call, shape, n_tiles, section,
                BLOCK_K, D, SLOTS, CONSUMERS, GUARDED,
            )),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip


settle(hopper_forward_kernel)


def launch_hopper_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    output: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
) -> None:
    """Launch the forward kernel. Arguments as of `launch_forward` in general.py, of a call that plan.py gives it."""
    d, shape = query.shape[3], shape_of(query, key, call)
    consumers = choose_consumers(d, shape.L, call.right is not None)
    n_tiles = cdiv(shape.L, consumers * int(ROWS))
    block_k = 64 if d == 256 else 128
    options = hopper_options(query, call)
    dtype = options["DTYPE"]
    section = heads_in_turn(shape.group, 2 * shape.S * d * query.itemsize, call, query.device)
    programs = launch.multiprocessors(query.device)  # they stay; work in turns
    with launch_on(query.device):
        run_kernel(
            hopper_forward_kernel,
            (min(n_tiles * shape.batch * shape.n_heads, programs),),
            descriptor(query, ROWS, dtype),
            descriptor(key, block_k, dtype),
            descriptor(value, block_k, dtype),
            descriptor(output, ROWS, dtype),
            row_max,
            row_sum,
            for_kernel(call),
            shape,
            n_tiles,
            section,
            BLOCK_K=block_k,
            D=d,
            SLOTS=SLOTS[d],
            CONSUMERS=consumers,
            REGISTERS=REGISTERS[consumers],
            **options,
        )
