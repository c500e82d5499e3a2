"""Host time of one call on tiny inputs, where the way to the kernel is all there is: ours against PyTorch's function.

On a GPU the calls are queued, not waited for, as in a model; the queue is emptied between rounds. Without a GPU,

    python -m bench.bench_host [--triton]

prints what our Python takes on the way to each kernel, on CPU tensors that go as if they were on a chip, up to the
launch. Triton's own launcher is left out; `--triton` adds all of it but the driver's launch (and compiles first).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels
from bench.benchmark import Benchmark, GpuStage
from bench.machine import leave_after_fault
from bench.pretended import Chip, pretending
from bench.record import Context, brief, name_row
from bench.timing import play_samples

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark(first=[GpuStage("host time", need=7, seconds=12)])

PROVIDERS: dict[str, Callable[..., Any]] = {
    "kernels": kernels.scaled_dot_product_attention,
    "torch sdpa": scaled_dot_product_attention,
}
CASES = "plain", "causal", "mask", "training"
CALLS, ROUNDS = 200, 15  # few enough calls not to fill a GPU's queue
SHORT_CALLS, SHORT_ROUNDS = 20, 100  # without a GPU: so short that some rounds are not disturbed


def group(case: str) -> str:
    return f"host time of an attention call L4 S4 D8 {case}"


def make_call(case: str, provider: str, device: torch.device) -> Callable[[], None]:
    """One tiny call."""
    attend = PROVIDERS[provider]
    query, key, value = torch.randn(3, 1, 1, 4, 8, device=device).requires_grad_(case == "training").unbind()
    options: dict[str, Any] = {"is_causal": case == "causal"}
    if case == "mask":
        options["attn_mask"] = torch.ones(4, 4, dtype=torch.bool, device=device)
    upstream = torch.ones_like(query)

    def call() -> None:
        output = attend(query, key, value, **options)
        if case == "training":
            torch.autograd.grad(output, (query, key, value), upstream)

    return call


def measure(case: str, provider: str, device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """CPU seconds for one call, the mean of CALLS, by round: what other processes do does not count."""
    call = make_call(case, provider, device)
    return [seconds(call, device) for _ in range(rounds + 1)][1:]


def seconds(call: Callable[[], object], device: torch.device, calls: int = CALLS) -> float:
    """CPU seconds of this process for one call: on a GPU the backward runs in a thread of its own."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_host_time(benchmark: BenchmarkFixture, case: str, provider: str, device: torch.device) -> None:
    name_row(benchmark, group(case), provider)
    if benchmark.disabled:
        benchmark(make_call(case, provider, device))
    else:
        play_samples(benchmark, measure(case, provider, device))


def time_stage(stage: str, context: Context) -> None:
    """The rows of a GPU run."""
    rounds = 2 if context.rehearse else ROUNDS
    for case in CASES:
        for provider in PROVIDERS:
            name = f"{group(case)}: {provider}"
            try:
                samples = measure(case, provider, context.device, rounds)
            except Exception as error:  # noqa: BLE001
                context.write("failed", case=name, problem=brief(error))
                leave_after_fault(context.device)
                continue
            median = sorted(samples)[len(samples) // 2]
            context.write(
                "time", case=name, group=group(case), provider=provider, seconds=median, samples=samples, info={}
            )
            print(f"{group(case):<58} {provider:<24} {median * 1e6:12.1f} us", flush=True)


def launches(stage: str, context: Context) -> list[tuple[str, Callable[[str], None]]]:
    return [
        (case, lambda device, case=case: make_call(case, "kernels", torch.device(device))())  # type: ignore[misc]
        for case in CASES
    ]


class Way(NamedTuple):
    """A call that goes to a kernel as on a chip.

    Args:
        name: of the kernel.
        function: the public function.
        tensors: its differentiable tensors, by name.
        upstream: gradient of the output.
        hopper: what the environment variable KERNELS_HOPPER would say.
    """

    name: str
    function: Callable[..., torch.Tensor]
    tensors: dict[str, torch.Tensor]
    upstream: torch.Tensor
    options: dict[str, Any] = {}
    hopper: str = "0"

    def forward(self) -> torch.Tensor:
        return self.function(**self.tensors, **self.options, backend="triton")

    def forward_without_gradients(self) -> None:
        with torch.no_grad():
            self.forward()

    def calls(self) -> dict[str, Callable[[], object]]:
        return {
            "no gradient": self.forward_without_gradients,
            "forward": self.forward,
            "and backward": self.forward_and_backward,
        }

    def forward_and_backward(self) -> None:
        torch.autograd.grad(self.forward(), list(self.tensors.values()), self.upstream)


def attention_way(name: str, length: int, hopper: str = "0", **options: Any) -> Way:
    query, key, value = (torch.randn(1, 2, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    tensors = {"query": query, "key": key, "value": value}
    return Way(name, kernels.scaled_dot_product_attention, tensors, torch.ones_like(query), options, hopper)


def norm_way(name: str) -> Way:
    tensors = {"input": torch.randn(4, 4, 64, requires_grad=True)}
    if name.startswith("add"):
        tensors["residual"] = torch.randn(4, 4, 64, requires_grad=True)
    tensors["weight"] = torch.ones(64, requires_grad=True)
    if name.endswith("layer_norm"):
        tensors["bias"] = torch.zeros(64, requires_grad=True)
    return Way(name, getattr(kernels, name), tensors, torch.ones(4, 4, 64), {"normalized_shape": 64})


def ways() -> Iterator[Way]:
    """One to each kernel."""
    yield attention_way("short", 16)
    yield attention_way("short, causal", 16, is_causal=True)
    yield attention_way("general", 128)
    yield attention_way("general, causal", 128, is_causal=True)
    yield attention_way("Hopper", 128, hopper="1")
    for name in "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm":
        yield norm_way(name)


@contextlib.contextmanager
def as_on_a_chip(way: Way, run: Callable[..., Any]) -> Iterator[None]:
    """Within it a way leads to its kernel, and `run` stands in for JITFunction.run."""
    with mock.patch.dict(os.environ, KERNELS_HOPPER=way.hopper), pretending(Chip(), run):
        yield


def do_nothing(_kernel: Any, *_args: Any, **_options: Any) -> None:
    """A launch that is left out."""


def compile_first(way: Way) -> None:
    """Compile the kernels of a way, so that Triton finds them and the driver's launch is left out."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled.module, compiled._run = "loaded", lambda *_: None

    with as_on_a_chip(way, compile_only):
        for call in way.calls().values():
            call()


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    from triton.runtime.jit import JITFunction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="store_true", help="with Triton's launcher up to the driver's launch")
    parser.add_argument("--only", default="", metavar="WORD", help="only the ways with this word in their name")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = [way for way in ways() if options.only in way.name]
    if options.triton:
        for way in chosen:
            compile_first(way)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(SHORT_ROUNDS + 1):  # of all in turn: what slows the machine down for a while slows all
        for way in chosen:
            with as_on_a_chip(way, JITFunction.run if options.triton else do_nothing):
                for name, call in way.calls().items():
                    found.setdefault((way.name, name), []).append(seconds(call, torch.device("cpu"), SHORT_CALLS))
    print("microseconds: the least of all rounds, and their median")
    print(" " * 17 + "".join(f"{name:>16}" for name in chosen[0].calls()))
    for way in chosen:
        rounds = [found[way.name, name][1:] for name in way.calls()]
        cells = (f"{min(times) * 1e6:.0f} / {statistics.median(times) * 1e6:.0f}" for times in rounds)
        print(f"{way.name:<17}" + "".join(f"{cell:>16}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
