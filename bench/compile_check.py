"""Compile every kernel for real GPUs on a machine without one, and read registers and spills from the machine code.

    python -m bench.compile_check [--arch 80 90 100 120] [--tiles] [--quick] [--jobs 2] [--spills-allowed]

Prints one line a kernel: tile, registers a thread, bytes of spills, shared memory, kind of matrix instruction. Exits
with 1 if a kernel does not compile or needs more shared memory than the chip has, if a norm kernel or a 16-bit
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
from typing import Any, NamedTuple
from unittest import mock

from bench.compile_cases import Case, all_cases, launch

# Bytes of shared memory a program can have (CUDA programming guide, table of compute capabilities). For 80 the smaller
# limit of its consumer relatives 86 and 89 is kept to, which run the same tiles.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MATRIX_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}  # name: in PTX


class Result(NamedTuple):
    """What the machine code of a kernel says, and what is wrong with it (empty: nothing)."""

    kernel: str
    tile: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    matrix: str
    fault: str


class PretendedDriver:
    """As much of a Triton driver as compiling asks for. The chip is the device's number too: a cache for each."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_case(case: Case) -> list[Result]:
    """Compile what the launchers of a case launch, for its chip, and read the machine code."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kernels.attention import general
    backward = importlib.import_module("kernels.layer_norm.backward")

    results: list[Result] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # whatever the compiler raises is the finding
            line = (str(error).strip().splitlines() or [""])[-1]
            results.append(Result(self.fn.__name__, "", 0, 0, 0, 0, "", f"{type(error).__name__}: {line}"))
        else:
            results.append(judge(case, self.fn.__name__, options, compiled))

    driver.set_active(PretendedDriver(case.arch))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(general, "capability", lambda _: case.arch),
        mock.patch.object(backward, "multiprocessors", lambda _: 132),
    ):
        launch(case)
    return results


def judge(case: Case, kernel: str, options: dict[str, Any], compiled: Any) -> Result:
    """Read a compiled kernel."""
    registers, spills = read_resources(compiled.asm["cubin"])
    matrix = next((name for name, ptx in MATRIX_INSTRUCTIONS.items() if ptx in compiled.asm["ptx"]), "-")
    shared = compiled.metadata.shared
    norm, wide = case.is_norm, case.size > 256
    sides = ("ROWS", "BLOCK_N") if norm else ("BLOCK_Q", "BLOCK_K")
    rows = options.get("BLOCK_K" if kernel == "key_value_kernel" else "BLOCK_Q", 0)
    must_have_wgmma = case.arch == 90 and case.dtype != "fp32" and rows >= 64 and kernel != "delta_kernel" and not wide
    fault = ""
    if shared > SHARED_MEMORY[case.arch]:
        fault = f"needs {shared} bytes of shared memory, has {SHARED_MEMORY[case.arch]}"
    elif spills and (norm or (case.dtype != "fp32" and case.size <= 128)):
        fault = f"spills {spills} bytes"
    elif must_have_wgmma and matrix != "wgmma":
        fault = f"no warp-group matrix instruction, found {matrix}"
    tile = "x".join(str(options[side]) for side in sides if side in options)
    return Result(kernel, tile, compiled.metadata.num_warps, registers, spills, shared, matrix, fault)


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
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    parser.add_argument("--quick", action="store_true", help="two dtypes, two head sizes, three features, three widths")
    parser.add_argument("--tiles", action="store_true", help="only the features that decide on a tile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--spills-allowed", action="store_true", help="print spills, but do not fail for them")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile_check_")  # compile, whatever was compiled before
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 asks; earlier ones fuse anyway
    import triton

    cases = list(all_cases(options.arch, options.quick, options.tiles))
    print(f"triton {triton.__version__}, {len(cases)} calls")
    print(" sm  kernel                  case                            tile  warps  regs spills shared matrix")
    total = faults = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for case, results in zip(cases, pool.map(compile_case, cases, chunksize=2)):
            for kernel, tile, warps, registers, spills, shared, matrix, fault in results:
                if options.spills_allowed and fault.startswith("spills"):
                    fault = ""
                print(
                    f"{case.arch:>3}  {kernel:<23} {case.label:<27} {tile:>8} {warps:>6} {registers:>5} {spills:>6} "
                    f"{shared:>6} {matrix:<7} {fault and 'FAULT: ' + fault}".rstrip(),
                    flush=True,
                )
                total += 1
                faults += bool(fault)
    print(f"{total - faults} kernels fit, {faults} do not")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
