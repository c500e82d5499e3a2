"""A training step of S1's model (forward, backward, Adam): calcformer against torch.nn.Transformer.

All rows of a batch size come from one measurement in which the providers take turns (`bench.training_speed`); times are
of one step.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import training_speed
from bench.machine import pick_device
from bench.record import name_row
from bench.timing import play_samples
from bench.training_speed import BATCH, LARGE_BATCH, OURS, Speeds, best, cases

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
    name_row(benchmark, f"S1 training step B{batch_size} fp32 on {where}",
             f"{provider}, {way}" if device.type == "cuda" else provider)
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
