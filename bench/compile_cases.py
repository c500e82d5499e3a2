"""What to compile to know that every kernel fits every GPU: each kernel at each tile its launcher can choose."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}  # Triton's name: bytes of an element
HEAD_SIZES = (16, 32, 64, 128, 256)
WIDTHS = (64, 256, 768, 1000, 1001, 1024, 4096, 8192, 16384, 65536)  # of layer norm rows


class Case(NamedTuple):
    """A kernel with one choice of compile-time arguments; picklable."""

    module: str
    function: str
    label: str
    tile: str
    signature: dict[str, str]  # argument: Triton type, or "constexpr" for those below
    constexprs: dict[str, Any]
    aligned: list[str]  # arguments divisible by 16
    num_warps: int
    num_stages: int
    arch: int
    no_spills: bool  # the case fails if it spills
    wgmma: bool  # the case fails without warp-group matrix instructions


def attention_cases(arch: int, dtype: str, head_size: int) -> Iterator[Case]:
    """The attention kernels: with each feature that changes the tile, and with all at once."""
    from kernels.attention.tiles import block_of, choose_tile

    places = {
        "forward": ("general", "forward_kernel"),
        "query": ("general_backward", "query_kernel"),
        "key_value": ("general_backward", "key_value_kernel"),
        "mask": ("mask_gradient", "mask_kernel"),
    }
    features = {  # name: (is_causal, has a float mask, has_dropout, L)
        "plain": (False, False, False, 4096),
        "causal": (True, False, False, 4096),
        "mask": (True, True, False, 4096),
        "all": (True, True, True, 4096),
        "few": (True, True, True, 1),
    }
    block = block_of(head_size)
    sizes = {"E": head_size, "EV": head_size, "BLOCK_E": block, "BLOCK_EV": block}
    no_spills = dtype != "fp32" and head_size <= 128
    for kernel, (feature, (is_causal, masked, dropped, n_queries)) in itertools.product(places, features.items()):
        if kernel == "mask" and not masked:
            continue
        tile = choose_tile(kernel, head_size, DTYPES[dtype], n_queries, arch, dropped)
        constexprs: dict[str, Any] = {**sizes, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
        constexprs |= {"IS_CAUSAL": is_causal, "HAS_DROPOUT": dropped, "PRECISION": "ieee", "WIDE": False}
        if kernel == "mask":
            constexprs |= {"SUM_B": True, "SUM_H": False, "SUM_L": False, "SUM_S": False}
        else:
            constexprs |= {"MASK": 2 if masked else 0}
        constexprs |= {} if masked else {"mask_ptr": None}
        constexprs |= {} if dropped else {"seed_ptr": None}
        module, function = places[kernel]
        rows = tile.block_k if kernel == "key_value" else tile.block_q
        yield _case(
            f"kernels.attention.{module}", function, f"{dtype} D{head_size} {feature}", dtype, constexprs,
            tile=f"{tile.block_q}x{tile.block_k}", num_warps=tile.num_warps, num_stages=tile.num_stages, arch=arch,
            no_spills=no_spills, wgmma=arch == 90 and dtype != "fp32" and rows >= 64,
        )  # fmt: skip
    constexprs = {"EV": head_size, "BLOCK_EV": block, "BLOCK_Q": 16}
    yield _case(
        "kernels.attention.general_backward", "delta_kernel", f"{dtype} D{head_size}", dtype, constexprs, tile="16",
        num_warps=4, num_stages=2, arch=arch, no_spills=no_spills, wgmma=False,
    )  # fmt: skip


def layer_norm_cases(arch: int, dtype: str, widths: tuple[int, ...] = WIDTHS) -> Iterator[Case]:
    """The layer norm kernels at the tiles of each width, with weight and bias."""
    from kernels.layer_norm import backward, forward

    size = DTYPES[dtype]
    for n_cols in widths:
        tile = forward.forward_tile(n_cols, size)
        name = "forward_chunks_kernel" if tile.chunked else "forward_rows_kernel"
        yield _layer_norm_case(arch, dtype, "forward", name, n_cols, tile.rows, tile.block_n, tile.num_warps)
        back = backward.backward_tile(n_cols, size)
        name = "backward_chunks_kernel" if back.chunked else "backward_rows_kernel"
        yield _layer_norm_case(
            arch, dtype, "backward", name, n_cols, back.rows, back.block_n, back.num_warps, NUM_STAGES=back.num_stages
        )
    rows, block_n, num_stages = backward.COLUMNS
    yield _layer_norm_case(
        arch, dtype, "backward", "backward_columns_kernel", 16384, rows, block_n, 4, NUM_STAGES=num_stages
    )
    rows, block_n = backward.REDUCE
    yield _layer_norm_case(arch, dtype, "backward", "reduce_partials_kernel", 1024, rows, block_n, 4)


def _layer_norm_case(
    arch: int, dtype: str, module: str, function: str, n_cols: int, rows: int, block_n: int, num_warps: int, **more: int
) -> Case:
    constexprs = {"ROWS": rows, "BLOCK_N": block_n, "ALIGN": math.gcd(n_cols, 8), **more}
    return _case(
        f"kernels.layer_norm.{module}", function, f"{dtype} N{n_cols}", dtype, constexprs, tile=f"{rows}x{block_n}",
        num_warps=num_warps, num_stages=3, arch=arch, no_spills=True, wgmma=False, whole=n_cols % 16 == 0,
    )  # fmt: skip


def _case(
    module: str, function: str, label: str, dtype: str, constexprs: dict[str, Any], whole: bool = True, **rest: Any
) -> Case:
    """A case, the types of its arguments told from their names.

    constexprs: those that the kernel has are taken, and arguments that are None. whole: row strides divide by 16.
    """
    names = getattr(importlib.import_module(module), function).arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    signature = {}
    for name in names:
        if re.fullmatch(r"stride_\w+e|stride_d?ms", name):
            constexprs[name] = 1  # the last axis is contiguous, as Triton specialises it at a launch
        signature[name] = "constexpr" if name in constexprs else _type(name, dtype)
    divisible = [name for name in names if name.startswith("stride") or name == "n_cols"] if whole else []
    pointers = [name for name in names if name.endswith("_ptr")]
    aligned = [name for name in (*pointers, *divisible) if signature[name] != "constexpr"]
    return Case(module, function, label, signature=signature, constexprs=constexprs, aligned=aligned, **rest)


def _type(name: str, dtype: str) -> str:
    if name == "seed_ptr":
        return "*i64"
    if name in ("row_max_ptr", "row_sum_ptr", "delta_ptr", "mean_ptr", "rstd_ptr") or name.startswith("partial"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name.endswith("scale") or name in ("dropout_p", "eps") else "i32"
