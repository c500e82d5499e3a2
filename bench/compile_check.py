"""Compile every kernel for real GPUs on a machine without one, and read registers and spills from the machine code.

    python -m bench.compile_check [--arch 80 90 100 120] [--tiles] [--quick] [--only WORD] [--jobs N] [--spills-allowed]
                                  [--write] [--anew]

Calls that were seen to fit, as bench/compiled.txt says, and whose kernels have not changed since are not compiled
again: see `digest_of`. Prints one line a kernel that it compiles: tile, registers a thread, bytes of spills, shared
memory, kind of matrix instruction, and what its loop costs (bench/loop_cost.py). Exits with 1 if a kernel does not
compile or needs more shared memory than the chip has; if a norm kernel, or a 16-bit attention kernel with heads of at
most 128, spills: the latter in its steady loop, or more than a few bytes outside of it; if warps make each other's
products without a reason in WASTED; if a loop is dearer than docs/compiled.md says; if an attention kernel whose tile
allows warp-group matrix instructions on sm_90 has none, or if a Hopper kernel waits for every product at once; and if
LLVM or ptxas has made wrong code, see `spoils_a_pair` and `reads_unset`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.compile_cases import Case, all_cases, launch
from bench.loop_cost import PRODUCTS, RATES, Cost, Traffic, loop_cost, recorded, traffic, why_dearer
from bench.pretended import Chip, compiling, described, made_from

# Bytes of shared memory a program can have (CUDA programming guide, table of compute capabilities). For 80 the smaller
# limit of its consumer relatives 86 and 89 is kept to, which run the same tiles.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes that may be spilled, by kernel and whether all features come together: forward, outside of its loops; backward,
# numbers that the threads share, of which each step loads some ten.
SPILLS = {
    ("hopper_forward_kernel", False): 8,
    ("hopper_forward_kernel", True): 32,
    ("hopper_backward_kernel", False): 256,
    ("hopper_backward_kernel", True): 640,
}
OUTSIDE = 512  # bytes that a general kernel may spill outside of its steady loop, in tiles that an edge cuts
# Kernels whose warps make some products twice, by chip, kernel and least head size, and why they may. Where a call has
# few queries, all may: the keys' way from memory is what counts. (A Hopper backward's code has both consumers' turns.)
WASTED = {
    (80, "forward_kernel", 256): "four warps spill in the loop, under dropout",
    (80, "query_kernel", 256): "tiles of more queries take more registers than there are",
    (80, "key_value_kernel", 128): "four warps spill in the loop, under dropout",
    (80, "mask_kernel", 256): "tiles of more queries take more shared memory than there is",
}
IN_FLIGHT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"  # in the machine code: a wait that leaves one product running
RECORD = Path(__file__).with_name("compiled.txt")
SPILLS_ALLOWED = ", spills allowed"  # after the name of a case in it
MATRIX_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}  # name: in PTX


class Result(NamedTuple):
    """What the machine code of a kernel says, and what is wrong with it (empty: nothing)."""

    arch: int
    case: str
    kernel: str
    tile: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    matrix: str
    cost: Cost | Traffic | None
    fault: str


def compile_case(case: Case) -> list[Result]:
    """Compile what the launchers of a case launch, for its chip, and read the machine code."""
    results: list[Result] = []

    def add(kernel: str, options: dict[str, Any], compiled: Any) -> None:
        if isinstance(compiled, Exception):
            line = (str(compiled).strip().splitlines() or [""])[-1]
            error = f"{type(compiled).__name__}: {line}"
            results.append(Result(case.arch, case.label, kernel, "", 0, 0, 0, 0, "", None, error))
        else:
            found = judge(case, kernel, options, compiled)
            if not found.fault and spoils_a_pair(compiled.asm["ptx"]):
                found = found._replace(fault="LLVM mixes two numbers: spoils_a_pair in compile_check.py says how")
            if not found.fault and case.arch == 90 and reads_unset(disassemble(compiled.asm["cubin"])):
                found = found._replace(fault="ptxas reads what nothing wrote: reads_unset in compile_check.py says how")
            results.append(found)

    with compiling(Chip(case.arch), add):
        launch(case)
    return results


def digest_of(case: Case) -> str:
    """Of what the kernels of a case are made from, Triton's version, and what they are judged by."""
    from triton import __version__

    parts = [__version__, described(judge), *made_from(Chip(case.arch), lambda: launch(case))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def processes(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that compile, with their settings before they import Triton."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compile_check_")  # whatever was compiled before
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 asks; earlier ones fuse anyway
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def digests(cases: list[Case], jobs: int) -> list[str]:
    """`digest_of` each case."""
    with processes(jobs) as pool:
        return list(pool.map(digest_of, cases, chunksize=16))


def compile_cases(cases: list[Case], jobs: int) -> Iterator[list[Result]]:
    """What the kernels of each of these cases come to, compiled anew."""
    with processes(jobs) as pool:
        yield from pool.map(compile_case, cases, chunksize=2)


def judge(case: Case, kernel: str, options: dict[str, Any], compiled: Any) -> Result:
    """Read a compiled kernel."""
    registers, spills = read_resources(compiled.asm["cubin"])
    matrix = next((name for name, ptx in MATRIX_INSTRUCTIONS.items() if ptx in compiled.asm["ptx"]), "-")
    shared = compiled.metadata.shared
    norm, wide, is_hopper = case.is_norm, case.size > 256, kernel.startswith("hopper")
    sides = ("ROWS", "BLOCK_N") if norm else ("HEADS", "PACK", "BLOCK_L", "BLOCK_S", "BLOCK_Q", "BLOCK_K")
    rows = options.get("BLOCK_K" if kernel == "key_value_kernel" else "BLOCK_Q", 0)
    must_have_wgmma = case.arch == 90 and case.dtype != "fp32" and rows >= 64 and kernel != "delta_kernel" and not wide
    must_have_wgmma |= is_hopper
    text, num_warps = disassemble(compiled.asm["cubin"]), compiled.metadata.num_warps
    cost: Cost | Traffic | None = None
    chip = case.arch if case.arch in RATES else 80  # whose tiles the others run
    if is_hopper:  # a step of one of its consumers, warp groups that are alike
        options = {"BLOCK_Q": 64, "BLOCK_K": options.get("BLOCK_K", 64)}
    if kernel in PRODUCTS and case.dtype != "fp32" and not wide:
        warps = 4 if is_hopper else num_warps
        cost = loop_cost(text, kernel, case.size, options["BLOCK_Q"], options["BLOCK_K"], warps, chip)
    elif norm or kernel.startswith("short"):
        cost = traffic(text, registers, shared, num_warps, chip)
    allowed = SPILLS.get((kernel, case.feature == "hopper all"), 0)
    if isinstance(cost, Cost) and cost.spilled == 0 and not is_hopper:
        allowed = OUTSIDE
    may_waste = (
        is_hopper
        or case.feature == "few"
        or any((arch, name) == (chip, kernel) and size <= case.size for arch, name, size in WASTED)
    )
    fault = ""
    if shared > SHARED_MEMORY[case.arch]:
        fault = f"needs {shared} bytes of shared memory, has {SHARED_MEMORY[case.arch]}"
    elif isinstance(cost, Cost) and cost.wasted > 0.01 and not may_waste:
        fault = f"warps make {cost.wasted:.0%} of the products twice: fewer than 16 own rows a warp"
    elif spills > allowed and (
        norm or is_hopper or kernel.startswith("short") or (case.dtype != "fp32" and case.size <= 128)
    ):
        fault = f"spills {spills} bytes" + (f", {cost.spilled} times in the loop" if isinstance(cost, Cost) else "")
    elif must_have_wgmma and matrix != "wgmma":
        fault = f"no warp-group matrix instruction, found {matrix}"
    elif is_hopper and IN_FLIGHT not in text:
        fault = "waits for every product at once"
    tile = "x".join(str(options[side]) for side in sides if side in options)
    return Result(case.arch, case.label, kernel, tile, num_warps, registers, spills, shared, matrix, cost, fault)


def spoils_a_pair(ptx: str) -> bool:
    """Whether one of two numbers that share 64 bits spills into the other.

    Triton 3.6's LLVM shifts two numbers at once, the first by any number of bits where nobody asks for it, and makes a
    product of 64 bits of that shift, whose upper half gets into the second number:

        mul.wide.u32 %rd1, %r1, 268435456;  shl.b64 %rd2, %rd3, 33;  or.b64 %rd4, %rd1, %rd2;  mov.b64 {_, %r2}, %rd4;
    """
    products = set(re.findall(r"mul\.wide\.[us]32\s+(%rd\d+),", ptx))
    taken = set(re.findall(r"mov\.b64\s+\{_, %r\d+\}, (%rd\d+);", ptx))
    pairs = re.findall(r"or\.b64\s+(%rd\d+), (%rd\d+), (%rd\d+);", ptx)
    return any(pair in taken and products & set(parts) for pair, *parts in pairs)


def reads_unset(text: str) -> bool:
    """Whether machine code of sm_90 reads a uniform register before any line writes it.

    Where two tiles of different layouts take turns in one place of shared memory, ptxas 12.8 (of Triton 3.6 and 3.7;
    not 12.9) forgets the place when it makes their descriptors for matrix instructions. The first of the tile of
    values has it, the others begin at whatever the register holds, often outside of shared memory:

        UIADD3 UR22, UP0, UR22, 0x20, URZ ;  UIADD3.X UR23, UR23, -0x3ffffff0, URZ, UP0, !UPT ;
    """
    written: set[int] = set()
    for operation, line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s+(.*?);", text):
        operands = re.sub(r"^(U?P\w,\s*)+", "", line)
        made = re.match(r"UR(\d+)\s*,", operands) if "SETP" not in operation else None
        read = {int(number) for number in re.findall(r"\bUR(\d+)", operands[made.end() :] if made else line)}
        if read - written and "gdesc" not in line:  # which names four, of which a product may need the last two alone
            return True
        if made:
            count = 4 if ".128" in operation else 2 if re.search(r"\.(64|WIDE)", operation) else 1
            written.update(range(int(made[1]), int(made[1]) + count))
    return False


def ask(tool: str, flag: str, cubin: bytes) -> str:
    """What one of the tools that come with Triton says of machine code."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout


def read_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack (spills) of a compiled kernel."""
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", ask("cuobjdump", "-res-usage", cubin))[0]
    return int(registers), int(stack)


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    return ask("nvdisasm", "-c", cubin)


def name_of(case: Case, spills_allowed: bool = False) -> str:
    """A case in the record: for which Triton and chip, and whether spills were let pass."""
    import triton

    return f"{triton.__version__} {case.arch} {case.label}{SPILLS_ALLOWED if spills_allowed else ''}"


def read_record() -> dict[str, str]:
    """Which cases were seen to fit, and what their kernels were made from; what is no case any more is left out."""
    cases = {f"{case.arch} {case.label}" for case in all_cases(sorted(SHARED_MEMORY), quick=False)}
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    known = {name: digest for digest, _, name in (line.partition(" ") for line in lines)}
    return {name: x for name, x in known.items() if name.partition(" ")[2].removesuffix(SPILLS_ALLOWED) in cases}


def write_record(known: dict[str, str]) -> None:
    """One case a line, in order."""
    RECORD.write_text("".join(f"{digest} {name}\n" for name, digest in sorted(known.items())))


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    parser.add_argument("--quick", action="store_true", help="one dtype, two head sizes, six features, three widths")
    parser.add_argument("--tiles", action="store_true", help="only the features that decide on a tile")
    parser.add_argument("--only", default="", metavar="WORD", help="only the features with this word in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--spills-allowed", action="store_true", help="print spills, but do not fail for them")
    parser.add_argument("--anew", action="store_true", help="compile what is known to fit too")
    parser.add_argument("--write", action="store_true", help=f"enter what fits in bench/{RECORD.name}")
    options = parser.parse_args(argv)
    cases = [case for case in all_cases(options.arch, options.quick, options.tiles) if options.only in case.feature]
    if not cases:
        parser.error(f"no feature of these chips has {options.only!r} in its name; see FEATURES in compile_cases.py")
    import triton

    known, stale = read_record(), {}
    for case, digest in zip(cases, digests(cases, options.jobs)):
        names = {name_of(case), name_of(case, options.spills_allowed)}
        if options.anew or all(known.get(name) != digest for name in names):
            stale[case] = digest
    print(f"triton {triton.__version__}, {len(cases)} calls, {len(cases) - len(stale)} known to fit by {RECORD.name}")
    if not stale:
        return 0
    print(" sm  kernel                  case                            tile  warps  regs spills shared matrix  loop")
    version, table = recorded()
    total = faults = 0
    for case, results in zip(stale, compile_cases(list(stale), options.jobs)):
        fits = True
        for result in results:
            fault = result.fault or (why_dearer(result, table) if version == triton.__version__ else "")
            if options.spills_allowed and fault.startswith("spills"):
                fault = ""
            print(
                f"{result.arch:>3}  {result.kernel:<23} {result.case:<27} {result.tile:>8} {result.num_warps:>6} "
                f"{result.registers:>5} {result.spills:>6} {result.shared:>6} {result.matrix:<7} "
                f"{str(result.cost or ''):<60} {fault and 'FAULT: ' + fault}".rstrip(),
                flush=True,
            )
            total += 1
            faults += bool(fault)
            fits = fits and not fault
        if options.write:
            name = name_of(case, options.spills_allowed)
            if fits:
                known[name] = stale[case]
            else:
                known.pop(name, None)
            write_record(known)
    print(f"{total - faults} kernels fit, {faults} do not")
    if not options.write and total > faults:
        print(f"--write would enter those calls in bench/{RECORD.name}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
