"""Time of one call: on a GPU between events around replays of a CUDA graph, on a CPU by the wall clock.

The samples are taken here and then played to pytest-benchmark through `clock`, so that its tables and JSON hold GPU
time, and so that several providers can be measured in turns. Host time, what a call costs the program that makes it,
is taken apart, with the GPU idle at its start.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Call = Callable[[], object]

ROUND = 2e-3  # seconds a round should last: events resolve about half a microsecond
MAX_CALLS = 512  # calls captured in a graph
MAX_SETS = 64  # input sets to rotate among
ROUNDS = 5, 50  # fewest and most


class Samples(NamedTuple):
    """Seconds of one call, a value for each round; how they were taken; seconds the host was busy with one call."""

    seconds: list[float]
    method: str
    host_seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def input_sets(bytes_per_call: int, device: torch.device) -> int:
    """How many input sets to rotate among so that none is still in a GPU's L2 cache when its turn comes again.

    On a CPU one: its caches stay warm, as they do in a program that calls in a loop.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, math.ceil(4 * cache / bytes_per_call)))


def measure(calls: Sequence[Call], device: torch.device, seconds: float = 0.25, graph: bool = True) -> Samples:
    """Time the calls, which do the same work on different inputs, in turns for about `seconds`.

    Args:
        graph: False where a CUDA graph may not be captured; then events around plain calls, which count the host's time
            too where it is the longer.

    On a GPU call this, and make the inputs, on a stream of your own: capture is not allowed on the default one, and
    a backward pass runs on the stream of its forward pass.
    """
    for call in calls[:3]:
        call()  # compile, load, choose
    if device.type != "cuda":
        return _measure_cpu(calls, seconds)
    host = _host_seconds(calls)
    if graph:
        try:
            return Samples(_measure_graph(calls, seconds), "cuda graph between events", host)
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).strip().splitlines()[0]
            return Samples(_measure_events(calls, seconds), f"calls between events (no graph: {reason})", host)
    return Samples(_measure_events(calls, seconds), "calls between events", host)


def _measure_cpu(calls: Sequence[Call], seconds: float) -> Samples:
    started = time.perf_counter()
    calls[0]()
    once = max(time.perf_counter() - started, 1e-7)
    loops = max(1, math.ceil(ROUND / once))
    turn = itertools.cycle(calls)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < ROUNDS[0] or (time.perf_counter() < end and len(samples) < ROUNDS[1]):
        started = time.perf_counter()
        for _ in range(loops):
            next(turn)()
        samples.append((time.perf_counter() - started) / loops)
    return Samples(samples, "wall clock", statistics.median(samples))


def _host_seconds(calls: Sequence[Call], count: int = 20) -> float:
    samples = []
    for call, _ in zip(itertools.cycle(calls), range(count)):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(samples)


def _estimate(calls: Sequence[Call]) -> float:
    """Seconds a call, roughly; too long where the host is slower than the GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for call in calls[:8]:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(calls[:8])


def _measure_graph(calls: Sequence[Call], seconds: float) -> list[float]:
    n_sets = len(calls)
    n_calls = min(MAX_CALLS, math.ceil(ROUND / _estimate(calls)))
    n_calls = math.ceil(n_calls / n_sets) * n_sets
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = [None] * n_sets  # so that each input set has outputs of its own, as cold as its inputs
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for place in range(n_calls):
            kept[place % n_sets] = calls[place % n_sets]()
    return _rounds(graph.replay, n_calls, seconds)


def _measure_events(calls: Sequence[Call], seconds: float) -> list[float]:
    n_calls = min(MAX_CALLS, math.ceil(ROUND / _estimate(calls)))
    turn = itertools.cycle(calls)

    def play() -> None:
        for _ in range(n_calls):
            next(turn)()

    return _rounds(play, n_calls, seconds)


def _rounds(play: Callable[[], None], n_calls: int, seconds: float) -> list[float]:
    """Seconds a call from events around each `play`. All are queued at once, so that the GPU never waits for the host.

    The first rounds warm up and let the host run ahead.
    """
    torch.cuda.synchronize()
    started = time.perf_counter()
    play()
    torch.cuda.synchronize()
    once = time.perf_counter() - started
    rounds = min(max(ROUNDS[0], int(seconds / once)), ROUNDS[1])
    for _ in range(2):
        play()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        start.record()
        play()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 / n_calls for start, end in marks]


_now = 0.0


def clock() -> float:
    """The timer that pytest-benchmark reads: it stands still but for the samples played to it."""
    return _now


def play_samples(benchmark: BenchmarkFixture, seconds: Iterable[float]) -> None:
    """Let pytest-benchmark see these samples, one a round."""
    samples = list(seconds)
    rest = iter(samples)

    def advance() -> None:
        global _now
        _now += next(rest, 0.0)

    benchmark.pedantic(advance, rounds=len(samples))
