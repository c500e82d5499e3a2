"""A training step of S1's model (forward, backward, Adam): calcformer against torch.nn.Transformer.

All rows of a batch size come from one measurement in which the providers take turns (`bench.training_speed`); times are
of one step.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from bench import training_speed
from bench.benchmark import Benchmark, GpuStage, Table
from bench.machine import leave_after_fault, pick_device
from bench.record import Context, brief, name_row
from bench.rows import read_rows
from bench.timing import play_samples
from bench.training_speed import BATCH, LARGE_BATCH, OURS, Speeds, best, cases

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark(
    first=[GpuStage("training", need=5, seconds=52), GpuStage("compiled training", need=6, seconds=74)],
    warms_up=True,
    tables=[
        Table(
            "A training step of calcformer's model, as it trains: by a CUDA graph, examples a second by batch",
            r"S1 training step B(\d+) fp32 on GPU",
            "examples_per_second",
        )
    ],
)

# Ways to train, by stage; 40 and 58 s are expected.
STAGES = {
    "training": (training_speed.EAGER, training_speed.GRAPH),
    "compiled training": (training_speed.GRAPH, training_speed.COMPILED, training_speed.COMPILED_GRAPH),
}
DEVICE = pick_device()
WAYS = training_speed.ways_here(DEVICE)
BATCHES = (BATCH,) if DEVICE.type == "cpu" else (BATCH, LARGE_BATCH)


@cache
def measured(batch_size: int, smoke: bool) -> Speeds:
    return training_speed.measure(DEVICE, 0.0 if smoke else 60.0, WAYS[:1] if smoke else WAYS, batch_size)


@pytest.mark.parametrize(("provider", "way"), cases(DEVICE, WAYS))
@pytest.mark.parametrize("batch_size", BATCHES)
def test_step(benchmark: BenchmarkFixture, batch_size: int, way: str, provider: str, device: torch.device) -> None:
    if benchmark.disabled and (way != WAYS[0] or batch_size != BATCH):
        pytest.skip("the smoke test trains in one way")
    where = "GPU" if device.type == "cuda" else f"CPU, {way}"
    name_row(
        benchmark,
        f"S1 training step B{batch_size} fp32 on {where}",
        f"{provider}, {way}" if device.type == "cuda" else provider,
    )
    speeds = measured(batch_size, benchmark.disabled)
    if (provider, way) not in speeds:
        pytest.skip("it cannot be compiled here")
    speed = speeds[provider, way]
    # Ours in the same way, if there is one; nn.Transformer as one writes it, which has no second process.
    ours = speeds.get((OURS, way), speeds[OURS, WAYS[0]])
    peer = speeds.get((training_speed.PEER, way), speeds[training_speed.PEER, WAYS[0]])
    benchmark.extra_info.update(
        examples_per_second=speed.examples_per_second,
        times_nn_transformer=speed.examples_per_second / peer.examples_per_second,
        calcformer_times_this=ours.examples_per_second / speed.examples_per_second,
        calcformer_times_this_each_at_its_best=best(speeds, OURS) / best(speeds, provider),
        calcformer_at_its_best_times_this=best(speeds, OURS) / speed.examples_per_second,
        method=f"wall clock, epochs of {speed.examples // batch_size} steps, providers in turns",
    )
    play_samples(benchmark, [seconds * batch_size / speed.examples for seconds in speed.seconds])


def training_plan(stage: str, context: Context) -> list[tuple[int, tuple[str, ...]]]:
    """Batch sizes, and ways to train."""
    if context.rehearse:
        training_speed.EXAMPLES = 500
        return [(BATCH, (training_speed.ONE,))]
    return [(batch_size, STAGES[stage]) for batch_size in (BATCH, LARGE_BATCH)]


def warm_up(context: Context) -> None:
    """Two epochs of each way to train; Triton's and Inductor's caches then have it."""
    for batch_size, ways in training_plan("compiled training", context):
        torch.manual_seed(0)
        with training_speed.build_epochs(context.device, ways, batch_size) as epochs:
            training_speed.warm_up(epochs, lambda provider, way, error: print(provider, way, brief(error), flush=True))


def time_stage(stage: str, context: Context) -> None:
    """Training steps of S1's model in these ways; the rows are written anew after every turn. A way that fails is left
    out, and costs the others nothing."""
    for batch_size, ways in training_plan(stage, context):
        group = f"S1 training step B{batch_size} fp32 on GPU"
        failed = {row["case"] for row in read_rows(context.rows) if row["kind"] == "failed"}
        without = {key for key in cases(context.device, ways) if f"{group}: {', '.join(key)}" in failed}

        def left_out(provider: str, way: str, error: Exception, group: str = group) -> None:
            context.write("failed", case=f"{group}: {provider}, {way}", problem=brief(error))
            print(f"{group}: {provider}, {way}: {brief(error)}", flush=True)
            leave_after_fault(context.device)

        seconds = 0.0 if context.rehearse else 12.0
        for speeds in training_speed.turns(context.device, seconds, ways, batch_size, without, left_out):
            for (provider, way), speed in speeds.items():
                context.write(
                    "time",
                    case=f"{group}: {provider}, {way}",
                    group=group,
                    provider=f"{provider}, {way}",
                    seconds=batch_size / speed.examples_per_second,
                    samples=speed.seconds,
                    info={"examples_per_second": speed.examples_per_second},
                )
            told = (f"{', '.join(key)} {speed.examples_per_second:,.0f}/s" for key, speed in speeds.items())
            print(f"{group}: {'; '.join(told)}", flush=True)
