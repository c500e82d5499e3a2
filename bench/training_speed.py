"""Training speed at S1's size: calcformer's own loop against torch.nn.Transformer, in turns, on the same problems.

    python -m bench.training_speed [--seconds 60] [--all]

A round is one epoch of formulas: 10,000 in batches of 125; on a GPU also 81,920 in batches of 4096. calcformer's is
`Trainer.epoch`, all of it: order, batches, steps, running loss and accuracy. The peer's counts nothing but its loss.
Rounds alternate between providers and ways to run them, so that what else the machine does hits all alike. On a CPU the
ways are numbers of threads and processes, of which the fastest is the presets' default, with --all also bfloat16 and
torch.compile (a minute more); on a GPU eager steps, CUDA graphs and torch.compile without and with them.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.machine import describe, pick_device
from bench.nn_transformer import TransformerTrainer
from calcformer.config import PRESETS, RunConfig
from calcformer.model.settings import ModelConfig
from calcformer.training.trainer import Trainer

OURS, PEER, LEAN = "calcformer", "nn.Transformer", "nn.Transformer, no padding, fused Adam"
PROVIDERS = (OURS, PEER, LEAN)
BATCH, LARGE_BATCH = 125, 4096
EXAMPLES = 10_000
TURNS = 2, 40  # fewest and most
# Ways on a CPU; those after the first two are calcformer's only. BFLOAT16 and COMPILED run on one thread.
ONE, TWO, PAIR, BFLOAT16 = "1 thread", "2 threads", "2 processes", "bfloat16"
EAGER, GRAPH, COMPILED, COMPILED_GRAPH = "eager", "CUDA graph", "compiled", "compiled, CUDA graph"  # ways on a GPU
SETTINGS: dict[str, dict[str, Any]] = {
    PAIR: {"processes": 2},
    BFLOAT16: {"precision": "bfloat16"},
    COMPILED: {"compile": True},
}
MODES = {COMPILED: "default", COMPILED_GRAPH: "reduce-overhead"}  # of torch.compile, for the peer


class Speed(NamedTuple):
    """Seconds of each round, `examples` long: by the wall clock, and of this process's CPU time, all threads together.

    With one thread and no GPU the two agree on an idle machine; on a busy one CPU time is the steadier.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    examples: int = EXAMPLES

    @property
    def examples_per_second(self) -> float:
        return self.examples / statistics.median(self.seconds)

    @property
    def examples_per_cpu_second(self) -> float:
        return self.examples / statistics.median(self.cpu_seconds)


Speeds = dict[tuple[str, str], Speed]  # by provider and way
Epoch = Callable[[], float]  # trains one more epoch and returns its mean loss
LeftOut = Callable[[str, str, Exception], None]  # is told of a provider and way that fail, and why


def examples_in(batch_size: int) -> int:
    """Examples in a round: whole batches, since a smaller one would be compiled for itself."""
    return EXAMPLES if batch_size == BATCH else 20 * batch_size


def s1_config(device: torch.device, batch_size: int = BATCH, **changes: Any) -> RunConfig:
    """The S1 preset on one process, on the problems of a round, and without validation between epochs."""
    never = 1_000_000
    return PRESETS["formula"].with_settings(
        {
            "train_size": examples_in(batch_size),
            "valid_size": 1,
            "epochs": never,
            "valid_every": never,
            "device": device.type,
            "processes": 1,
            "batch_size": batch_size,
            **changes,
        }
    )


def cases(device: torch.device, ways: Sequence[str]) -> list[tuple[str, str]]:
    """Each provider in each of the ways it has; on a GPU the leaner peer alone is compiled."""
    if device.type == "cpu":
        return [(provider, way) for way in ways for provider in PROVIDERS if provider == OURS or way in (ONE, TWO)]
    has = {OURS: (EAGER, GRAPH, COMPILED), PEER: (EAGER,), LEAN: (EAGER, COMPILED, COMPILED_GRAPH)}
    return [(provider, way) for way in ways for provider in PROVIDERS if way in has[provider]]


@contextmanager
def build_epochs(
    device: torch.device, ways: Sequence[str], batch_size: int = BATCH, without: Collection[tuple[str, str]] = ()
) -> Iterator[dict[tuple[str, str], Epoch]]:
    """The epochs of each provider in each of the ways it has, but for those of `without`."""
    epochs: dict[tuple[str, str], Epoch] = {}
    config = s1_config(device, batch_size)
    task = config.data.build()
    assert isinstance(config.model, ModelConfig)
    with ExitStack() as stack:
        for provider, way in cases(device, ways):
            if (provider, way) in without:
                continue
            if way == TWO and (provider, ONE) in epochs:
                epochs[provider, TWO] = epochs[provider, ONE]  # the same model, on more threads
                continue
            if provider == OURS:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                trainer = Trainer(s1_config(device, batch_size, **SETTINGS.get(way, {})), bar=False)
                trainer.begin(folder)
                trainer.team = stack.enter_context(trainer.start_team())
                if way == EAGER:
                    trainer.graphed_steps = None

                def ours(trainer: Trainer = trainer, numbers: Iterator[int] = count(1)) -> float:
                    return trainer.epoch(next(numbers))["loss"]

                epochs[provider, way] = ours
            else:
                peer = TransformerTrainer(
                    task,
                    config.model,
                    device,
                    config.training.learning_rate,
                    batch_size,
                    provider == LEAN,
                    MODES.get(way),
                )
                epochs[provider, way] = peer.epoch
        yield epochs


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ways_here(device: torch.device, all_ways: bool = False) -> list[str]:
    """As far as there are cores; `all_ways` adds those that a CPU seldom gains by."""
    if device.type != "cpu":
        return [EAGER, GRAPH, COMPILED, COMPILED_GRAPH]
    return [ONE, *([TWO, PAIR] if (os.cpu_count() or 1) > 1 else []), *([BFLOAT16, COMPILED] if all_ways else [])]


def complain(provider: str, way: str, error: Exception) -> None:
    """What becomes of a way to train that fails: a peer's that cannot be compiled here is left out, with the reason."""
    if provider == OURS or not isinstance(error, RuntimeError):
        raise error
    print(f"{provider}, {way}, is left out: {str(error).strip().splitlines()[0]}")


def warm_up(epochs: dict[tuple[str, str], Epoch], left_out: LeftOut = complain) -> None:
    """Two epochs of each, in which it must learn; one that fails is told to `left_out` and taken out.

    calcformer comes last: PyTorch frees cuBLAS's memory when it records the graphs of a compiled model, also where a
    graph of ours would use it.
    """
    for provider, way in sorted(epochs, key=lambda key: key[0] == OURS):
        if way == TWO:
            continue  # the same model as with one thread
        try:
            with thread_count(1):
                first, second = epochs[provider, way](), epochs[provider, way]()
            if not second < first < 2 * math.log(20):
                raise AssertionError(f"{provider}, {way} does not learn: mean loss {first:.3f}, then {second:.3f}")
        except Exception as error:  # noqa: BLE001 - whose it is, left_out decides
            left_out(provider, way, error)
            del epochs[provider, way]


def turns(
    device: torch.device,
    seconds: float,
    ways: Sequence[str],
    batch_size: int = BATCH,
    without: Collection[tuple[str, str]] = (),
    left_out: LeftOut = complain,
) -> Iterator[Speeds]:
    """Train in turns for about `seconds`, after warming up; what is known so far after the second turn, and each.

    Args:
        without: providers and ways that are not tried. left_out: is told of those that fail.
    """
    torch.manual_seed(0)
    with build_epochs(device, ways, batch_size, without) as epochs:
        warm_up(epochs, left_out)
        speeds = {key: Speed([], [], examples_in(batch_size)) for key in epochs}
        end = time.perf_counter() + seconds
        for turn in range(TURNS[1]):
            if not epochs or (turn >= TURNS[0] and time.perf_counter() > end):
                break
            for key in list(epochs) if turn % 2 == 0 else reversed(list(epochs)):
                with thread_count(2 if key[1] == TWO else 1):
                    started, cpu_started = time.perf_counter(), time.process_time()
                    try:
                        epochs[key]()  # ends with a number on the host, so nothing is left running
                    except Exception as error:  # noqa: BLE001
                        left_out(*key, error)
                        del epochs[key], speeds[key]
                        continue
                    speeds[key].seconds.append(time.perf_counter() - started)
                    speeds[key].cpu_seconds.append(time.process_time() - cpu_started)
            if turn + 1 >= TURNS[0]:
                yield speeds


def measure(device: torch.device, seconds: float, ways: Sequence[str], batch_size: int = BATCH) -> Speeds:
    """What is known after the last turn."""
    return list(turns(device, seconds, ways, batch_size))[-1]


def best(speeds: Speeds, provider: str) -> float:
    """Examples a second in the way that suits the provider."""
    return max(speed.examples_per_second for (name, _), speed in speeds.items() if name == provider)


def table(speeds: Speeds) -> str:
    """A line for each provider and way, then ours over the peers: with one thread, in each way, in the best ways."""
    some = next(iter(speeds.values()))
    lines = [
        f"Medians of {len(some.seconds)} rounds of {some.examples} examples, in turns",
        f"{'provider':<40} {'on':<20} examples/s   slowest   fastest",
    ]
    for (provider, way), speed in speeds.items():
        low, high = (speed.examples / pick(speed.seconds) for pick in (max, min))
        lines.append(f"{provider:<40} {way:<20} {speed.examples_per_second:>10,.0f}  {low:>8,.0f}  {high:>8,.0f}")
    ours, fastest = max((speed.examples_per_second, way) for (name, way), speed in speeds.items() if name == OURS)
    lines.append(f"calcformer is fastest by: {fastest}")
    for (peer, way), theirs in speeds.items():
        if peer == OURS:
            continue
        if way == ONE:
            same = speeds[OURS, ONE]
            lines.append(
                f"calcformer is {same.examples_per_second / theirs.examples_per_second:.2f} x as fast as "
                f"{peer} with one thread each "
                f"({same.examples_per_cpu_second / theirs.examples_per_cpu_second:.2f} by CPU time), "
                f"{ours / best(speeds, peer):.2f} x with each in its best way"
            )
        elif way in (EAGER, COMPILED, COMPILED_GRAPH):
            lines.append(
                f"calcformer in its best way is {ours / theirs.examples_per_second:.2f} x as fast as {peer}, {way}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="to measure for (60); two turns are always taken")
    parser.add_argument("--all", action="store_true", help="on a CPU also bfloat16 and torch.compile")
    options = parser.parse_args(argv)
    device = pick_device()
    info = describe()
    print(f"{info['gpu'] or 'CPU'}, {info['cpu_count']} cores, torch {info['torch']}, commit {info['commit']}")
    for batch_size in (BATCH,) if device.type == "cpu" else (BATCH, LARGE_BATCH):
        print(f"\nBatches of {batch_size}")
        print(table(measure(device, options.seconds, ways_here(device, options.all), batch_size)))


if __name__ == "__main__":
    main()
