"""Problems a second of S1's model, untrained: greedy decoding with and without a cache, and a beam of four.

Every answer has six tokens, the most there are: no row is finished early, and both ways of greedy decoding make as many
steps.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import decoding
from bench.decoding import BEAM, GREEDY, S1
from bench.record import name_row
from bench.timing import measure, play_samples

WAYS = {"greedy": GREEDY, "beam of 4": BEAM}
ROWS = [(batch, way, provider) for batch in (1, 100, 1_000, 10_000) for way in WAYS for provider in WAYS[way]]
CHECKED = 1_000  # problems


@pytest.fixture(scope="module")
def s1(device: torch.device) -> S1:
    """The model, whose decoding was found to be right."""
    found = S1(device)
    decoding.check(found, found.problems(CHECKED))
    return found


@pytest.mark.parametrize(("batch", "way", "provider"), ROWS)
def test_decoding(benchmark: BenchmarkFixture, batch: int, way: str, provider: str, device: torch.device, s1: S1
                  ) -> None:
    if benchmark.disabled and batch > 100:
        pytest.skip("the smoke test decodes few problems")
    where = "GPU" if device.type == "cuda" else "CPU"
    name_row(benchmark, f"S1 {way} decoding B{batch} T6 fp32 on {where}", provider)
    source, function = s1.problems(batch), WAYS[way][provider]

    def call() -> None:
        s1.decode(function, source)

    if benchmark.disabled:
        benchmark(call)
        return
    samples = measure([call], device, graph=False)  # after each token the host asks whether all have finished
    benchmark.extra_info.update(problems_per_second=batch / samples.median, method=samples.method)
    play_samples(benchmark, samples.seconds)
