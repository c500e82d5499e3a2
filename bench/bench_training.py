"""A training step of S1's model (forward, backward, Adam; batch 125): calcformer against torch.nn.Transformer.

All rows come from one measurement in which the providers take turns (`bench.training_speed`); times are of one step.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import training_speed
from bench.machine import pick_device
from bench.record import name_row
from bench.timing import play_samples
from bench.training_speed import ONE, OURS, PAIR, PEER, PROVIDERS, Speeds, best

BATCH = 125
STEPS = training_speed.EXAMPLES // BATCH
WAYS = training_speed.ways_here(pick_device())
CASES = [(provider, way) for way in WAYS for provider in PROVIDERS if way != PAIR or provider == OURS]


@pytest.fixture(scope="module")
def speeds(request: pytest.FixtureRequest, device: torch.device) -> Speeds:
    if request.config.getoption("--benchmark-disable"):
        return training_speed.measure(device, 0.0, [ONE])
    return training_speed.measure(device, 60.0, WAYS)


@pytest.mark.parametrize(("provider", "way"), CASES)
def test_step(benchmark: BenchmarkFixture, way: str, provider: str, device: torch.device, speeds: Speeds) -> None:
    if benchmark.disabled and way != ONE:
        pytest.skip("the smoke test trains with one thread")
    where = "GPU" if device.type == "cuda" else f"CPU, {way}"
    name_row(benchmark, f"S1 training step B{BATCH} fp32 on {where}", provider)
    speed = speeds[provider, way]
    peer = speeds[PEER, ONE if way == PAIR else way]
    benchmark.extra_info.update(
        examples_per_second=speed.examples_per_second,
        times_nn_transformer=speed.examples_per_second / peer.examples_per_second,
        calcformer_times_this=speeds[OURS, way].examples_per_second / speed.examples_per_second,
        calcformer_times_this_each_at_its_best=best(speeds, OURS) / best(speeds, provider),
        method=f"wall clock, epochs of {STEPS} steps, providers in turns",
    )
    play_samples(benchmark, [seconds / STEPS for seconds in speed.seconds])
