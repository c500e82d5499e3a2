"""Compile ahead, on all cores, every kernel of ours that later pieces of work launch, into Triton's cache.

The same calls are made as later, with tensors of the meta device, whose launches stop after compiling: so what is
compiled has the same specialisations to strides, sizes and alignment.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import attention, bench_host, correctness, layer_norm
from bench.accounting import AttentionCase, NormCase
from bench.compile_check import Chip, compiling
from bench.gpu_plan import ATTENTION, NORMS, SHORT, Context, brief
from bench.stages import cores, worker_pool
from kernels.launch import capability, l2_bytes, multiprocessors

COMPILED = [*correctness.PROBLEMS, "attention", "short-sequences", "norms-timed", "host-time"]  # in the order of need


def launches(work: str, context: Context) -> list[tuple[str, Callable[[str], None]]]:
    """Calls that between them launch every kernel of ours which a piece of work launches, by name."""
    if work in correctness.PROBLEMS:
        return [(str(problem), problem.run) for problem in context.some(correctness.PROBLEMS[work]())]
    if work == "norms-timed":
        return [(case.group(), functools.partial(launch_norm, case)) for case in context.some(NORMS)]
    if work == "host-time":
        return [(case, functools.partial(launch_tiny, case)) for case in bench_host.CASES]
    cases = ATTENTION if work == "attention" else SHORT
    return [(str(case), functools.partial(launch_attention, case)) for case in context.some(cases)]


def launch_attention(case: AttentionCase, device: str) -> None:
    """Every kernel that ours may be timed with, forward and backward."""
    for asked in "0", "1":
        os.environ["KERNELS_HOPPER"] = asked
        for provider in "kernels", attention.GENERAL:
            with attention.running(provider):
                x = attention.make_inputs(case, torch.device(device), requires_grad=True)
                with torch.no_grad():
                    attention.build("kernels", case)(x)
                torch.autograd.grad(attention.build("kernels", case)(x), x.differentiable(), x.grad_output)


def launch_tiny(case: str, device: str) -> None:
    bench_host.make_call(case, "kernels", torch.device(device))()


def launch_norm(case: NormCase, device: str) -> None:
    x = layer_norm.make_inputs(case, torch.device(device), requires_grad=True)
    function = layer_norm.build("kernels", case, x.input.device)
    with torch.no_grad():
        function(x)
    torch.autograd.grad(function(x), x.differentiable(), x.upstream())


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
        "compile", work=work, case=name, kernels=sorted(kernels), seconds=time.monotonic() - started,
        cpu_seconds=cpu_seconds() - cpu, failures=failures,
    )  # fmt: skip


def compile_all(context: Context) -> None:
    """All kernels that are needed later, on all cores."""
    chip = Chip()
    if context.device.type == "cuda":
        chip = Chip(*(ask(context.device) for ask in (capability, multiprocessors, l2_bytes)))
    works = COMPILED[-2:] if context.rehearse else COMPILED
    with worker_pool(cores()) as pool:
        tasks = [pool.submit(compile_ahead, work, place, context, chip)
                 for work in works for place in range(len(launches(work, context)))]  # fmt: skip
        for task in tasks:
            task.result()
