"""The timing case of the expression report (S0): attention over 64 sequences of 256 or 512 positions, width 2048, fp32.

S0 gives 543 ms (256 positions) and 1.67 s (512) a call of its no-loop function, on a machine it does not name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels
from bench.accounting import AttentionCase
from bench.attention import name_of
from bench.benchmark import Benchmark
from bench.check import require_right
from bench.record import Job, time_row
from bench.timing import Call, input_sets

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark()

PROVIDERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "no loop": lambda q, k, v: kernels.reference.scaled_dot_product_no_loop_batch(q, k, v)[0],
    "kernels": kernels.scaled_dot_product_attention,
    "torch sdpa": scaled_dot_product_attention,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("positions", [256, 512])
def test_no_loop(benchmark: BenchmarkFixture, positions: int, provider: str, device: torch.device) -> None:
    sequences = 4 if benchmark.disabled else 64  # the smoke test need not take seconds a call
    work = AttentionCase(sequences, 1, positions, 2_048, dtype=torch.float32).work("forward")
    function = PROVIDERS[provider]
    sets = [torch.randn(3, sequences, positions, 2_048, device=device) for _ in range(input_sets(work.bytes, device))]
    name = name_of(kernels.explain(*sets[0])) if provider == "kernels" else provider
    query, key, value = sets[0][:, -1].double()
    weights = torch.softmax(query @ key.T / math.sqrt(2_048), dim=-1)
    calls: list[Call] = [lambda x=x: function(*x) for x in sets]  # type: ignore[misc]
    require_right(name, [function(*sets[0])[-1]], [weights @ value])
    group = f"S0 attention forward N{sequences} K{positions} M2048 full fp32"
    time_row(benchmark, lambda: Job(group, name, calls, work), device)
