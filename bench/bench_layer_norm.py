"""Norms, alone and after dropout and a sum: ours against PyTorch's, Liger's, QuACK's, and a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import layer_norm
from bench.accounting import Direction, NormCase, norm_cases
from bench.layer_norm import Inputs
from bench.record import attempt, name_row, time_row
from bench.timing import Call, input_sets

ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}")
    for case in norm_cases(torch.cuda.is_available())
    for provider in layer_norm.PROVIDERS
]


def run(
    benchmark: BenchmarkFixture, case: NormCase, provider: str, direction: Direction, device: torch.device
) -> None:
    backward = direction == "backward"
    work = case.work(direction)
    sets = input_sets(work.bytes, device)
    name_row(benchmark, case.group(direction), layer_norm.label(provider, case, device))
    if provider == layer_norm.COPY:
        time_row(benchmark, layer_norm.copies(case, direction, device, sets), work, device)
        return
    inputs = [layer_norm.make_inputs(case, device, requires_grad=backward) for _ in range(sets)]
    attempt(provider, lambda: layer_norm.check(provider, case, inputs[0], backward))
    function = layer_norm.build(provider, case, device)

    def call(x: Inputs) -> Call:
        if not backward:
            return lambda: function(x)
        results, differentiable, upstream = function(x), x.differentiable(), x.upstream()
        return lambda: torch.autograd.grad(results, differentiable, upstream, retain_graph=True)

    calls = [call(x) for x in inputs]
    with torch.no_grad():
        time_row(benchmark, calls, work, device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: NormCase, provider: str, device: torch.device) -> None:
    """Without gradients, as in inference."""
    run(benchmark, case, provider, "forward", device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: NormCase, provider: str, device: torch.device) -> None:
    """torch.autograd.grad alone, on a graph that was made before and is kept: gradients of all inputs."""
    run(benchmark, case, provider, "backward", device)
