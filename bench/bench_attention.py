"""Attention, forward and backward: ours against each of PyTorch's own, by name, and FlexAttention."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import attention
from bench.accounting import AttentionCase, attention_cases, short_cases
from bench.record import time_row

ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}", marks=marks)
    for cases, marks in ((attention_cases, ()), (short_cases, pytest.mark.short))
    for case in cases(torch.cuda.is_available())
    for provider in attention.PROVIDERS
]


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    """Without gradients, as in inference."""
    time_row(benchmark, lambda: attention.prepare(provider, case, "forward", device), device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    """torch.autograd.grad alone."""
    time_row(benchmark, lambda: attention.prepare(provider, case, "backward", device), device)
