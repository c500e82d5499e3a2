"""Host time of one call on tiny inputs, where the way to the kernel is all there is: ours against PyTorch's function.

On a GPU the calls are queued, not waited for, as in a model; the queue is emptied between rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels
from bench.record import name_row
from bench.timing import play_samples

if TYPE_CHECKING:  # where there is no pytest-benchmark, bench/gpu_work.py measures
    from pytest_benchmark.fixture import BenchmarkFixture

PROVIDERS: dict[str, Callable[..., Any]] = {
    "kernels": kernels.scaled_dot_product_attention,
    "torch sdpa": scaled_dot_product_attention,
}
CASES = "plain", "causal", "mask", "training"
CALLS, ROUNDS = 200, 15  # few enough calls not to fill a GPU's queue


def group(case: str) -> str:
    return f"host time of an attention call L4 S4 D8 {case}"


def make_call(case: str, provider: str, device: torch.device) -> Callable[[], None]:
    """One tiny call."""
    attend = PROVIDERS[provider]
    query, key, value = torch.randn(3, 1, 1, 4, 8, device=device).requires_grad_(case == "training").unbind()
    options: dict[str, Any] = {"is_causal": case == "causal"}
    if case == "mask":
        options["attn_mask"] = torch.ones(4, 4, dtype=torch.bool, device=device)
    upstream = torch.ones_like(query)

    def call() -> None:
        output = attend(query, key, value, **options)
        if case == "training":
            torch.autograd.grad(output, (query, key, value), upstream)

    return call


def measure(case: str, provider: str, device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """CPU seconds of this thread for one call, the mean of CALLS, by round: what other processes do does not count."""
    call = make_call(case, provider, device)
    return [seconds(call, device) for _ in range(rounds + 1)][1:]


def seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - started) / CALLS


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_host_time(benchmark: BenchmarkFixture, case: str, provider: str, device: torch.device) -> None:
    name_row(benchmark, group(case), provider)
    if benchmark.disabled:
        benchmark(make_call(case, provider, device))
    else:
        play_samples(benchmark, measure(case, provider, device))
