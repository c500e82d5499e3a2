"""What to compile to know that every layer norm kernel fits every GPU: widths x dtypes at the launchers' own tiles.

The kernels must be imported without Triton's interpreter (TRITON_INTERPRET unset) to be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from kernels.layer_norm import backward, forward

WIDTHS = (64, 256, 768, 1000, 1001, 1024, 4096, 8192, 16384, 65536)
ELEMENT_SIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
INTEGERS = ("n_rows", "n_cols", "stride_row", "stride_grad", "stride_input", "n_groups", "n_partials")
DIVISIBLE_BY_16 = ("n_cols", "stride_row", "stride_grad", "stride_input")


class CompileCase(NamedTuple):
    """Arguments of `triton.compiler.ASTSource` (fn, signature, constexprs, attrs) and options of `triton.compile`."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int


def compile_cases() -> Iterator[CompileCase]:
    """Yield every case; pointers, and integers that the launchers pass as such, are aligned as in a real call."""
    for dtype, element_size in ELEMENT_SIZE.items():
        for n_cols in WIDTHS:
            tile = forward.forward_tile(n_cols, element_size)
            fn = forward.forward_chunks_kernel if tile.chunked else forward.forward_rows_kernel
            constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n}
            yield _case(fn, dtype, tile.num_warps, n_cols, **constants)

            tile = backward.backward_tile(n_cols, element_size)
            fn = backward.backward_chunks_kernel if tile.chunked else backward.backward_rows_kernel
            constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n, "NUM_STAGES": tile.num_stages}
            yield _case(fn, dtype, tile.num_warps, n_cols, **constants)
        rows, block_n, num_stages = backward.COLUMNS
        constants = {"ROWS": rows, "BLOCK_N": block_n, "NUM_STAGES": num_stages}
        yield _case(backward.backward_columns_kernel, dtype, 4, 16384, **constants)
        rows, block_n = backward.REDUCE
        yield _case(backward.reduce_partials_kernel, dtype, 4, 1024, ROWS=rows, BLOCK_N=block_n)

    tile = forward.forward_tile(1024, 2)
    constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n, "weight_ptr": None, "bias_ptr": None}
    yield _case(forward.forward_rows_kernel, "bf16", tile.num_warps, 1024, **constants)
    tile = backward.backward_tile(1024, 2)
    constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n, "NUM_STAGES": tile.num_stages}
    unused = {"weight_ptr": None, "partial_weight_ptr": None, "partial_bias_ptr": None}
    yield _case(backward.backward_rows_kernel, "bf16", tile.num_warps, 1024, **constants, **unused)


def _case(fn: Any, dtype: str, num_warps: int, n_cols: int, **constants: Any) -> CompileCase:
    """The case of one kernel: `constants` are its constexprs (those it has) and the pointers that are None."""
    constants |= {"ALIGN": math.gcd(n_cols, forward.MAX_ALIGN)}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in fn.arg_names}
    aligned = [
        (i,)
        for i, (name, type_) in enumerate(signature.items())
        if type_[0] == "*" or (name in DIVISIBLE_BY_16 and n_cols % 16 == 0)
    ]
    attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    without = ", no weight" if "weight_ptr" in constants else ""
    return CompileCase(
        f"{fn.__name__} N={n_cols} {dtype}{without}", fn, signature, constants, attrs, num_warps, num_stages=3
    )


def _type(name: str, dtype: str) -> str:
    """Triton's name for the type of an argument."""
    if name in INTEGERS:
        return "i32"
    if name == "eps":
        return "fp32"
    return "*fp32" if name in ("mean_ptr", "rstd_ptr") or name.startswith("partial_") else f"*{dtype}"
