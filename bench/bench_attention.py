"""Attention, forward and backward: ours against each of PyTorch's own, by name, and FlexAttention."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import attention
from bench.accounting import AttentionCase, Direction, attention_cases, short_cases
from bench.attention import Inputs
from bench.record import attempt, name_row, time_row
from bench.timing import Call, input_sets

ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}", marks=marks)
    for cases, marks in ((attention_cases, ()), (short_cases, pytest.mark.short))
    for case in cases(torch.cuda.is_available())
    for provider in attention.PROVIDERS
]


def first_inputs(
    benchmark: BenchmarkFixture, case: AttentionCase, provider: str, direction: Direction, device: torch.device
) -> Inputs:
    """Inputs on which the provider was found to be right."""
    backward = direction == "backward"
    inputs = attention.make_inputs(case, device, requires_grad=backward)
    name_row(benchmark, f"attention {direction} {case}", attention.label(provider, case, inputs))
    attempt(provider, lambda: attention.check(provider, case, inputs, backward))
    return inputs


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    """Without gradients, as in inference."""
    work = case.work("forward")
    inputs = [first_inputs(benchmark, case, provider, "forward", device)]
    inputs += [attention.make_inputs(case, device) for _ in range(input_sets(work.bytes, device) - 1)]
    function = attempt(provider, lambda: attention.build(provider, case))
    calls: list[Call] = [lambda x=x: function(x) for x in inputs]  # type: ignore[misc]
    with torch.no_grad():
        time_row(benchmark, calls, work, device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    """torch.autograd.grad alone, on a graph that was made before and is kept; a learned bias gets its gradient too."""
    work = case.work("backward")
    inputs = [first_inputs(benchmark, case, provider, "backward", device)]
    sets = input_sets(work.bytes, device)
    inputs += [attention.make_inputs(case, device, requires_grad=True) for _ in range(sets - 1)]
    function = attempt(provider, lambda: attention.build(provider, case))

    def backward(x: Inputs) -> Call:
        output = function(x)

        def call() -> object:
            with attention.running(provider):
                return torch.autograd.grad(output, x.differentiable(), x.grad_output, retain_graph=True)

        return call

    # PyTorch keeps a dropout seed that was drawn outside a graph where a backward pass inside one cannot read it.
    time_row(benchmark, [backward(x) for x in inputs], work, device, graph=not case.dropout)
