"""Training speed at S1's size: calcformer's own loop against torch.nn.Transformer, in turns, on the same problems.

    python -m bench.training_speed [--seconds 60] [--threads 1 2]

A round is one epoch of 10,000 formulas in batches of 125. calcformer's is `Trainer.epoch`, all of it: order, batches,
steps, running loss and accuracy. The peer's counts nothing but its loss. Rounds alternate between providers and thread
counts, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


Speeds = dict[tuple[str, int], Speed]  # by provider and thread count


def s1_config(device: torch.device) -> RunConfig:
    """The S1 preset on fewer problems, and without validation between epochs."""
    never = 1_000_000
    return PRESETS["formula"].with_settings(
        {"train_size": EXAMPLES, "valid_size": 1, "epochs": never, "valid_every": never, "device": device.type}
    )


def build_epochs(device: torch.device, folder: Path) -> dict[str, Callable[[], float]]:
    """For each provider a function that trains one more epoch and returns its mean loss."""
    config = s1_config(device)
    trainer = Trainer(config, folder, bar=False)
    numbers = iter(range(1, config.training.epochs))
    epochs: dict[str, Callable[[], float]] = {OURS: lambda: trainer.epoch(next(numbers))["loss"]}
    for name, lean in ((PEER, False), (LEAN, True)):
        peer = TransformerTrainer(trainer.task, config.data, config.model, device, config.training.learning_rate,
                                  config.training.batch_size, lean)  # fmt: skip
        epochs[name] = peer.epoch
    return epochs


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_counts(device: torch.device) -> list[int]:
    """1 and 2, as far as there are cores; on a GPU 1."""
    return [1] if device.type == "cuda" else [n for n in (1, 2) if n <= (os.cpu_count() or 1)]


def measure(device: torch.device, seconds: float, threads: Iterable[int]) -> Speeds:
    """Train in turns for about `seconds`; the first epochs of each provider warm up and show that it learns."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        epochs = build_epochs(device, Path(folder))
        for provider, epoch in epochs.items():
            with thread_count(1):
                first, second = epoch(), epoch()
            if not second < first < 2 * math.log(20):
                raise AssertionError(f"{provider} does not learn: mean loss {first:.3f}, then {second:.3f}")
        keys = [(provider, count) for count in threads for provider in epochs]
        speeds = {key: Speed([], []) for key in keys}
        end = time.perf_counter() + seconds
        for turn in range(TURNS[1]):
            if turn >= TURNS[0] and time.perf_counter() > end:
                break
            for provider, count in keys if turn % 2 == 0 else reversed(keys):
                with thread_count(count):
                    started, cpu_started = time.perf_counter(), time.process_time()
                    epochs[provider]()  # ends with a number on the host, so nothing is left running
                    speeds[provider, count].seconds.append(time.perf_counter() - started)
                    speeds[provider, count].cpu_seconds.append(time.process_time() - cpu_started)
    return speeds


def best(speeds: Speeds, provider: str) -> float:
    """Examples a second with the thread count that suits the provider."""
    return max(speed.examples_per_second for (name, _), speed in speeds.items() if name == provider)


def table(speeds: Speeds) -> str:
    """A line for each provider and thread count, then ours over each peer with the best thread count of either."""
    rounds = len(next(iter(speeds.values())).seconds)
    lines = [f"Medians of {rounds} rounds of {EXAMPLES} examples, in turns",
             f"{'provider':<40} threads  examples/s   slowest   fastest  a CPU second"
             "  calcformer is (by CPU time)"]
    for (provider, count), speed in speeds.items():
        ratio = speeds[OURS, count].examples_per_second / speed.examples_per_second
        cpu_ratio = speeds[OURS, count].examples_per_cpu_second / speed.examples_per_cpu_second
        low, high = (speed.examples / pick(speed.seconds) for pick in (max, min))
        lines.append(f"{provider:<40} {count:>7}  {speed.examples_per_second:>10,.0f}  {low:>8,.0f}  {high:>8,.0f}"
                     f"  {speed.examples_per_cpu_second:>12,.0f}  {ratio:.2f} x as fast ({cpu_ratio:.2f})")
    for peer in PROVIDERS[1:]:
        ratio = best(speeds, OURS) / best(speeds, peer)
        lines.append(f"each at its best thread count: calcformer is {ratio:.2f} x as fast as {peer}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="to measure for (60); one turn is always taken")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU thread counts (1 and 2)")
    options = parser.parse_args(argv)
    device = pick_device()
    info = describe()
    print(f"{info['gpu'] or 'CPU'}, {info['cpu_count']} cores, torch {info['torch']}, commit {info['commit']}")
    print(table(measure(device, options.seconds, options.threads or thread_counts(device))))


if __name__ == "__main__":
    main()
