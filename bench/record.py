"""From a provider's calls to a row of figures, for pytest-benchmark and for bench/rows.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from bench.accounting import Work
from bench.ceilings import ceilings
from bench.check import WrongResult
from bench.timing import Call, Samples, measure, play_samples

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

T = TypeVar("T")


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
