"""The pieces of work of bench.gpu_first and bench.gpu_second, each a process of its own that writes rows.

    python -m bench.gpu_work NAME --rows FILE [--rehearse]

Not meant to be called by hand, though it can be. --rehearse: on a CPU, on a few numbers; times then mean nothing.
"compile" needs no GPU: without one it compiles for the chip that bench/pretended.py names.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import correctness, machine
from bench.accounting import SEED
from bench.benchmark import WARM_UP, gpu_stages, warm_ups
from bench.pretended import Chip, compiling
from bench.record import Context, brief
from bench.rows import read_rows
from bench.stages import NO_GPU, cores, worker_pool
from kernels.launch import capability, l2_bytes, multiprocessors


def look(context: Context) -> None:
    """The machine, its versions, and the key of Triton's cache."""
    from triton.runtime.cache import triton_key

    context.write("machine", **machine.describe(), triton_key=triton_key())


# Compiling ahead, on all cores, every kernel of ours that is launched later, into Triton's cache. The same calls are
# made as later, with tensors of the meta device, whose launches stop after compiling: so what is compiled has the same
# specialisations to strides, sizes and alignment.


def launches(work: str, context: Context) -> list[tuple[str, Callable[[str], None]]]:
    """Calls that between them launch every kernel of ours which a piece of work launches, by name."""
    if work in correctness.PROBLEMS:
        return [(str(problem), problem.run) for problem in context.some(correctness.PROBLEMS[work]())]
    file, _, stage = work.partition("::")
    module = importlib.import_module(f"bench.{file}")
    return module.launches(stage, context) if hasattr(module, "launches") else []


def cpu_seconds() -> float:
    """Of this process and of those it ran, such as the assembler."""
    return sum(os.times()[:4])


def build_launcher(compiled: Any) -> None:
    """Triton up to 3.6 launches a kernel through C code for the types of its arguments: compile that, too."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        try:
            driver.CudaLauncher(compiled.src, compiled.metadata)
        except Exception as error:  # noqa: BLE001 - it is compiled when it is needed
            print(f"launcher of {compiled.name}: {brief(error)}", flush=True)


def compile_ahead(work: str, place: int, context: Context, chip: Chip) -> None:
    """Compile what one of the launches of a piece of work launches, into Triton's cache."""
    kernels, failures = set(), []

    def add(kernel: str, _: dict[str, Any], compiled: Any) -> None:
        if isinstance(compiled, Exception):
            failures.append(f"{kernel}: {brief(compiled)}")
            return
        kernels.add(compiled.hash)
        if context.device.type == "cuda":
            build_launcher(compiled)

    started, cpu = time.monotonic(), cpu_seconds()
    name, launch = launches(work, context)[place]
    try:
        with compiling(chip, add):
            launch("meta")
    except Exception as error:  # a launcher that cannot even be called
        failures.append(brief(error))
    context.write(
        "compile",
        work=work,
        case=name,
        kernels=sorted(kernels),
        seconds=time.monotonic() - started,
        cpu_seconds=cpu_seconds() - cpu,
        failures=failures,
    )


def compile_all(context: Context) -> None:
    """All kernels that are needed later, on all cores, in the order of need."""
    chip = Chip()
    if context.device.type == "cuda":
        chip = Chip(*(ask(context.device) for ask in (capability, multiprocessors, l2_bytes)))
    counts = {}  # of launches
    for work in (*correctness.PROBLEMS, *gpu_stages("first")):
        try:
            counts[work] = len(launches(work, context))
        except Exception as error:  # noqa: BLE001 - a benchmark that is broken costs the others nothing
            context.write("compile", work=work, case="all", kernels=[], cpu_seconds=0.0, failures=[brief(error)])
    works = [work for work, count in counts.items() if count]
    with worker_pool(cores()) as pool:
        tasks = [
            pool.submit(compile_ahead, work, place, context, chip)
            for work in (works[-2:] if context.rehearse else works)
            for place in range(counts[work])
        ]
        for task in tasks:
            task.result()


# Right or wrong


def judge(work: str, context: Context) -> None:
    """Each case's tensors beside the exact ones; at the end whether all were right, and which not."""
    problems = context.some(correctness.PROBLEMS[work]())
    if any(getattr(problem, "hopper", ()) for problem in problems) and capability(context.device) != 90:
        context.write("verdict", kernel=work, passed=False, failed=["not run: there is no Hopper chip"])
        return
    for problem in context.untried(work, problems):
        try:
            findings = list(correctness.find(problem, str(context.device)))
            context.synchronize()  # a fault counts, though the results were right
            for found in findings:
                context.write("error", work=work, case=str(problem), **found._asdict())
        except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
            context.write("error", work=work, case=str(problem), problem=brief(error))
        machine.leave_after_fault(context.device)
    told = {str(problem): "" for problem in problems}  # the first thing that is wrong with each
    rows = [row for row in read_rows(context.rows) if row["kind"] == "error" and row["work"] == work]
    for row in rows:
        told[row["case"]] = told[row["case"]] or row["problem"]
    told.update({case: "crashed" for case in set(told) - {row["case"] for row in rows}})
    failed = [f"{case}: {problem}" for case, problem in told.items() if problem]
    context.write("verdict", kernel=work, passed=not failed, failed=failed)
    print(f"{work}: {len(problems)} cases, {len(failed)} failures", *failed, sep="\n  ")


# By name


def run_benchmark(work: str, context: Context) -> None:
    """Import one file alone: where another is broken, that costs the other's figures only."""
    file, _, stage = work.partition("::")
    module = importlib.import_module(f"bench.{file}")
    module.warm_up(context) if stage == WARM_UP else module.time_stage(stage, context)


def pieces_of_work() -> dict[str, Callable[[Context], None]]:
    of_benchmarks = (*warm_ups(), *gpu_stages("first"), *gpu_stages("second"))
    return {
        "look": look,
        "compile": compile_all,
        **{work: functools.partial(judge, work) for work in correctness.PROBLEMS},
        **{work: functools.partial(run_benchmark, work) for work in of_benchmarks},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pieces = pieces_of_work()
    parser.add_argument("name", choices=pieces, metavar="NAME", help=", ".join(pieces))
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="rows are appended to it")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, on a few numbers")
    options = parser.parse_args(argv)
    device = machine.pick_device()
    if options.rehearse:
        from tests.interpreter import prepare

        device = torch.device("cpu")
        torch.set_num_threads(1)
        prepare()
    elif device.type == "cpu" and options.name != "compile":
        print(f"there is no CUDA GPU here, found torch {torch.__version__}; --rehearse tries everything on the CPU")
        return NO_GPU
    warnings.simplefilter("ignore")  # a peer's warning costs nobody's figures
    context = Context(options.rows, device, options.rehearse)
    torch.manual_seed(SEED)
    if device.type == "cpu":
        pieces[options.name](context)
        return 0
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are not captured on the default one
        pieces[options.name](context)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
