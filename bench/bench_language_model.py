"""Tokens a second of a training step of a language model: calcformer's, and the same model written with torch.nn.

    python -m bench.bench_language_model [--seconds 20] [--threads 1]

A step is forward, cross-entropy, backward and AdamW, in float32, all eager. Providers take turns in rounds of a few
steps, begin with the same weights, and must give the same losses. "torch.nn" is the model as one writes it: a product
each for queries, keys and values, `F.scaled_dot_product_attention`, AdamW as it comes; "torch.nn, lean" has one product
for all three, and the fused AdamW. calcformer has what its trainer has: all parameters, and their gradient, in one
vector. On a GPU it steps by a CUDA graph as well. Freed memory is kept (`keep_memory`), for all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.benchmark import Benchmark, GpuStage
from bench.check import WrongResult
from bench.machine import describe, pick_device
from bench.record import Context, name_row
from bench.timing import play_samples
from calcformer.config import TrainingConfig
from calcformer.model.decoder_only import DecoderOnly
from calcformer.runs.device import keep_memory
from calcformer.training.cuda_graph import CudaRecorder
from calcformer.training.optimizer import build_optimizer

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark(first=[GpuStage("language model", need=7, seconds=24)])

OURS, PLAIN, LEAN, GRAPH = "calcformer", "torch.nn", "torch.nn, lean", "calcformer, CUDA graph"
RATE = 1e-3
SAME = 1e-4  # relative difference of losses that rounding may make in the first steps
TURNS = 5, 60  # fewest and most
ROUND = 0.05  # seconds that a round should last


class Size(NamedTuple):
    """A model, and the sequences of a batch."""

    vocabulary: int
    context: int
    batch: int
    width: int
    heads: int
    head_size: int
    layers: int
    hidden: int
    tied: bool

    def build(self) -> DecoderOnly:
        return DecoderOnly(
            self.vocabulary,
            self.context,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            hidden=self.hidden,
            tied=self.tied,
            head_size=self.head_size,
        )


SIZES = {
    "S2 V30522": Size(30_522, 16, 2, 64, 8, 64, 2, 256, False),  # with BERT's vocabulary
    "S2 V30522 tied": Size(30_522, 16, 2, 64, 8, 64, 2, 256, True),
    "S2 V11": Size(11, 16, 2, 64, 8, 64, 2, 256, False),  # with the words of a sentence
    "6 layers of 384": Size(65, 256, 4, 384, 6, 64, 6, 1536, True),  # characters
}


class PlainBlock(nn.Module):
    """A layer of GPT-2, by torch.nn. `joint`: queries, keys and values by one product."""

    def __init__(self, size: Size, joint: bool) -> None:
        super().__init__()
        inner = size.heads * size.head_size
        self.heads = size.heads
        self.first_norm, self.second_norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.query_key_value = nn.ModuleList(nn.Linear(size.width, 3 * inner // n) for n in ([1] if joint else [3] * 3))
        self.output = nn.Linear(inner, size.width)
        self.expand, self.contract = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, D); the same shape back."""
        y = self.first_norm(x)
        parts = [linear(y) for linear in self.query_key_value]
        parts = list(parts[0].chunk(3, dim=2)) if len(parts) == 1 else parts
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.second_norm(x))))


class PlainModel(nn.Module):
    """GPT-2 by torch.nn, with the weights of calcformer's model."""

    def __init__(self, size: Size, ours: DecoderOnly, joint: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.layers = nn.ModuleList(PlainBlock(size, joint) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        if size.tied:
            self.head.weight = self.embedding.weight
        order: list[torch.Tensor] = [*ours.embedding.parameters(), *ours.positions.parameters()]
        for layer in ours.layers:
            order += [*layer.attention_norm.parameters(), *layer.feed_forward_norm.parameters()]
            parts = [x.chunk(1 if joint else 3) for x in layer.attention.query_key_value.parameters()]
            order += [x for pair in zip(*parts) for x in pair]
            for linear in layer.attention.output, layer.feed_forward.expand, layer.feed_forward.contract:
                order += linear.parameters()
        order += ours.norm.parameters()
        order += [] if size.tied else [ours.prediction.weight]
        with torch.no_grad():
            for own, known in zip(self.parameters(), order, strict=True):
                own.copy_(known)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) int64; returns scores (B, T, V)."""
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


Step = Callable[[], torch.Tensor]  # trains a step, and returns its loss before it


def build_steps(size: Size, device: torch.device) -> dict[str, Step]:
    """The step of each provider, on the same batch and from the same weights."""
    keep_memory()
    torch.manual_seed(0)
    text = torch.randint(size.vocabulary, (size.batch, size.context + 1), device=device)
    ids, labels = text[:, :-1], text[:, 1:].flatten()
    first = size.build()
    steps: dict[str, Step] = {}

    def loss_of(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), labels)

    def ours(graph: bool) -> Step:
        model = deepcopy(first).to(device)
        optimizer, gradient = build_optimizer(model, TrainingConfig(learning_rate=RATE))
        loss = torch.zeros((), device=device)

        def step() -> torch.Tensor:
            found = loss_of(model)
            gradient.fill(found)
            optimizer.step()
            return found.detach()

        if not graph:
            return step
        recorder = CudaRecorder(device, optimizer)
        replay: list[Callable[[], None]] = []

        def work() -> None:
            loss.copy_(step())

        def by_graph() -> torch.Tensor:
            if not replay:
                recorder.run(work)
                replay.append(recorder.record(work))
            else:
                replay[0]()
            return loss

        return by_graph

    def theirs(lean: bool) -> Step:
        model = PlainModel(size, first, lean).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=lean or None)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    steps[OURS] = ours(graph=False)
    if device.type == "cuda":
        steps[GRAPH] = ours(graph=True)
    steps[PLAIN], steps[LEAN] = theirs(lean=False), theirs(lean=True)
    return steps


def check(steps: dict[str, Step]) -> None:
    """Raise WrongResult unless all providers have the same losses in the first three steps, which fall."""
    losses = {provider: [step().item() for _ in range(3)] for provider, step in steps.items()}
    for provider, found in losses.items():
        if not all(abs(a / b - 1) <= SAME for a, b in zip(found, losses[OURS])) or not found[0] > found[1] > found[2]:
            raise WrongResult(f"{provider}: losses {found} where calcformer has {losses[OURS]}")


class Speed(NamedTuple):
    """Seconds of a step, of each round: by the wall clock, and of this process's CPU time; tokens of a step."""

    seconds: list[float]
    cpu_seconds: list[float]
    tokens: int

    def times(self, other: Speed, cpu: bool = False) -> float:
        """How many times as fast as another, by medians."""
        mine, theirs = (statistics.median(x.cpu_seconds if cpu else x.seconds) for x in (self, other))
        return theirs / mine

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def turns(size: Size, device: torch.device, seconds: float) -> Iterator[dict[str, Speed]]:
    """Train in turns for about `seconds`; what is known so far, after each turn."""
    steps = build_steps(size, device)
    check(steps)
    started = time.perf_counter()
    steps[OURS]().item()
    count = max(1, int(ROUND / (time.perf_counter() - started)))  # steps of a round
    speeds = {provider: Speed([], [], size.batch * size.context) for provider in steps}
    end = time.perf_counter() + seconds
    for turn in range(TURNS[1]):
        if turn >= TURNS[0] and time.perf_counter() > end:
            return
        for provider in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(count):
                loss = steps[provider]()
            loss.item()  # so that nothing is left running
            speeds[provider].seconds.append((time.perf_counter() - started) / count)
            speeds[provider].cpu_seconds.append((time.process_time() - cpu_started) / count)
        yield speeds


def group_of(name: str, device: torch.device) -> str:
    size = SIZES[name]
    return (
        f"language model step {name} B{size.batch} T{size.context} fp32 on {'CPU' if device.type == 'cpu' else 'GPU'}"
    )


DEVICE = pick_device()


@cache
def measured(name: str, smoke: bool) -> dict[str, Speed]:
    return list(turns(SIZES[name], DEVICE, 0.0 if smoke else 10.0))[-1]


@pytest.mark.parametrize("provider", [OURS, PLAIN, LEAN, *([GRAPH] if DEVICE.type == "cuda" else [])])
@pytest.mark.parametrize("name", SIZES)
def test_step(benchmark: BenchmarkFixture, name: str, provider: str, device: torch.device) -> None:
    if benchmark.disabled and name != "S2 V11":
        pytest.skip("the smoke test trains the smallest model")
    name_row(benchmark, group_of(name, device), provider)
    speeds = measured(name, benchmark.disabled)
    benchmark.extra_info.update(
        tokens_per_second=speeds[provider].tokens_per_second,
        calcformer_times_this=speeds[OURS].times(speeds[provider]),
        method="wall clock, providers in turns",
    )
    play_samples(benchmark, speeds[provider].seconds)


def time_stage(stage: str, context: Context) -> None:
    """Steps of every size; the rows are written anew after each turn."""
    for name, size in SIZES.items():
        if context.rehearse and name != "S2 V11":
            continue
        group = group_of(name, context.device)
        for speeds in turns(size, context.device, 0.0 if context.rehearse else 4.0):
            for provider, speed in speeds.items():
                context.write(
                    "time",
                    case=f"{group}: {provider}",
                    group=group,
                    provider=provider,
                    seconds=statistics.median(speed.seconds),
                    samples=speed.seconds,
                    info={"tokens_per_second": speed.tokens_per_second},
                )
        told = (f"{provider} {speed.tokens_per_second:,.0f}/s" for provider, speed in speeds.items())
        print(f"{group}: {'; '.join(told)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each size (20)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    info = describe()
    print(f"{info['gpu'] or 'CPU'}, {info['cpu_count']} cores, torch {info['torch']}, commit {info['commit']}")
    for name, size in SIZES.items():
        speeds = list(turns(size, DEVICE, options.seconds))[-1]
        print(f"\n{group_of(name, DEVICE)}, medians of {len(speeds[OURS].seconds)} rounds in turns")
        print(f"{'provider':<24} tokens/s  ms a step  calcformer is  by CPU time")
        for provider, speed in speeds.items():
            ours = speeds[OURS]
            print(
                f"{provider:<24} {speed.tokens_per_second:>8,.0f}  {statistics.median(speed.seconds) * 1e3:>9.2f}  "
                f"{ours.times(speed):>11.2f} x  {ours.times(speed, cpu=True):>9.2f} x"
            )


if __name__ == "__main__":
    main()
