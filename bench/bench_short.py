"""Attention on short sequences, many heads at once, forward and backward: ours against each of PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import attention
from bench.accounting import AttentionCase, short_cases
from bench.bench_attention import time_backward, time_forward

ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}")
    for case in short_cases(torch.cuda.is_available())
    for provider in attention.PROVIDERS
]


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    time_forward(benchmark, case, provider, device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    time_backward(benchmark, case, provider, device)
