"""Training speed at S1's size: calcformer's own loop against torch.nn.Transformer, in turns, on the same problems.

    python -m bench.training_speed [--seconds 60]

A round is one epoch of 10,000 formulas in batches of 125. calcformer's is `Trainer.epoch`, all of it: order, batches,
steps, running loss and accuracy. The peer's counts nothing but its loss. Rounds alternate between providers and ways to
use the cores, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from bench.machine import describe, pick_device
from bench.s1_transformer import TransformerTrainer
from calcformer.config import PRESETS, RunConfig
from calcformer.training.loop import Trainer

OURS, PEER, LEAN = "calcformer", "nn.Transformer", "nn.Transformer, no padding, fused Adam"
PROVIDERS = (OURS, PEER, LEAN)
EXAMPLES = 10_000
TURNS = 2, 40  # fewest and most
ONE, TWO, PAIR = "1 thread", "2 threads", "2 processes"  # ways to use the cores; PAIR is calcformer's only


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


def s1_config(device: torch.device, processes: int = 1) -> RunConfig:
    """The S1 preset on fewer problems, and without validation between epochs."""
    never = 1_000_000
    return PRESETS["formula"].with_settings({
        "train_size": EXAMPLES, "valid_size": 1, "epochs": never, "valid_every": never, "device": device.type,
        "processes": processes,
    })  # fmt: skip


@contextmanager
def build_epochs(device: torch.device, ways: Sequence[str]) -> Iterator[dict[tuple[str, str], Epoch]]:
    """The epochs of each provider in each of the ways it has."""
    epochs: dict[tuple[str, str], Epoch] = {}
    with ExitStack() as stack:
        for pair in (False, True) if PAIR in ways else (False,):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trainer = Trainer(s1_config(device, 1 + pair), folder, bar=False)
            trainer.begin()
            trainer.team = stack.enter_context(trainer.start_team())

            def ours(trainer: Trainer = trainer, numbers: Iterator[int] = count(1)) -> float:
                return trainer.epoch(next(numbers))["loss"]

            epochs |= {(OURS, way): ours for way in ways if (way == PAIR) == pair}
        config = trainer.config
        for name, lean in ((PEER, False), (LEAN, True)):
            peer = TransformerTrainer(trainer.task, config.data, config.model, device, config.training.learning_rate,
                                      config.training.batch_size, lean)  # fmt: skip
            epochs |= {(name, way): peer.epoch for way in ways if way != PAIR}
        yield epochs


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ways_here(device: torch.device) -> list[str]:
    """As far as there are cores; on a GPU one thread."""
    return [ONE, TWO, PAIR] if device.type == "cpu" and (os.cpu_count() or 1) > 1 else [ONE]


def measure(device: torch.device, seconds: float, ways: Sequence[str]) -> Speeds:
    """Train in turns for about `seconds`; the first epochs of each provider warm up and show that it learns."""
    torch.manual_seed(0)
    with build_epochs(device, ways) as epochs:
        for (provider, way), epoch in epochs.items():
            if way == TWO:
                continue  # the same model as with one thread
            with thread_count(1):
                first, second = epoch(), epoch()
            if not second < first < 2 * math.log(20):
                raise AssertionError(f"{provider} does not learn: mean loss {first:.3f}, then {second:.3f}")
        speeds = {key: Speed([], []) for key in epochs}
        end = time.perf_counter() + seconds
        for turn in range(TURNS[1]):
            if turn >= TURNS[0] and time.perf_counter() > end:
                break
            for key in list(epochs) if turn % 2 == 0 else reversed(list(epochs)):
                with thread_count(2 if key[1] == TWO else 1):
                    started, cpu_started = time.perf_counter(), time.process_time()
                    epochs[key]()  # ends with a number on the host, so nothing is left running
                    speeds[key].seconds.append(time.perf_counter() - started)
                    speeds[key].cpu_seconds.append(time.process_time() - cpu_started)
    return speeds


def best(speeds: Speeds, provider: str) -> float:
    """Examples a second in the way that suits the provider."""
    return max(speed.examples_per_second for (name, _), speed in speeds.items() if name == provider)


def table(speeds: Speeds) -> str:
    """A line for each provider and way, then ours over each peer, with one thread and each in its best way."""
    rounds = len(next(iter(speeds.values())).seconds)
    lines = [f"Medians of {rounds} rounds of {EXAMPLES} examples, in turns",
             f"{'provider':<40} {'on':<12} examples/s   slowest   fastest"]
    for (provider, way), speed in speeds.items():
        low, high = (speed.examples / pick(speed.seconds) for pick in (max, min))
        lines.append(f"{provider:<40} {way:<12} {speed.examples_per_second:>10,.0f}  {low:>8,.0f}  {high:>8,.0f}")
    for peer in PROVIDERS[1:]:
        ours, theirs = speeds[OURS, ONE], speeds[peer, ONE]
        ratio = ours.examples_per_second / theirs.examples_per_second
        cpu_ratio = ours.examples_per_cpu_second / theirs.examples_per_cpu_second
        lines.append(f"calcformer is {ratio:.2f} x as fast as {peer} with one thread each ({cpu_ratio:.2f} by CPU "
                     f"time), {best(speeds, OURS) / best(speeds, peer):.2f} x with each in its best way")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="to measure for (60); one turn is always taken")
    options = parser.parse_args(argv)
    device = pick_device()
    info = describe()
    print(f"{info['gpu'] or 'CPU'}, {info['cpu_count']} cores, torch {info['torch']}, commit {info['commit']}")
    print(table(measure(device, options.seconds, ways_here(device))))


if __name__ == "__main__":
    main()
