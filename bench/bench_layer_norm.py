"""Norms, alone and after dropout and a sum: ours against PyTorch's, Liger's, QuACK's, and a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import layer_norm
from bench.accounting import NormCase, norm_cases
from bench.record import time_row

ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}")
    for case in norm_cases(torch.cuda.is_available())
    for provider in layer_norm.PROVIDERS
]


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: NormCase, provider: str, device: torch.device) -> None:
    """Without gradients, as in inference."""
    time_row(benchmark, lambda: layer_norm.prepare(provider, case, "forward", device), device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: NormCase, provider: str, device: torch.device) -> None:
    """torch.autograd.grad alone, on a graph that was made before and is kept: gradients of all inputs."""
    time_row(benchmark, lambda: layer_norm.prepare(provider, case, "backward", device), device)
