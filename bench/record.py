"""From a provider's calls to a row of figures, for pytest-benchmark and, on a GPU run, for bench/rows.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch._functorch.config

from bench import machine
from bench.accounting import Work
from bench.ceilings import ceilings
from bench.check import WrongResult
from bench.rows import read_rows, write_row
from bench.timing import Call, Samples, measure, play_samples

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

T = TypeVar("T")
SECONDS = 0.1  # of samples a row, on a GPU run


class Refused(Exception):
    """A provider does not take the work, and why."""


class Job(NamedTuple):
    """Calls to be timed, one an input set, of a provider whose result was found right.

    Args:
        group: the work in words, the same for all providers.
        graph: whether the calls can be captured in a CUDA graph.
    """

    group: str
    provider: str
    calls: Sequence[Call]
    work: Work
    graph: bool = True


def compile_peer(function: Callable[..., T]) -> Callable[..., T]:
    """`function` by torch.compile, for the shapes it is first called with; its backward pass can run more than once."""
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # else it frees what a graph that is kept still needs
    return torch.compile(function, dynamic=False)


def attempt(provider: str, function: Callable[[], T]) -> T:
    """The peer's first call: where it refuses the work, Refused with its reason. Ours may not refuse."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return function()
        except WrongResult:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its reason
            if provider.startswith("kernels"):
                raise
            told = [str(warning.message) for warning in caught] + [str(error) or type(error).__name__]
    reason = " | ".join(text.strip().splitlines()[0] for text in told)
    raise Refused(f"{provider} refuses: {reason[:400]}")


def measure_job(job: Job, device: torch.device, seconds: float = 0.25) -> tuple[Samples, dict[str, Any]]:
    """The samples, and the figures that a row has beside them."""
    with torch.no_grad():  # of a backward pass, too: its graph is there
        samples = measure(job.calls, device, seconds, job.graph)
        info = {**figures(samples, job.work, device), "input_sets": len(job.calls)}
        if device.type == "cuda":
            info["peak_bytes"] = peak_bytes(job.calls[0], device)
    return samples, info


def name_row(benchmark: BenchmarkFixture, group: str, provider: str) -> None:
    """The group and the label under which pytest-benchmark prints the row."""
    benchmark.group, benchmark.name = group, provider
    benchmark.extra_info["provider"] = provider


def time_row(benchmark: BenchmarkFixture, prepare: Callable[[], Job], device: torch.device) -> None:
    """Measure a job and hand the samples to pytest-benchmark; disabled, make one call. A refusal skips the row."""
    import pytest

    try:
        job = prepare()
    except Refused as refusal:
        pytest.skip(str(refusal))
    name_row(benchmark, job.group, job.provider)
    if benchmark.disabled:
        with torch.no_grad():
            benchmark(job.calls[0])
        return
    samples, info = measure_job(job, device)
    benchmark.extra_info.update(info)
    play_samples(benchmark, samples.seconds)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory that a call takes at most, its result included, beyond what was there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def figures(samples: Samples, work: Work, device: torch.device) -> dict[str, float | str]:
    """What a row says beside its time."""
    seconds, limits = samples.median, ceilings(device, work.dtype)
    return {
        "gpu_ms" if device.type == "cuda" else "cpu_ms": seconds * 1e3,
        "host_us": samples.host_seconds * 1e6,
        "method": samples.method,
        "flops": work.flops,
        "bytes": work.bytes,
        "tflops_per_second": work.flops / seconds / 1e12,
        "gb_per_second": work.bytes / seconds / 1e9,
        "ceiling_tflops_per_second": limits.matrix_flops / 1e12,
        "ceiling_gb_per_second": limits.copy_bytes / 1e9,
        "share_of_ceiling": limits.floor(work) / seconds,
        "bound": limits.bound(work),
    }


# On a GPU run


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Context(NamedTuple):
    """Where a piece of work writes its rows, on which device it runs, and whether it is only rehearsed."""

    rows: Path
    device: torch.device
    rehearse: bool

    def write(self, kind: str, **fields: Any) -> None:
        write_row(self.rows, kind, **fields)

    def untried(self, work: str, cases: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """The cases that no earlier start of this piece of work has tried: one that crashed it is not tried twice."""
        tried = {row["case"] for row in read_rows(self.rows) if row["kind"] == "trying" and row["work"] == work}
        for case in cases:
            if name(case) not in tried:
                self.write("trying", work=work, case=name(case))
                yield case

    def synchronize(self) -> None:
        """Wait for the GPU, which raises what went wrong on it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def some(self, cases: Sequence[Any]) -> list[Any]:
        """All cases; in a rehearsal up to four of them, each `small()`."""
        return [case.small() for case in cases[:: max(1, len(cases) // 3)]] if self.rehearse else list(cases)


Prepared = tuple[str, str, Callable[[], Job]]  # group, provider, and what prepares it


def time_all(work: str, context: Context, jobs: Iterable[Prepared]) -> None:
    """Measure them one after the other, a row each."""
    for group, provider, prepare in context.untried(work, list(jobs), lambda job: f"{job[0]}: {job[1]}"):
        line = f"{group:<58} {provider:<24}"
        try:
            job = prepare()
            samples, info = measure_job(job, context.device, 0.01 if context.rehearse else SECONDS)
            context.write(
                "time",
                case=f"{group}: {provider}",
                group=group,
                provider=job.provider,
                seconds=samples.median,
                samples=samples.seconds,
                info=info,
            )
            print(f"{line} {samples.median * 1e6:12.1f} us", flush=True)
        except Refused as refusal:
            context.write("refused", case=f"{group}: {provider}", problem=str(refusal))
        except WrongResult as wrong:
            context.write("wrong", case=f"{group}: {provider}", problem=str(wrong))
            print(f"{line} WRONG: {wrong}", flush=True)
        except Exception as error:  # noqa: BLE001 - ours, or out of memory: the next row may fare better
            context.write("failed", case=f"{group}: {provider}", problem=brief(error))
            print(f"{line} {brief(error)}", flush=True)
        machine.leave_after_fault(context.device)


def compile_peers(context: Context, jobs: Iterable[Prepared]) -> None:
    """Have Inductor compile what these jobs need, into its cache; what is refused or wrong is told when it is timed."""
    for _, _, prepare in jobs:
        try:
            job = prepare()
            with torch.no_grad():  # as when it is timed: another variant for Inductor
                job.calls[0]()
        except Exception as error:  # noqa: BLE001 - it is told when it is timed
            print(brief(error), flush=True)
        machine.leave_after_fault(context.device)
