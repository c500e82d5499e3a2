"""Which tiles are fastest: every candidate is compiled, on all cores, and where there is a GPU, timed on it.

    python -m bench.tune [WORD ... [or WORD ...]] [--arch 90] [--rows FILE] [--time-limit SECONDS] [--jobs N] [--list]

A search is one kernel at one size ("forward D128", "short backward L9 D16"). The WORDs are its name, or some of its
words, for all searches that have them; "or" parts alternatives. For each it prints the tile that is taken today and the
best others: by time, where there is a GPU, else by what loops are predicted to reach (bench/loop_cost.py). A candidate
that gives other numbers than today's tile is called wrong. What is found is entered by hand into
kernels/attention/measured.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import machine
from bench.compile_check import SHARED_MEMORY, disassemble, read_resources
from bench.loop_cost import RATES, loop_cost
from bench.pretended import Chip, compiling
from bench.rows import read_rows, write_row
from bench.stages import cores, worker_pool
from bench.timing import measure
from kernels import launch as chip
from kernels.attention import tiles
from kernels.attention.call import Call
from kernels.attention.plan import Plan, forced
from kernels.attention.tiles import ShortTile, Tile

CALLS = {"full": Call(scale=0.125), "causal": Call(scale=0.125, right=0)}
TIMED = {"plain": ("full",), "causal": ("causal",), "dropout": ("full", "causal")}  # what is asked: by which rules
NAMES = {"plain": "", "causal": " causal", "dropout": " dropout"}
SHORT_LENGTHS, SHORT_SIZES, SHORT_BATCH = (5, 9, 16, 32, 64), (16, 32, 64), 8_192
SIZES = (64, 128, 256)
SHOWN = 3  # best candidates of a search that are printed
MAX_SPILLS = 512  # bytes; with more a candidate is not timed


class Search(NamedTuple):
    """A kernel ("forward", "query", "key_value", or of short sequences "short forward", "short backward") at a size."""

    kernel: str
    size: int
    length: int
    asked: str = "plain"  # of TIMED; short sequences have one tile for all

    def __str__(self) -> str:
        length = f" L{self.length}" if self.is_short else ""
        return f"{self.kernel}{length} D{self.size}{NAMES[self.asked]}"

    @property
    def calls(self) -> dict[str, Call]:
        """The calls that it is timed by."""
        return CALLS if self.is_short else {name: CALLS[name] for name in TIMED[self.asked]}

    @property
    def is_short(self) -> bool:
        return self.kernel.startswith("short")

    def own(self, arch: int) -> Tile | ShortTile:
        """The tile of the table."""
        if self.is_short:
            return tiles.choose_short_tile(self.kernel.split()[1], self.length, self.size, 2)
        return tiles.choose_tile(self.kernel, self.size, 2, self.length, arch, self.asked)

    def candidates(self, arch: int) -> list[Tile | ShortTile]:
        """The table's tile and others."""
        found: list[Tile | ShortTile] = [self.own(arch)]
        if self.is_short:
            packs = (1, max(1, tiles.block_of(self.length) // self.length))
            found += itertools.starmap(ShortTile, itertools.product((1, 2, 4, 8, 16), packs, (1, 2, 4, 8)))
        else:
            # A side of the tile is the program's own rows; along the other it walks.
            walks = (16, 32, 64) if self.kernel == "key_value" else (32, 64, 128)
            for own, walk, warps, stages in itertools.product((64, 128), walks, (4, 8), (1, 2, 3)):
                sides = (walk, own) if self.kernel == "key_value" else (own, walk)
                found.append(Tile(*sides, warps, stages))
        return list(dict.fromkeys(found))


class Try(NamedTuple):
    """What is known of a candidate.

    problem: why it is not timed, or was stopped. seconds: by mask, on a GPU. predicted: TFLOP/s of the slowest steady
    loop, 0 for one that spills, and for short sequences.
    """

    search: str
    tile: Tile | ShortTile
    is_own: bool
    registers: int
    spills: int
    problem: str = ""
    seconds: dict[str, float] = {}
    predicted: float = 0.0

    @property
    def order(self) -> tuple[bool, float, float, int]:
        return bool(self.problem), sum(self.seconds.values()), -self.predicted, self.spills


def searches(words: list[str]) -> list[Search]:
    """All of them; those called so; or those that have all of these words in their names. "or" parts alternatives."""
    every = [
        Search(f"short {kernel}", size, length)
        for kernel in ("forward", "backward")
        for length in SHORT_LENGTHS
        for size in SHORT_SIZES
    ]
    every = [
        Search(kernel, size, 4096, asked)
        for asked in TIMED
        for kernel in ("forward", "query", "key_value")
        for size in SIZES
    ] + every
    found: list[Search] = []
    for part in " ".join(words).split(" or "):
        exact = [search for search in every if str(search) == part]
        found += exact or [search for search in every if set(part.split()) <= set(str(search).split())]
    return list(dict.fromkeys(found))


def prepare(search: Search, device: str) -> Callable[[Call], list[torch.Tensor]]:
    """The launch of a search's kernel on random inputs, as a function of the call that gives what it wrote."""
    from kernels.attention import general, general_backward, short, short_backward

    batch = SHORT_BATCH if search.is_short else 16_384 // search.length
    heads = 4 if search.is_short else 2_048 // search.size
    shape = (batch, search.length, heads, search.size)
    q, k, v, grad = (torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(4))
    seed = torch.ones(1, dtype=torch.int64, device=device) if search.asked == "dropout" else None
    row_max, row_sum = (torch.ones(q.shape[:3], dtype=torch.float32, device=device) for _ in range(2))
    statistics = torch.ones(3, *q.shape[:3], dtype=torch.float32, device=device)
    outputs = [torch.empty_like(x) for x in (q, k, v)]

    def launch(call: Call) -> list[torch.Tensor]:
        if seed is not None:
            call = call._replace(seed=seed, dropout_p=0.1)
        kernel = "short" if search.is_short else "general"
        plan = Plan(kernel, {}, q, v, call, search.length, chip.capability(q.device))
        if search.kernel == "forward":
            general.launch_forward(q, k, v, call, plan.tile("forward"), outputs[0], row_max, row_sum)
            return outputs[:1]
        if search.kernel == "short forward":
            short.launch_short_forward(q, k, v, call, plan.tile("forward"), outputs[0])
            return outputs[:1]
        if search.kernel == "short backward":
            short_backward.launch_short_backward(grad, q, k, v, call, plan.tile("backward"), *outputs)
            return outputs
        dq, dk, dv = (outputs[0], None, None) if search.kernel == "query" else (None, *outputs[1:])
        general_backward.launch_backward(grad, q, k, v, call, plan, statistics, dq, dk, dv, None)
        return [x for x in (dq, dk, dv) if x is not None]

    return launch


def compile_candidate(search: Search, tile: Tile | ShortTile, arch: int) -> Try:
    """Compile a candidate for a chip; Triton's cache then has it for the timing."""
    registers = spills = 0
    problem, predictions = "", []

    def add(kernel: str, options: dict[str, Any], compiled: Any) -> None:
        nonlocal registers, spills, problem
        if isinstance(compiled, Exception):
            problem = f"{type(compiled).__name__}"
            return
        found = read_resources(compiled.asm["cubin"])
        registers, spills = max(registers, found[0]), max(spills, found[1])
        if compiled.metadata.shared > SHARED_MEMORY[arch]:
            problem = f"{compiled.metadata.shared} bytes of shared memory"
        elif spills > MAX_SPILLS:
            problem = f"spills {spills} bytes"
        if not search.is_short and arch in RATES:
            cost = loop_cost(
                disassemble(compiled.asm["cubin"]),
                kernel,
                search.size,
                options["BLOCK_Q"],
                options["BLOCK_K"],
                compiled.metadata.num_warps,
                arch,
            )
            predictions.append(cost.serial if cost and not cost.spilled else 0.0)

    launch = prepare(search, "meta")
    with compiling(Chip(arch), add), forced(tile=tile):
        for call in search.calls.values():
            launch(call)
    predicted = min(predictions, default=0.0)
    return Try(str(search), tile, tile == search.own(arch), registers, spills, problem, predicted=predicted)


def time_candidates(search: Search, tries: list[Try], device: torch.device) -> Iterator[Try]:
    """The candidates with their times; the table's own first, whose results the others' are held to."""
    launch = prepare(search, str(device))
    expected: dict[str, list[torch.Tensor]] = {}
    for attempt in sorted(tries, key=lambda attempt: not attempt.is_own):
        if attempt.problem and not attempt.is_own:
            yield attempt
            continue
        seconds, problem = {}, ""
        with forced(tile=attempt.tile):
            for name, call in search.calls.items():
                try:
                    results = [x.clone() for x in launch(call)]
                    right = expected.setdefault(name, results)
                    if not all((a - b).float().norm() <= 0.02 * b.float().norm() for a, b in zip(results, right)):
                        problem = "wrong"
                        break
                    seconds[name] = measure([lambda call=call: launch(call)], device, 0.05).median  # type: ignore
                except Exception as error:  # out of some resource
                    problem = type(error).__name__
                    break
        yield attempt._replace(problem=problem, seconds=seconds)


def show(tries: list[Try]) -> Iterator[str]:
    """The table's tile and the best others, a line each."""
    own = next(attempt for attempt in tries if attempt.is_own)
    best = sorted((attempt for attempt in tries if not attempt.is_own), key=lambda attempt: attempt.order)[:SHOWN]
    for attempt in (own, *best):
        times = "  ".join(f"{mask} {seconds * 1e6:8.1f} us" for mask, seconds in attempt.seconds.items())
        tile = "x".join(map(str, attempt.tile))
        mark = "table" if attempt.is_own else ""
        line = f"{attempt.search:<24} {tile:<14} {mark:<6} {attempt.registers:>4} registers {attempt.spills:>4} spilled"
        line += f" {attempt.predicted:>4.0f} TFLOP/s predicted" if attempt.predicted else ""
        yield f"{line}  {times}{attempt.problem}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), help="where there is no GPU (90)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append a row for every candidate (bench/rows.py)")
    parser.add_argument("--time-limit", type=float, default=400, metavar="SECONDS", help="no search begins later (400)")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes that compile (one a core)")
    parser.add_argument("--list", action="store_true", help="print the searches and make none")
    options = parser.parse_args(argv)
    chosen = searches(options.words)
    if not chosen:
        parser.error(f"no search is called {' '.join(options.words)!r}; see --list")
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    device = machine.pick_device()
    on_gpu = device.type == "cuda" and options.arch is None
    arch = chip.capability(device) if on_gpu else options.arch or 90
    started = time.monotonic()
    rows = read_rows(options.rows) if options.rows else []  # of an earlier start, which a fault ended
    done = {(row["search"], tuple(row["tile"].values())) for row in rows if row["kind"] == "tile"}
    with worker_pool(options.jobs) as pool:
        compiled = [
            (search, [pool.submit(compile_candidate, search, tile, arch) for tile in search.candidates(arch)])
            for search in chosen
        ]
        for search, futures in compiled:
            if time.monotonic() - started > options.time_limit:
                print(f"{search} and what follows: left out, the time is used up")
                pool.shutdown(cancel_futures=True)
                break
            tries, known = [future.result() for future in futures], []
            tries = [attempt for attempt in tries if attempt.is_own or (attempt.search, attempt.tile) not in done]
            if len(tries) == 1:
                continue
            stream = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext()  # no graphs on the default one
            with stream:
                for attempt in time_candidates(search, tries, device) if on_gpu else tries:
                    known.append(attempt)
                    if options.rows:
                        write_row(options.rows, "tile", **{**attempt._asdict(), "tile": attempt.tile._asdict()})
                    machine.leave_after_fault(device)
            print("\n".join(show(known)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
