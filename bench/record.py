"""From a provider's calls to a row of pytest-benchmark."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.accounting import Work
from bench.ceilings import ceilings
from bench.check import WrongResult
from bench.timing import Call, Samples, measure, play_samples

T = TypeVar("T")


def name_row(benchmark: BenchmarkFixture, group: str, provider: str) -> None:
    """The group and the label under which pytest-benchmark prints the row."""
    benchmark.group, benchmark.name = group, provider
    benchmark.extra_info["provider"] = provider


def time_row(
    benchmark: BenchmarkFixture, calls: Sequence[Call], work: Work, device: torch.device, graph: bool = True
) -> None:
    """Measure the calls (one an input set) and hand the samples to pytest-benchmark; disabled, make one call."""
    if benchmark.disabled:
        benchmark(calls[0])
        return
    samples = measure(calls, device, graph=graph)
    benchmark.extra_info.update(figures(samples, work, device), input_sets=len(calls))
    if device.type == "cuda":
        benchmark.extra_info["peak_bytes"] = peak_bytes(calls[0], device)
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


def attempt(provider: str, function: Callable[[], T]) -> T:
    """The peer's first call: where it refuses the work, the row is skipped with its reason. Ours may not refuse."""
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
    pytest.skip(f"{provider} refuses: {reason[:400]}")
