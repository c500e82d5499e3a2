"""Compile every kernel for real GPUs on a machine without one, and read registers and spills from the machine code.

    python -m bench.compile_check [--arch 80 90 100] [--quick] [--jobs 2]

Prints one line a kernel: tile, registers a thread, bytes of spills, shared memory, kind of matrix instruction. Exits
with 1 if a kernel does not compile or needs more shared memory than the chip has, if a 16-bit kernel with heads of at
most 128 spills, or if one whose tile allows warp-group matrix instructions on sm_90 has none.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}  # Triton's name: bytes of an element
HEAD_SIZES = (16, 32, 64, 128, 256)
# Bytes of shared memory a program can have (CUDA programming guide, table of compute capabilities). For 80 the smaller
# limit of its consumer relatives 86 and 89 is kept to, which run the same tiles.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}


class Case(NamedTuple):
    """A kernel with one choice of compile-time arguments, in picklable form."""

    module: str
    function: str
    label: str
    signature: dict[str, str]  # argument: Triton type, "constexpr" for those below
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    arch: int
    no_spills: bool  # the case fails if it spills
    wgmma: bool  # the case fails without warp-group matrix instructions


class Result(NamedTuple):
    """What the machine code of a case says."""

    case: Case
    registers: int
    spills: int
    shared: int
    matrix: str
    seconds: float
    fault: str


def attention_cases(archs: list[int], dtypes: list[str], head_sizes: list[int]) -> Iterator[Case]:
    """Each attention kernel at each tile the launcher can choose: plain, causal, every feature at once, few queries."""
    from kernels.attention.tiles import block_of, choose_tile

    places = {
        "forward": ("general", "forward_kernel"),
        "query": ("general_backward", "query_kernel"),
        "key_value": ("general_backward", "key_value_kernel"),
        "mask": ("mask_gradient", "mask_kernel"),
    }
    features = {
        "plain": (False, False, 4096),
        "causal": (True, False, 4096),
        "all": (True, True, 4096),
        "few": (True, True, 1),
    }
    for arch, dtype, head_size in itertools.product(archs, dtypes, head_sizes):
        sizes = {"E": head_size, "EV": head_size, "BLOCK_E": block_of(head_size), "BLOCK_EV": block_of(head_size)}
        for kernel, (name, (is_causal, heavy, n_queries)) in itertools.product(places, features.items()):
            if kernel == "mask" and not heavy:
                continue
            tile = choose_tile(kernel, head_size, DTYPES[dtype], n_queries, arch, heavy)
            constexprs: dict[str, Any] = {**sizes, "IS_CAUSAL": is_causal, "HAS_DROPOUT": heavy, "PRECISION": "ieee"}
            constexprs |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "WIDE": False}
            if kernel == "mask":
                constexprs |= {"SUM_B": True, "SUM_H": False, "SUM_L": False, "SUM_S": False}
            else:
                constexprs["MASK"] = 2 if heavy else 0
            module, function = places[kernel]
            rows = tile.block_k if kernel == "key_value" else tile.block_q
            yield make_case(
                f"kernels.attention.{module}", function, f"{dtype} D{head_size} {name}", dtype, constexprs,
                absent=() if heavy else ("mask_ptr", "seed_ptr"), num_warps=tile.num_warps, num_stages=tile.num_stages,
                arch=arch, no_spills=dtype != "fp32" and head_size <= 128,
                wgmma=arch == 90 and dtype != "fp32" and rows >= 64,
            )  # fmt: skip
        constexprs = {"EV": head_size, "BLOCK_EV": block_of(head_size), "BLOCK_Q": 16}
        yield make_case(
            "kernels.attention.general_backward", "delta_kernel", f"{dtype} D{head_size}", dtype, constexprs, absent=(),
            num_warps=4, num_stages=2, arch=arch, no_spills=dtype != "fp32", wgmma=False,
        )  # fmt: skip


def make_case(
    module: str, function: str, label: str, dtype: str, constexprs: dict[str, Any], absent: tuple[str, ...], **rest: Any
) -> Case:
    """A case of an attention kernel, its argument types told from their names. absent: arguments that are None."""
    constexprs = dict(constexprs)
    signature = {}
    for name in getattr(importlib.import_module(module), function).arg_names:
        if name in absent:
            constexprs[name] = None
        elif re.fullmatch(r"stride_\w+e|stride_d?ms", name):
            constexprs[name] = 1  # the last axis is contiguous, as Triton specialises it at a launch
        if name in constexprs:
            signature[name] = "constexpr"
        elif name == "seed_ptr":
            signature[name] = "*i64"
        elif name in ("row_max_ptr", "row_sum_ptr", "delta_ptr"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name.endswith("scale") or name == "dropout_p":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
    return Case(module, function, label, signature, constexprs, **rest)


def compile_case(case: Case) -> Result:
    """Compile for the case's chip and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    started = time.perf_counter()
    names = list(case.signature)
    aligned = [n for n, t in case.signature.items() if t.startswith("*") or (n.startswith("stride") and t == "i32")]
    try:
        source = ASTSource(
            getattr(importlib.import_module(case.module), case.function),
            case.signature,
            {(names.index(name),): value for name, value in case.constexprs.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[-1] if text else ''}"
        return Result(case, 0, 0, 0, "", time.perf_counter() - started, reason)
    registers, spills = read_resources(compiled.asm["cubin"])
    kinds = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
    matrix = next((kind for kind, instruction in kinds.items() if instruction in compiled.asm["ptx"]), "-")
    shared = compiled.metadata.shared
    fault = ""
    if shared > SHARED_MEMORY[case.arch]:
        fault = f"needs {shared} bytes of shared memory, has {SHARED_MEMORY[case.arch]}"
    elif case.no_spills and spills:
        fault = f"spills {spills} bytes"
    elif case.wgmma and matrix != "wgmma":
        fault = f"no warp-group matrix instruction, found {matrix}"
    return Result(case, registers, spills, shared, matrix, time.perf_counter() - started, fault)


def read_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack (spills) of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return int(registers), int(stack)


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--quick", action="store_true", help="bf16 and float32, two head sizes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile_check_")  # compile, whatever was compiled before
    import triton

    dtypes = ["bf16", "fp32"] if options.quick else list(DTYPES)
    head_sizes = [64, 128] if options.quick else list(HEAD_SIZES)
    cases = list(attention_cases(options.arch, dtypes, head_sizes))
    print(f"triton {triton.__version__}, {len(cases)} kernels")
    print(f"{'sm':>3}  {'kernel':<17} {'case':<18} {'tile':>8} warps stages regs spills  shared matrix")
    faults = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for case, registers, spills, shared, matrix, _, fault in pool.map(compile_case, cases, chunksize=4):
            sizes = [case.constexprs[n] for n in ("BLOCK_Q", "BLOCK_K", "ROWS", "BLOCK_N") if n in case.constexprs]
            tile = "x".join(map(str, sizes))
            print(
                f"{case.arch:>3}  {case.function:<17} {case.label:<18} {tile:>8} {case.num_warps:>5} {case.num_stages:>6}"
                f" {registers:>4} {spills:>6} {shared:>7} {matrix:<7} {fault and 'FAULT: ' + fault}".rstrip(),
                flush=True,
            )
            faults += bool(fault)
    print(f"{len(cases) - faults} passed, {faults} failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
