"""Attention, forward and backward: ours, ours by the kernel for any shape, each of PyTorch's own, by name, and where
they are installed FlashAttention-3 and -4; on a GPU, for some shapes, FlexAttention compiled."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
import torch

from bench import attention
from bench.accounting import DIRECTIONS, AttentionCase, Direction, attention_cases, short_cases
from bench.attention import FLEX, GENERAL, PROVIDERS
from bench.benchmark import Benchmark, GpuStage, Table
from bench.record import Context, Prepared, compile_peers, time_all, time_row

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark(
    first=[  # expected: 40 s, 47 s and 24 s, with 0.4 s a row, and FlexAttention for two cases only
        GpuStage("attention forward", need=1, seconds=55),
        GpuStage("attention backward", need=2, seconds=60),
        GpuStage("short sequences", need=3, seconds=32),
    ],
    second=[GpuStage("main shapes", need=1, seconds=40)],
    warms_up=True,
    tables=[
        *(
            Table(
                f"Attention {direction}, D = {size}, {mask}, TFLOP/s by sequence length",
                rf"attention {direction} B\d+ H\d+ S(\d+) D{size} {mask} bf16",
                "tflops_per_second",
            )
            for direction in ("forward", "backward")
            for size in (64, 128, 256)
            for mask in ("full", "causal")
        ),
        *(
            Table(
                f"Short sequences {direction}, 32,768 heads of {size}, GB/s by sequence length",
                rf"attention {direction} B8192 H4 S(\d+) D{size} (?:full|causal) bf16",
                "gb_per_second",
            )
            for direction in ("forward", "backward")
            for size in (16, 32, 64)
        ),
        *(
            Table(
                f"Attention {direction} with shared heads, masks and dropout, TFLOP/s",
                rf"attention {direction} B\d+ H\d+ (Hkv\d+ S\d+ D128 causal|S\d+ D128 full (?:padding|bias)"
                r"|S\d+ D128 causal dropout .*) bf16",
                "tflops_per_second",
            )
            for direction in ("forward", "backward")
        ),
    ],
)

ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}", marks=marks)
    for cases, marks in ((attention_cases, ()), (short_cases, pytest.mark.short))
    for case in cases(torch.cuda.is_available())
    for provider in PROVIDERS
]

# On a GPU run: D = 128 first, the size most models have; then what else decides on a kernel.
MAIN = [AttentionCase(16_384 // length, 16, length, 128, True) for length in (4_096, 1_024, 16_384)]
WHOLE = [
    *MAIN,
    AttentionCase(4, 16, 4_096, 128),
    AttentionCase(4, 32, 4_096, 64, True),
    AttentionCase(4, 8, 4_096, 256, True),
    AttentionCase(1, 64, 4_096, 128, True, kv_heads=8),
    AttentionCase(8, 16, 2_048, 128, mask="padding"),
    AttentionCase(4, 16, 2_048, 128, mask="bias"),
    AttentionCase(8, 16, 2_048, 128, True, dropout=0.1),
]
FLEX_CASES = [WHOLE[0], WHOLE[3]]
SHORT = [AttentionCase(8_192, 4, n, 32, n in (5, 32)) for n in (9, 16, 32, 64, 5)]
QUICK = [provider for provider in PROVIDERS if provider != FLEX]
# Cases and directions of a stage.
STAGES: dict[str, tuple[list[AttentionCase], tuple[Direction, ...]]] = {
    "attention forward": (WHOLE, ("forward",)),
    "attention backward": (WHOLE, ("backward",)),
    "short sequences": (SHORT, DIRECTIONS),
    "main shapes": (MAIN, DIRECTIONS),
}


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    """Without gradients, as in inference."""
    time_row(benchmark, lambda: attention.prepare(provider, case, "forward", device), device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: AttentionCase, provider: str, device: torch.device) -> None:
    """torch.autograd.grad alone."""
    time_row(benchmark, lambda: attention.prepare(provider, case, "backward", device), device)


def jobs(
    context: Context, cases: Sequence[AttentionCase], direction: Direction, providers: Sequence[str]
) -> Iterator[Prepared]:
    for case in context.some(cases):
        for provider in providers:
            prepare = functools.partial(attention.prepare, provider, case, direction, context.device)
            yield f"attention {direction} {case}", provider, prepare


def stage_jobs(stage: str, context: Context) -> Iterator[Prepared]:
    """FlexAttention, which compiles for seconds a shape, with two cases only."""
    cases, directions = STAGES[stage]
    for direction in directions:
        for case in cases:
            with_flex = stage != "main shapes" and case in FLEX_CASES
            yield from jobs(context, [case], direction, PROVIDERS if with_flex else QUICK)


def time_stage(stage: str, context: Context) -> None:
    time_all(stage, context, stage_jobs(stage, context))


def warm_up(context: Context) -> None:
    for direction in DIRECTIONS:
        compile_peers(context, jobs(context, FLEX_CASES, direction, [FLEX]))


def launches(stage: str, context: Context) -> list[tuple[str, Callable[[str], None]]]:
    """Those of both directions stand at the first."""
    cases = [] if stage == "attention backward" else context.some(STAGES[stage][0])
    return [(str(case), functools.partial(launch, case)) for case in cases]


def launch(case: AttentionCase, device: str) -> None:
    """Every kernel that ours may be timed with, forward and backward."""
    for asked in "0", "1":
        os.environ["KERNELS_HOPPER"] = asked
        for provider in "kernels", GENERAL:
            with attention.running(provider):
                x = attention.make_inputs(case, torch.device(device), requires_grad=True)
                with torch.no_grad():
                    attention.build("kernels", case)(x)
                torch.autograd.grad(attention.build("kernels", case)(x), x.differentiable(), x.grad_output)
