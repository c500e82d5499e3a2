"""Layer norm and RMS norm, alone and after dropout and a sum: ours against PyTorch's, eager and on a GPU compiled,
Liger's, QuACK's, and a copy of as many bytes."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch.nn import functional

import kernels
from bench.accounting import DIRECTIONS, SEED, Direction, NormCase, norm_cases
from bench.benchmark import Benchmark, GpuStage, Table
from bench.check import WrongResult, require_right
from bench.record import Context, Job, Prepared, attempt, compile_peer, compile_peers, time_all, time_row
from bench.timing import Call, input_sets
from kernels.backend import why_not_triton

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark(
    first=[GpuStage("norms", need=4, seconds=46)],  # 38 s are expected
    warms_up=True,
    tables=[
        *(
            Table(f"{title} {direction}, GB/s by row width", rf"{kind} {direction} M\d+ N(\d+) bf16", "gb_per_second")
            for title, kind in (
                ("Layer norm", "layer norm"),
                ("RMS norm", "rms norm"),
                ("Add + layer norm", r"add \+ layer norm"),
                ("Add + RMS norm", r"add \+ rms norm"),
            )
            for direction in ("forward", "backward")
        ),
        *(
            Table(
                f"Dropout 0.1, sum and layer norm {direction}, GB/s by row width",
                rf"add \+ layer norm {direction} M\d+ N(\d+) dropout 0\.1 bf16",
                "gb_per_second",
            )
            for direction in ("forward", "backward")
        ),
    ],
)

COPY = "device copy"  # the ceiling: the same bytes, read and written without arithmetic
COMPILED = "torch.compile"
PROVIDERS = ["kernels", "torch eager", COMPILED, "Liger", "QuACK", COPY]
COMPILED_COLUMNS = 256, 1_024, 4_096, 8_192
EPS = 1e-5
ON_GPU_RUN = [
    NormCase(2**26 // columns, columns, kind=kind, dropout=dropout)  # type: ignore[arg-type]
    for columns in (1_024, 4_096, 256, 8_192)
    for kind, dropout in (("layer norm", 0.0), ("add + layer norm", 0.1), ("rms norm", 0.0))
]


class Inputs(NamedTuple):
    """input and residual (M, N), weight and bias (N,), and the gradients of output and sum (M, N); None: not there."""

    input: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    grad_output: torch.Tensor
    grad_sum: torch.Tensor | None

    def differentiable(self) -> list[torch.Tensor]:
        return [x for x in self[:4] if x is not None]

    def upstream(self) -> list[torch.Tensor]:
        return [x for x in self[4:] if x is not None]


Results = tuple[torch.Tensor, ...]  # the output, and of the cases that add also the sum
Norm = Callable[[Inputs], Results]


def make_inputs(case: NormCase, device: torch.device, requires_grad: bool = False) -> Inputs:
    """Random inputs whose mean is not 0."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) + 0.5).to(case.dtype)

    shape = case.rows, case.columns
    residual, grad_sum = (draw(*shape), draw(*shape)) if case.adds else (None, None)
    bias = draw(case.columns) if case.centre else None
    input = draw(*shape)
    if case.dropout:  # none so small that the sum does not tell whether it was dropped
        input = torch.where(input.abs() < 0.25, 0.25, input)
    inputs = Inputs(input, residual, draw(case.columns), bias, draw(*shape), grad_sum)
    for tensor in inputs.differentiable():
        tensor.requires_grad_(requires_grad)
    return inputs


def label(provider: str, case: NormCase, device: torch.device) -> str:
    """The provider, and for ours what it runs on here: Triton's kernels or, on a CPU, PyTorch's own."""
    if provider != "kernels":
        return provider
    return f"kernels ({'torch path' if why_not_triton(device, case.dtype) else 'triton'})"


@functools.lru_cache(maxsize=1)  # the check and the timing share what is compiled
def build(provider: str, case: NormCase, device: torch.device) -> Norm:
    """The provider as a function of the inputs; ValueError or ImportError where the case is not for it."""
    if provider == "kernels":
        return functools.partial(_kernels, case)
    if provider == "torch eager":
        return functools.partial(_torch, case)
    if provider == COMPILED:
        if device.type != "cuda" or case.columns not in COMPILED_COLUMNS:
            raise ValueError(f"compiles for seconds a shape: asked for on a GPU only, widths {COMPILED_COLUMNS}")
        return compile_peer(functools.partial(_torch, case))
    if provider == "Liger":
        return _liger(case)
    if provider == "QuACK":
        return _quack(case)
    raise ValueError(f"there is no provider {provider!r}")


def _kernels(case: NormCase, x: Inputs) -> Results:
    if x.residual is None:
        if case.centre:
            return (kernels.layer_norm(x.input, (case.columns,), x.weight, x.bias, EPS),)
        return (kernels.rms_norm(x.input, (case.columns,), x.weight, EPS),)
    if case.centre:
        return kernels.add_layer_norm(x.input, x.residual, x.weight, x.bias, EPS, dropout_p=case.dropout, prenorm=True)
    return kernels.add_rms_norm(x.input, x.residual, x.weight, EPS, dropout_p=case.dropout, prenorm=True)


def _torch(case: NormCase, x: Inputs) -> Results:
    """One operation after the other."""
    shape, total = (case.columns,), x.input
    if x.residual is not None:
        total = x.residual + (functional.dropout(total, case.dropout) if case.dropout else total)
    if case.centre:
        output = functional.layer_norm(total, shape, x.weight, x.bias, EPS)
    else:
        output = functional.rms_norm(total, shape, x.weight, EPS)
    return (output, total) if case.adds else (output,)


def _liger(case: NormCase) -> Norm:
    """Liger Kernel (Hsu et al. 2024), told not to overwrite the gradient that it is given: it is needed again."""
    if case.kind == "layer norm":
        layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
        return lambda x: (layer_norm(x.input, x.weight, x.bias, EPS),)
    if case.kind == "rms norm":
        rms_norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply
        return lambda x: (rms_norm(x.input, x.weight, EPS, 0.0, "llama", False),)
    if case.kind == "add + rms norm" and not case.dropout:
        fused = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction.apply
        return lambda x: fused(x.input, x.residual, x.weight, EPS, 0.0, "llama", False)
    raise ValueError(f"has no {case.kind}{' with dropout' if case.dropout else ''}")


def _quack(case: NormCase) -> Norm:
    """QuACK (Dao-AILab/quack). Its layer norm is a forward pass, with float32 parameters."""
    if case.kind == "add + layer norm" or case.dropout:
        raise ValueError(f"has no {case.kind}{' with dropout' if case.dropout else ''}")
    module = importlib.import_module("quack.rmsnorm")
    if case.kind == "layer norm":
        return lambda x: (module.layernorm_fwd(x.input, x.weight, x.bias, EPS),)
    if case.kind == "rms norm":
        return lambda x: (module.rmsnorm(x.input, x.weight, eps=EPS),)
    return lambda x: module.rmsnorm(x.input, x.weight, residual=x.residual, eps=EPS, prenorm=True)


def exact(case: NormCase, inputs: Inputs, factors: torch.Tensor, backward: bool) -> list[torch.Tensor]:
    """In float64 by the formula: output and sum, or the gradients of input, residual, weight and bias.

    Args:
        factors: (M, N), of the input: 0 where dropout drops it, else 1 / (1 - dropout); ones without dropout.
    """
    doubles = (None if x is None else x.detach().double() for x in inputs)
    input, residual, weight, bias, grad_output, grad_sum = doubles
    assert input is not None and weight is not None and grad_output is not None
    total = input * factors if residual is None else input * factors + residual
    centred = total - total.mean(1, keepdim=True) if case.centre else total
    rstd = (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    normal = centred * rstd
    if not backward:
        output = normal * weight if bias is None else normal * weight + bias
        return [output, total] if case.adds else [output]
    grad = grad_output * weight
    gradient = grad - normal * (grad * normal).mean(1, keepdim=True)
    gradient = rstd * (gradient - grad.mean(1, keepdim=True) if case.centre else gradient)
    gradient = gradient if grad_sum is None else gradient + grad_sum
    gradients = [gradient * factors, gradient] if case.adds else [gradient]
    gradients.append((grad_output * normal).sum(0))
    return [*gradients, grad_output.sum(0)] if case.centre else gradients


def kept_factors(provider: str, case: NormCase, inputs: Inputs, results: Results) -> torch.Tensor:
    """Read from the sum which elements dropout kept, as factors for `exact`; WrongResult where too many or too few.

    The sum is near residual or near residual + input / (1 - dropout). Of inputs so small that rounding blurs the two,
    either answer is right.
    """
    input = inputs.input.detach().double()
    if not case.dropout:
        return torch.ones_like(input)
    assert inputs.residual is not None
    found = results[1].detach().double() - inputs.residual.detach().double()
    kept = (found - input / (1 - case.dropout)).abs() < found.abs()
    clear = input.abs() > 0.5
    count = int(clear.sum())
    share = 1.0 - float(kept[clear].double().mean())
    if not abs(share - case.dropout) <= 6 * math.sqrt(case.dropout * (1 - case.dropout) / count):  # deviations
        raise WrongResult(f"{provider}: dropout {case.dropout} drops {share:.4f} of {count} elements")
    return kept.double() / (1 - case.dropout)


def check(provider: str, case: NormCase, inputs: Inputs, backward: bool) -> None:
    """Raise WrongResult where the provider's output and sum, or its gradients, are wrong."""
    results = build(provider, case, inputs.input.device)(inputs)
    factors = kept_factors(provider, case, inputs, results)
    found = [x.detach() for x in results]
    if backward:
        found = list(torch.autograd.grad(results, inputs.differentiable(), inputs.upstream()))
    require_right(provider, found, exact(case, inputs, factors, backward), backward)


def copies(case: NormCase, direction: Direction, device: torch.device, sets: int) -> list[Call]:
    """Copies, with the sign turned, that move as many bytes as the work does, each between buffers of its own."""
    count = case.work(direction).bytes // 2 // 4
    sources = [torch.randn(count, device=device) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    return [lambda x=x, y=y: torch.neg(x, out=y) for x, y in zip(sources, targets)]  # type: ignore[misc]


def prepare(provider: str, case: NormCase, direction: Direction, device: torch.device) -> Job:
    """The calls of a provider whose result was found right, as `bench.attention.prepare` makes them."""
    backward, work = direction == "backward", case.work(direction)
    sets = input_sets(work.bytes, device)
    group, name = case.group(direction), label(provider, case, device)
    if provider == COPY:
        return Job(group, name, copies(case, direction, device, sets), work)
    torch.manual_seed(SEED)
    inputs = [make_inputs(case, device, requires_grad=backward) for _ in range(sets)]
    attempt(provider, lambda: check(provider, case, inputs[0], backward))
    function = build(provider, case, device)

    def call(x: Inputs) -> Call:
        if not backward:
            return lambda: function(x)
        results, differentiable, upstream = function(x), x.differentiable(), x.upstream()
        return lambda: torch.autograd.grad(results, differentiable, upstream, retain_graph=True)

    return Job(group, name, [call(x) for x in inputs], work)


ROWS = [
    pytest.param(case, provider, id=f"{case}-{provider}")
    for case in norm_cases(torch.cuda.is_available())
    for provider in PROVIDERS
]


@pytest.mark.parametrize("case, provider", ROWS)
def test_forward(benchmark: BenchmarkFixture, case: NormCase, provider: str, device: torch.device) -> None:
    """Without gradients, as in inference."""
    time_row(benchmark, lambda: prepare(provider, case, "forward", device), device)


@pytest.mark.parametrize("case, provider", ROWS)
def test_backward(benchmark: BenchmarkFixture, case: NormCase, provider: str, device: torch.device) -> None:
    """torch.autograd.grad alone, on a graph that was made before and is kept: gradients of all inputs."""
    time_row(benchmark, lambda: prepare(provider, case, "backward", device), device)


def jobs(context: Context, providers: Sequence[str]) -> Iterator[Prepared]:
    for case in context.some(ON_GPU_RUN):
        for direction in DIRECTIONS:
            for provider in providers:
                yield (
                    case.group(direction),
                    provider,
                    functools.partial(prepare, provider, case, direction, context.device),
                )


def time_stage(stage: str, context: Context) -> None:
    """What has to be compiled for seconds comes last."""
    quick = [provider for provider in PROVIDERS if provider != COMPILED]
    time_all(stage, context, [*jobs(context, quick), *jobs(context, [COMPILED])])


def warm_up(context: Context) -> None:
    compile_peers(context, jobs(context, [COMPILED]))


def launches(stage: str, context: Context) -> list[tuple[str, Callable[[str], None]]]:
    return [(case.group(), functools.partial(launch, case)) for case in context.some(ON_GPU_RUN)]


def launch(case: NormCase, device: str) -> None:
    x = make_inputs(case, torch.device(device), requires_grad=True)
    function = build("kernels", case, x.input.device)
    with torch.no_grad():
        function(x)
    torch.autograd.grad(function(x), x.differentiable(), x.upstream())
