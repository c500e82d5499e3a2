"""The norms to be tested: calls of ours and of PyTorch's functions, random tensors for them, and what counts as right.

Dropout's mask is read off a sum of ones and zeros, and given to PyTorch.
"""

import functools

import pytest
import torch

import kernels
from kernels.layer_norm.tiles import Tile, forced
from tests.tolerances import FORWARD, GRADIENT, Comparison, size_of_terms

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5
either_norm = pytest.mark.parametrize("centre", [True, False], ids=["layer_norm", "rms_norm"])
either_way = pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"], indirect=True)
either_backend = pytest.mark.parametrize("backend", ["triton", "torch"])
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo and forward mode about themselves
# With an eps of 0 numpy warns of the rows that pad a tile, in the interpreter.
numpy_warns = pytest.mark.filterwarnings("ignore:.*(divide by zero|invalid value):RuntimeWarning")


MIXED = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "float16": (F16, F16, F16),
    "bfloat16 branch, float32 residual": (BF16, F32, F32),
    "bfloat16 branch and weight": (BF16, F32, BF16),
    "bfloat16, float32 weight": (BF16, BF16, F32),
    "float32 branch, bfloat16 residual": (F32, BF16, F32),
    "float16 branch, bfloat16 residual": (F16, BF16, F32),
}


def tiles(rows, columns, chunked=False):
    """Within it both passes take so many rows and columns at once."""
    tile = Tile(rows, columns, 4, chunked=chunked)
    return forced(forward=tile, backward=tile, columns=Tile(2, columns, 4))


def ours(centre, eps=EPS, **options):
    """The kernels as a function (input, residual or None, weight, bias) -> outputs."""
    options = {"backend": "triton", **options}

    def call(input, residual, weight=None, bias=None):
        shape = input.shape[-1:] if weight is None else weight.shape
        parameters = (weight, bias, eps) if centre else (weight, eps)
        if residual is None:
            output = (kernels.layer_norm if centre else kernels.rms_norm)(input, shape, *parameters, **options)
        else:
            function = kernels.add_layer_norm if centre else kernels.add_rms_norm
            output = function(input, residual, *parameters, **options)
        return output if isinstance(output, tuple) else (output,)

    return call


def torchs(centre, eps=EPS, prenorm=False, keep=None, dropout_p=0.0):
    """The same by PyTorch's functions one after the other; `keep` is dropout's mask.

    The call's `held`: gradients are those with mean and variance of a row held fixed.
    """

    def call(input, residual, weight=None, bias=None, held=False):
        branch = input if keep is None else torch.where(keep.to(input.device), input / (1 - dropout_p), 0.0)
        total = branch if residual is None else residual + branch
        mixed = any(y is not None and y.dtype != total.dtype for y in (weight, bias))
        x, weight, bias = (y.float() if mixed and y is not None else y for y in (total, weight, bias))
        shape = x.shape[-1:] if weight is None else weight.shape
        if held:
            axes, numbers = tuple(range(-len(shape), 0)), x.detach()
            mean = numbers.mean(axes, keepdim=True) if centre else 0.0
            deviation = ((numbers - mean).square().mean(axes, keepdim=True) + eps).sqrt()
            output = (x - mean) / deviation * (1 if weight is None else weight) + (0 if bias is None else bias)
        elif centre:
            output = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
        else:
            output = torch.nn.functional.rms_norm(x, shape, weight, eps)
        return (output.to(input.dtype), total) if prenorm else (output.to(input.dtype),)

    return call


def results(function, tensors, upstreams, seed=7):
    """Outputs of `function`, and gradients of those tensors that are given, under a seed of torch's generator."""
    torch.manual_seed(seed)
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    given = [x for x in leaves if x is not None]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, given, upstreams))


def compare(function, peer, tensors, upstreams, slack=1.0):
    """Outputs and gradients beside float64, and PyTorch on their device, of whose error a small multiple is allowed.

    On a GPU a reciprocal root is off by up to two units in the last place, PyTorch's own too.
    """
    exact_inputs = [None if x is None else x.cpu().double() for x in tensors]
    found = results(function, tensors, upstreams)
    peers = results(peer, tensors, upstreams)
    exact, held = (
        results(solve, exact_inputs, [x.cpu().double() for x in upstreams])
        for solve in (peer, functools.partial(peer, held=True))
    )
    for place, triple in enumerate(zip(found[0], peers[0], exact[0], strict=True)):
        yield Comparison(f"output {place}", *triple, FORWARD)
    for place, (*triple, fixed) in enumerate(zip(found[1], peers[1], exact[1], held[1], strict=True)):
        magnitude = size_of_terms(triple[2], fixed, triple[0].dtype)
        yield Comparison(f"gradient {place}", *triple, slack * GRADIENT, magnitude)


def assert_no_worse(function, peer, tensors, upstreams, slack=1.0):
    """Outputs, gradients against float64, within a small multiple of PyTorch's own error, gradients `slack` times."""
    for one in compare(function, peer, tensors, upstreams, slack):
        one.judge()


def kept(shape, dropout_p, device, seed=7, backend="triton", centre=True):
    """Which elements dropout keeps under a seed, and their scale."""
    torch.manual_seed(seed)
    options = {"dropout_p": dropout_p, "prenorm": True, "backend": backend}
    total = ours(centre, **options)(torch.ones(shape, device=device), torch.zeros(shape, device=device))[1]
    return total != 0, total


def sample(normal, centre, shape=(19, 37), dtypes=(F32, F32, F32)):
    """Input, residual, weight and bias (layer norm only) of three dtypes, upstream gradients of output and sum."""
    tensors = [
        normal(*shape, dtype=dtypes[0]) * 2 + 1,
        normal(*shape, dtype=dtypes[1]),
        normal(shape[-1], dtype=dtypes[2]),
        normal(shape[-1], dtype=dtypes[2]) if centre else None,
    ]
    both = normal(*shape, dtype=dtypes[0]), normal(*shape, dtype=torch.promote_types(*dtypes[:2]))
    return tensors, list(both)
