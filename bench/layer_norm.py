"""Layer norm to compare: inputs, providers by name, and the exact result."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import layer_norm

import kernels
from bench.accounting import Direction, LayerNormCase
from bench.check import require_right
from kernels.backend import why_not_triton

COPY = "device copy"  # the ceiling: the same bytes, read and written without arithmetic
PROVIDERS = ["kernels", "torch eager", "torch.compile", "Liger", COPY]
EPS = 1e-5


class Inputs(NamedTuple):
    """input (M, N), weight and bias (N,); the output's gradient (M, N)."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad_output: torch.Tensor


LayerNorm = Callable[[Inputs], torch.Tensor]


def make_inputs(case: LayerNormCase, device: torch.device, requires_grad: bool = False) -> Inputs:
    """Random inputs whose mean is not 0."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) + 0.5).to(case.dtype)

    tensors = [draw(case.rows, case.columns), draw(case.columns), draw(case.columns)]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    return Inputs(tensors[0], tensors[1], tensors[2], draw(case.rows, case.columns))


def label(provider: str, case: LayerNormCase, device: torch.device) -> str:
    """The provider, and for ours what it runs on here: Triton's kernels or, on a CPU, PyTorch's own."""
    if provider != "kernels":
        return provider
    return f"kernels ({'torch path' if why_not_triton(device, case.dtype) else 'triton'})"


@functools.lru_cache(maxsize=1)  # the check and the timing share what is compiled
def build(provider: str, case: LayerNormCase, device: torch.device) -> LayerNorm:
    """The provider as a function of the inputs; ValueError or ImportError where the case is not for it."""
    shape = (case.columns,)
    if provider == "kernels":
        return lambda x: kernels.layer_norm(x.input, shape, x.weight, x.bias, EPS)
    if provider == "torch eager":
        return lambda x: layer_norm(x.input, shape, x.weight, x.bias, EPS)
    if provider == "torch.compile":
        if device.type != "cuda":
            raise ValueError("compiles for seconds a shape: asked for on a GPU only")
        torch.compiler.reset()
        compiled = torch.compile(layer_norm, dynamic=False)
        return lambda x: compiled(x.input, shape, x.weight, x.bias, EPS)
    if provider == "Liger":
        liger = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return lambda x: liger.apply(x.input, x.weight, x.bias, EPS)
    raise ValueError(f"there is no provider {provider!r}")


def exact(case: LayerNormCase, inputs: Inputs, backward: bool) -> list[torch.Tensor]:
    """The output in float64 by the formula, or the gradients of input, weight and bias."""
    x, weight, bias, grad_output = (tensor.detach().double() for tensor in inputs)
    centred = x - x.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    normal = centred * rstd
    if not backward:
        return [normal * weight + bias]
    grad = grad_output * weight
    mean, slope = grad.mean(1, keepdim=True), (grad * normal).mean(1, keepdim=True)
    return [rstd * (grad - mean - normal * slope), (grad_output * normal).sum(0), grad_output.sum(0)]


def check(provider: str, case: LayerNormCase, inputs: Inputs, backward: bool) -> None:
    """Raise WrongResult where the provider's output or gradients are wrong."""
    output = build(provider, case, inputs.input.device)(inputs)
    found = [output.detach()]
    if backward:
        found = list(torch.autograd.grad(output, inputs[:3], inputs.grad_output))
    require_right(provider, found, exact(case, inputs, backward), backward)


def copies(case: LayerNormCase, direction: Direction, device: torch.device, sets: int) -> list[Callable[[], object]]:
    """Copies that move as many bytes as the work does, each between buffers of its own."""
    count = case.work(direction).bytes // 2 // 4
    sources = [torch.randn(count, device=device) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    return [lambda x=x, y=y: y.copy_(x) for x, y in zip(sources, targets)]  # type: ignore[misc]
