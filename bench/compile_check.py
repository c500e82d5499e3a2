"""Compile every kernel for real GPUs on a machine without one, and read registers and spills from the machine code.

    python -m bench.compile_check [--arch 80 90 100] [--quick] [--jobs 2] [--spills-allowed]

Prints one line a kernel: tile, registers a thread, bytes of spills, shared memory, kind of matrix instruction. Exits
with 1 if a kernel does not compile or needs more shared memory than the chip has, if a layer norm kernel or a 16-bit
attention kernel with heads of at most 128 spills, or if an attention kernel whose tile allows warp-group matrix
instructions on sm_90 has none.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.compile_cases import DTYPES, HEAD_SIZES, WIDTHS, Case, attention_cases, layer_norm_cases

# Bytes of shared memory a program can have (CUDA programming guide, table of compute capabilities). For 80 the smaller
# limit of its consumer relatives 86 and 89 is kept to, which run the same tiles.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
MATRIX_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}  # name: in PTX


class Result(NamedTuple):
    """What the machine code of a case says, and what is wrong with it (empty: nothing)."""

    registers: int
    spills: int
    shared: int
    matrix: str
    fault: str


def compile_case(case: Case) -> Result:
    """Compile for the case's chip and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index = {name: i for i, name in enumerate(case.signature)}
    source = ASTSource(
        getattr(importlib.import_module(case.module), case.function),
        case.signature,
        {(index[name],): value for name, value in case.constexprs.items()},
        {(index[name],): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        return Result(0, 0, 0, "", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")
    registers, spills = read_resources(compiled.asm["cubin"])
    matrix = next((name for name, ptx in MATRIX_INSTRUCTIONS.items() if ptx in compiled.asm["ptx"]), "-")
    shared = compiled.metadata.shared
    fault = ""
    if shared > SHARED_MEMORY[case.arch]:
        fault = f"needs {shared} bytes of shared memory, has {SHARED_MEMORY[case.arch]}"
    elif case.no_spills and spills:
        fault = f"spills {spills} bytes"
    elif case.wgmma and matrix != "wgmma":
        fault = f"no warp-group matrix instruction, found {matrix}"
    return Result(registers, spills, shared, matrix, fault)


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


def all_cases(archs: list[int], quick: bool) -> list[Case]:
    """The cases of these chips; `quick`: two dtypes, two head sizes, three widths."""
    dtypes = ["bf16", "fp32"] if quick else list(DTYPES)
    head_sizes = (64, 128) if quick else HEAD_SIZES
    widths = (64, 1024, 16384) if quick else WIDTHS
    cases = [c for arch in archs for dtype in dtypes for size in head_sizes for c in attention_cases(arch, dtype, size)]
    return cases + [c for arch in archs for dtype in dtypes for c in layer_norm_cases(arch, dtype, widths)]


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    parser.add_argument("--quick", action="store_true", help="bf16 and float32, two head sizes, three widths")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--spills-allowed", action="store_true", help="print spills, but do not fail for them")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile_check_")  # compile, whatever was compiled before
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 asks; earlier ones fuse anyway
    import triton

    cases = all_cases(options.arch, options.quick)
    print(f"triton {triton.__version__}, {len(cases)} kernels")
    print(" sm  kernel                  case               tile  warps stages  regs spills shared matrix")
    faults = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for case, (registers, spills, shared, matrix, fault) in zip(cases, pool.map(compile_case, cases, chunksize=4)):
            if options.spills_allowed and fault.startswith("spills"):
                fault = ""
            print(
                f"{case.arch:>3}  {case.function:<23} {case.label:<16} {case.tile:>8} {case.num_warps:>5} "
                f"{case.num_stages:>6} {registers:>5} {spills:>6} {shared:>6} {matrix:<7} "
                f"{fault and 'FAULT: ' + fault}".rstrip(),
                flush=True,
            )
            faults += bool(fault)
    print(f"{len(cases) - faults} kernels fit, {faults} do not")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
