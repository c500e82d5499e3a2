"""What a step of a kernel's loop costs, read from its machine code: a prediction of speed that needs no GPU.

    python -m bench.loop_cost [WORD ...] [--arch 90] [--write]

The steady loop of an attention kernel is the one that all but a few tiles of a long sequence go through. Its
instructions are counted and turned into cycles a 1,000 scores of a multiprocessor, which has four schedulers:

    tensor   matrix products, at the rate of dense 16-bit ones    issue    all instructions, one a cycle
    half     those that run at half that rate or less             exp2     exp2 and its kin, eight cycles each

"serial" is the speed if products and the dearest of the others take turns, which is what the waits of `tl.dot` loops
come to; "overlap" if they run at the same time, what warp specialisation can come to. Both are TFLOP/s of the work that
the kernel must do. They rank kernels; they are no measurement. Not seen: shared memory's banks, latencies that other
programs on the multiprocessor do not hide. Kernels that memory bounds (norms, short sequences) are told by instructions
for each byte that travels to or from memory, and the share of the memory's speed that they leave room for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bench.compile_check import Result

TABLE = Path(__file__).parents[1] / "docs" / "compiled.md"
LOOSE = 1.03  # a loop may come out this much dearer than the table says
# Of wgmma's rate that the older instruction reaches on sm_90 (Luo et al. 2024, "Benchmarking and Dissecting the Nvidia
# Hopper GPU Architecture via Microbenchmarking").
MMA_SHARE = 0.63
LATENCY = 600.0  # nanoseconds, of memory under load, about


class Rates(NamedTuple):
    """A chip's multiprocessors, GHz, dense 16-bit flops a cycle and multiprocessor, and memory in bytes a second.

    half_float: whether float32 arithmetic runs at half rate, too (the CUDA programming guide, "Arithmetic
    Instructions"). Clocks and memory: NVIDIA's data sheets of A100, H100 and B200; for 90 the clock under load.
    """

    multiprocessors: int
    clock: float
    flops: int
    memory: float
    half_float: bool = False


RATES = {
    80: Rates(108, 1.41, 2048, 2.0e12, half_float=True),
    90: Rates(132, 1.7, 4096, 3.35e12),
    100: Rates(148, 1.85, 8192, 8.0e12),
}
HALF_RATE = frozenset(
    "IADD3 LOP3 ISETP FMNMX FMNMX3 SEL FSEL FSETP PLOP3 SHF LEA PRMT VIADD VIMNMX VIADDMNMX F2FP I2F I2FP IABS "
    "HSETP2 HMNMX2".split()
)
MULTIPLY = frozenset("IMAD".split())  # at half rate, too, beside the others
QUARTER_RATE = frozenset("F2F SHFL POPC".split())  # at an eighth to a quarter; taken for a quarter
FLOAT = frozenset("FMUL FADD FFMA".split())
PRODUCTS = {
    "forward_kernel": 2,
    "query_kernel": 3,
    "key_value_kernel": 4,
    "mask_kernel": 2,
    "hopper_forward_kernel": 2,
    "hopper_backward_kernel": 5,
}


class Loop(NamedTuple):
    """Instructions of a loop by name, with what follows the name where it counts; matrix flops of a warp in it."""

    code: list[str]

    def count(self, *names: str) -> int:
        return sum(name_of(line) in names for line in self.code)

    @property
    def issue(self) -> int:
        return len(self.code)

    def half(self, rates: Rates) -> int:
        """Cycles of the unit that runs at half rate or less."""
        slow = 2 * self.count(*HALF_RATE) + 4 * self.count(*QUARTER_RATE)
        multiplied = 2 * self.count(*MULTIPLY) + (2 * self.count(*FLOAT) if rates.half_float else 0)
        return max(slow, multiplied)

    @property
    def flops(self) -> float:
        """Matrix flops that the loop issues, of one warp (of wgmma: a quarter of a group's); 0 for tcgen05."""
        total = 0.0
        for line in self.code:
            if found := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", line):
                m, n, k = map(int, found.groups())
                total += 2 * m * n * k / 4
            elif re.search(r"HMMA\.16816", line):
                total += 2 * 16 * 8 * 16
            elif re.search(r"HMMA\.1688", line):
                total += 2 * 16 * 8 * 8
        return total

    @property
    def spilled(self) -> int:
        """Loads and stores of spilled registers."""
        return self.count("LDL", "STL")

    def bytes(self, kinds: str = "LDG|STG") -> int:
        """Bytes that a thread moves to or from memory."""
        total = 0
        for line in self.code:
            if re.match(rf"(@!?U?P\w+\s+)?({kinds})\b", line):
                width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", full_name_of(line))
                total += {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4
        return total


def full_name_of(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def name_of(line: str) -> str:
    return full_name_of(line).split(".")[0]


def read_code(text: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly, and where its labels stand among them."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(found[1])
    return code, labels


def loops(text: str, *marks: str) -> Iterator[Loop]:
    """The innermost of a disassembly's loops that have an instruction with each of `marks` in its name."""
    code, labels = read_code(text)
    found = []
    for end, line in enumerate(code):
        branch = re.search(r"BRA(?:\.\S+)?\s+.*?`\((\.L_x_\d+)\)", line)
        start = labels.get(branch[1], end) if branch else end
        names = [full_name_of(line) for line in code[start:end]]
        if start < end and all(any(mark in name for name in names) for mark in marks):
            found.append((start, end))
    for start, end in found:
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in found):
            yield Loop(code[start : end + 1])


class Cost(NamedTuple):
    """A steady loop in cycles a 1,000 scores, and what they come to in TFLOP/s.

    wasted: matrix flops that warps make twice, as a share of those that are needed. spilled: instructions that spill.
    """

    tensor: float
    issue: float
    half: float
    exp2: float
    serial: float
    overlap: float
    wasted: float
    spilled: int

    def __str__(self) -> str:
        four = " ".join(f"{x:4.0f}" for x in self[:4])
        return f"{four} serial {self.serial:4.0f} overlap {self.overlap:4.0f} spilled {self.spilled}"


def loop_cost(text: str, kernel: str, size: int, block_q: int, block_k: int, num_warps: int, arch: int) -> Cost | None:
    """Cost of an attention kernel of heads of `size` on a chip; None where no loop has matrix products.

    Args:
        text: the disassembly. kernel: one of PRODUCTS. block_q, block_k, num_warps: of its tile, or of one of a Hopper
            kernel's consumers, which are alike.
    """
    rates = RATES[arch]
    found = [loop for loop in loops(text) if any("MMA" in line for line in loop.code)]
    found = found or list(loops(text, "MMA", "MUFU"))  # a Hopper consumer's hold others, which wait for its producer
    if not found:
        return None
    # The steady loop makes the most flops an instruction: others look at edges, or for NaN.
    loop = max(found, key=lambda loop: (loop.flops / loop.issue, -loop.issue))
    needed, issued = 2 * PRODUCTS[kernel] * size, loop.flops * num_warps / (block_q * block_k)  # flops a score
    flops = max(needed, issued)
    if arch == 90 and not any("HGMMA" in line for line in loop.code):
        flops /= MMA_SHARE
    per_thousand = 1000 / (block_q * block_k) * num_warps / 4
    tensor = 1000 * flops / rates.flops
    rest = [x * per_thousand for x in (loop.issue, loop.half(rates), 8 * loop.count("MUFU"))]
    speed = 1000 * needed * rates.multiprocessors * rates.clock * 1e-3  # at one cycle a 1,000 scores
    serial, overlap = speed / (tensor + max(rest)), speed / max(tensor, *rest)
    wasted = max(needed, issued) / needed - 1
    return Cost(tensor, rest[0], rest[1], rest[2], serial, overlap, wasted, loop.spilled)


class Traffic(NamedTuple):
    """What a kernel that memory bounds does for a byte. width: bits of its widest access; resident: programs."""

    instructions: float
    width: int
    resident: int
    share: float

    def __str__(self) -> str:
        return f"{self.instructions:.2f} a byte, {self.width} bits, {self.resident} resident, share {self.share:.2f}"


def traffic(text: str, registers: int, shared: int, num_warps: int, arch: int) -> Traffic | None:
    """Of the innermost loop that reads from memory, else of the whole kernel; None where nothing is read.

    The share of the memory's speed that instructions leave room for, and the bytes that the programs which fit a
    multiprocessor have on their way at a time, against those that hide LATENCY.
    """
    rates = RATES[arch]
    every = Loop(read_code(text)[0])
    loop = max(loops(text, "LDG"), key=lambda loop: loop.issue, default=every)
    if not loop.bytes("LDG"):
        return None
    threads = 32 * num_warps
    resident = min(2048 // threads, 65_536 // (-(-registers // 8) * 8 * threads), 228 * 1024 // (shared + 1024), 32)
    bytes_a_cycle = rates.memory / (rates.multiprocessors * rates.clock * 1e9)
    instructions = loop.issue / loop.bytes()
    by_issue = 4 * 32 / instructions / bytes_a_cycle
    by_flight = max(resident, 1) * threads * loop.bytes("LDG") / (LATENCY * rates.clock * bytes_a_cycle)
    widths = [8 * Loop([line]).bytes() for line in loop.code]
    return Traffic(instructions, max(widths), resident, min(1.0, by_issue, by_flight))


HEADER = """# Compiled, without a GPU

What the machine code of the kernels says, by Triton {version}: made by `python -m bench.loop_cost --write`, checked by
`python -m bench.compile_check`. Speeds are predictions (see bench/loop_cost.py), in TFLOP/s of what a kernel must do,
its recomputed products included; docs/measured.md has what a GPU did. Spills: bytes of the whole kernel, and
instructions in the steady loop. Cycles a 1,000 scores: tensor, issue, half rate, exp2. Of Hopper kernels: a consumer,
for which "overlap" counts.

"""
COLUMNS = "| sm | kernel | case | tile, warps | registers | spills, in the loop | cycles | serial | overlap |"


def line_of(result: Result) -> str:
    """A line of the table."""
    cost = result.cost
    assert isinstance(cost, Cost)
    cycles = " ".join(f"{x:.0f}" for x in cost[:4])
    columns = (
        result.arch,
        result.kernel,
        result.case,
        f"{result.tile}, {result.num_warps}",
        result.registers,
        f"{result.spills}, {cost.spilled}",
        cycles,
        f"{cost.serial:.0f}",
        f"{cost.overlap:.0f}",
    )
    return "| " + " | ".join(map(str, columns)) + " |"


def recorded() -> tuple[str, dict[tuple[int, str, str], float]]:
    """Triton's version and the serial speeds of the table, by chip, kernel and case."""
    text = TABLE.read_text() if TABLE.exists() else ""
    version = re.search(r"by Triton (\S+):", text)
    lines = re.findall(r"^\| (\d+) \| (\w+) \| ([^|]+) \|.*\| (\d+) \| \d+ \|$", text, re.M)
    speeds = {(int(sm), kernel, case): float(serial) for sm, kernel, case, serial in lines}
    return version[1] if version else "", speeds


def why_dearer(result: Result, table: dict[tuple[int, str, str], float]) -> str:
    """How much dearer a steady loop is than the table says; empty where it is not, or the table does not know it."""
    known = table.get((result.arch, result.kernel, result.case))
    if known is None or not isinstance(result.cost, Cost) or result.cost.serial * LOOSE >= known - 0.5:
        return ""
    found = f"{result.cost.serial:.0f} TFLOP/s predicted, {known:.0f} in {TABLE.name}"
    return f"{found}; if it is meant to be slower, first python -m bench.loop_cost --write"


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.loop_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only lines with all of these words")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(RATES), default=sorted(RATES), help="chips")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(TABLE.parents[1])}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    if options.write and (options.words or options.arch != sorted(RATES)):
        parser.error("--write writes the whole table: without words and --arch")
    from bench.compile_cases import table_cases
    from bench.compile_check import compile_cases

    cases = list(table_cases(options.arch))
    words = {word for case in cases for word in case.label.split()} & set(options.words)  # the others are of the result
    cases = [case for case in cases if words <= set(case.label.split())]
    lines = []
    print(COLUMNS)
    for result in itertools.chain.from_iterable(compile_cases(cases, options.jobs)):
        if isinstance(result.cost, Cost):
            line = line_of(result)
            if all(word in line.replace("|", " ").split() for word in options.words):
                lines.append(line)
                print(line, flush=True)
    if not lines:
        parser.error(f"no line of the table has all the words {' '.join(options.words)}; see {TABLE.name}")
    if options.write:
        import triton

        header = HEADER.format(version=triton.__version__)
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(header + "\n".join([COLUMNS, re.sub(r"[^|]+", "---", COLUMNS), *sorted(lines)]) + "\n")
    return 0


if __name__ == "__main__":
    from bench.loop_cost import main as main_of_the_module  # whose Cost is the one that compile_check makes

    sys.exit(main_of_the_module())
