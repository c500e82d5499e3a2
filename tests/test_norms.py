"""RMS norm, and either norm behind a sum and dropout: two loops -> no loop -> PyTorch -> the Triton kernels.

As in `test_layer_norm.py` the bound on an error is PyTorch's own at the same dtypes. Dropout's mask is read off a sum
of ones and zeros, and given to PyTorch.
"""

import importlib.util
import itertools
import math
import sys
import types
import unittest

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.layer_norm.ops import _rows
from kernels.reference import rms_norm_no_loop, rms_norm_two_loop
from tests.tolerances import FORWARD, GRADIENT, assert_as_exact_as_torch

backward = pytest.importorskip("kernels.layer_norm.backward", reason="needs triton")
forward = pytest.importorskip("kernels.layer_norm.forward", reason="needs triton")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5
either_norm = pytest.mark.parametrize("centre", [True, False], ids=["layer_norm", "rms_norm"])
either_way = pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"], indirect=True)
either_backend = pytest.mark.parametrize("backend", ["triton", "torch"])
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo and forward mode about themselves
# With an eps of 0 numpy warns of the rows that pad a tile, in the interpreter.
numpy_warns = pytest.mark.filterwarnings("ignore:.*(divide by zero|invalid value):RuntimeWarning")


def tiles(patch, rows, columns, chunked=False):
    """Make both passes take so many rows and columns at once."""
    patch.setattr(forward, "forward_tile", lambda *_: forward.Tile(rows, columns, 4, chunked))
    patch.setattr(backward, "backward_tile", lambda *_: backward.Tile(rows, columns, 4, 1, chunked))
    patch.setattr(backward, "COLUMNS", (2, columns, 1))


@pytest.fixture
def chunked(request, monkeypatch):
    """Whether rows are walked in chunks of 16 columns, as those too long for the registers are; a shape to try."""
    if request.param:
        tiles(monkeypatch, 1, 16, chunked=True)
    return (5, 23) if request.param else (19, 37)


@pytest.fixture
def normal(device):
    """Standard normal numbers of a shape and dtype, the same in every run."""
    generator = torch.Generator().manual_seed(21)
    return lambda *shape, dtype=F32: torch.randn(shape, generator=generator).to(dtype).to(device)


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
    """The same by PyTorch's functions one after the other; `keep` is dropout's mask."""

    def call(input, residual, weight=None, bias=None):
        branch = input if keep is None else torch.where(keep.to(input.device), input / (1 - dropout_p), 0.0)
        total = branch if residual is None else residual + branch
        mixed = any(y is not None and y.dtype != total.dtype for y in (weight, bias))
        x, weight, bias = (y.float() if mixed and y is not None else y for y in (total, weight, bias))
        shape = x.shape[-1:] if weight is None else weight.shape
        if centre:
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


def assert_no_worse(function, peer, tensors, upstreams):
    """Outputs and gradients against float64, allowing a small multiple of PyTorch's own error."""
    on_cpu = [None if x is None else x.cpu() for x in tensors]
    exact_inputs = [None if x is None else x.double() for x in on_cpu]
    found = results(function, tensors, upstreams)
    peers = results(peer, on_cpu, [x.cpu() for x in upstreams])
    exact = results(peer, exact_inputs, [x.cpu().double() for x in upstreams])
    for factor, *kind in zip((FORWARD, GRADIENT), found, peers, exact):
        for place, triple in enumerate(zip(*kind, strict=True)):
            assert_as_exact_as_torch(*triple, factor, f"{'output' if factor == FORWARD else 'gradient'} {place}")


def kept(shape, dropout_p, device, seed=7, backend="triton", centre=True):
    """Which elements dropout keeps under a seed, and their scale."""
    torch.manual_seed(seed)
    options = {"dropout_p": dropout_p, "prenorm": True, "backend": backend}
    total = ours(centre, **options)(torch.ones(shape, device=device), torch.zeros(shape, device=device))[1]
    return total != 0, total


def sample(normal, centre, shape=(19, 37), dtypes=(F32, F32, F32)):
    """Input, residual, weight and bias (layer norm only) of three dtypes, upstream gradients of output and sum."""
    tensors = [normal(*shape, dtype=dtypes[0]) * 2 + 1, normal(*shape, dtype=dtypes[1]),
               normal(shape[-1], dtype=dtypes[2]), normal(shape[-1], dtype=dtypes[2]) if centre else None]
    both = normal(*shape, dtype=dtypes[0]), normal(*shape, dtype=torch.promote_types(*dtypes[:2]))
    return tensors, list(both)


# Values


def test_two_loops_no_loop_pytorch_kernel(normal):
    """The whole chain of trust on one example."""
    x, weight = normal(5, 11), normal(11)
    in_float64 = [t.cpu().double() for t in (x, weight)]
    two_loop, no_loop = (function(*in_float64, EPS) for function in (rms_norm_two_loop, rms_norm_no_loop))
    pytorch = torch.nn.functional.rms_norm(in_float64[0], (11,), in_float64[1], EPS)
    torch.testing.assert_close(two_loop, no_loop, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(no_loop, pytorch, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ours(False)(x, None, weight)[0].cpu().double(), pytorch, rtol=0, atol=1e-6)


@numpy_warns
def test_hand_numbers(device):
    """1 + 2 and 1 + 3, and 1 + 0 and 0 + 3: root mean square sqrt(12.5), mean 2, deviation 1."""
    ones, residual = torch.ones(1, 2, device=device), torch.tensor([[2.0, 3.0]], device=device)
    output, total = ours(False, eps=0.0, prenorm=True)(ones, residual)
    assert total.tolist() == [[3.0, 4.0]]
    assert output.tolist()[0] == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])
    x, residual = (torch.tensor([row], device=device) for row in ([1.0, 0.0], [0.0, 3.0]))
    assert ours(True, eps=0.0)(x, residual)[0].tolist()[0] == pytest.approx([-1.0, 1.0])


@pytest.mark.usefixtures("poisoned")
@either_way
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n_cols", [2, 3, 63, 64, 65, 257])
def test_rms_norm_of_every_width(normal, chunked, n_cols, dtype):
    n_rows = chunked[0] - 2
    tensors = normal(n_rows, n_cols, dtype=dtype) * 3 + 1, None, normal(n_cols, dtype=dtype), None
    assert_no_worse(ours(False), torchs(False), tensors, [normal(n_rows, n_cols, dtype=dtype)])


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


@pytest.mark.usefixtures("poisoned")
@either_norm
@either_way
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_sum_and_norm_for_every_dtype(normal, chunked, centre, dtypes):
    """Both outputs, and gradients through both."""
    tensors, upstreams = sample(normal, centre, chunked, dtypes)
    assert_no_worse(ours(centre, prenorm=True), torchs(centre, prenorm=True), tensors, upstreams)


@pytest.mark.usefixtures("poisoned")
@either_norm
@either_way
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)], ids=["neither", "weight", "bias"])
def test_without_weight_or_bias(normal, chunked, centre, given):
    tensors, upstreams = sample(normal, centre, (11, 23))
    tensors[2:] = [x if present else None for x, present in zip(tensors[2:], given)]
    assert_no_worse(ours(centre), torchs(centre), tensors, upstreams[:1])


@pytest.mark.usefixtures("poisoned")
@either_norm
@either_way
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradient_through_the_sum_alone(normal, device, chunked, centre, dropout_p):
    """The norm then adds nothing: the residual gets the gradient itself, the input that of dropout."""
    (x, residual, weight, _), (_, upstream) = sample(normal, centre, chunked)
    call = ours(centre, prenorm=True, dropout_p=dropout_p)
    _, (dinput, dresidual) = results(lambda *t: call(*t, weight)[1:], (x, residual), [upstream])
    scale = kept(x.shape, dropout_p, device)[1]
    assert torch.equal(dresidual, upstream)
    torch.testing.assert_close(dinput, upstream * scale, rtol=1e-6, atol=0)


@either_norm
def test_gradients_of_what_is_wanted(normal, centre):
    """Input alone, residual alone: the same numbers as both at once, and nothing for the other."""
    (x, residual, weight, _), (upstream, _) = sample(normal, centre, dtypes=(BF16, F32, F32))
    _, both = results(lambda *t: ours(centre)(*t, weight), (x, residual), [upstream])
    _, (dinput,) = results(lambda t: ours(centre)(t, residual, weight), (x,), [upstream])
    _, (dresidual,) = results(lambda t: ours(centre)(x, t, weight), (residual,), [upstream])
    assert torch.equal(dinput, both[0]) and torch.equal(dresidual, both[1])


def test_several_normalized_dimensions(normal):
    tensors = normal(2, 7, 3, 5), normal(2, 7, 3, 5), normal(3, 5), None
    assert_no_worse(ours(False), torchs(False), tensors, [normal(2, 7, 3, 5)])
    x, residual = tensors[:2]
    expected = torch.nn.functional.layer_norm((x + residual).cpu(), (3, 5))
    found = kernels.add_layer_norm(x, residual, normalized_shape=(3, 5), backend="triton")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=str)
def test_default_eps_of_rms_norm_is_pytorchs(normal, dtype):
    x = (normal(3, 7) * 1e-4).to(dtype).cpu()
    expected = torch.nn.functional.rms_norm(x.double(), (7,), eps=torch.finfo(torch.promote_types(dtype, F32)).eps)
    torch.testing.assert_close(kernels.rms_norm(x, 7).double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=0)
    torch.testing.assert_close(kernels.rms_norm(x, 7), torch.nn.functional.rms_norm(x, (7,)))


@pytest.mark.usefixtures("poisoned")
@either_norm
@either_way
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_saved_output(normal, device, chunked, centre, has_residual):
    """The same gradients, also under dropout; a weight of 0 gets gradient 0, and disturbs no other column."""
    tensors, upstreams = sample(normal, centre, chunked)
    tensors[2] = tensors[2].sign() + 0.3 * tensors[2]
    options, peer = {}, torchs(centre)
    if has_residual:
        options = {"prenorm": True, "dropout_p": 0.5}
        peer = torchs(centre, keep=kept(chunked, 0.5, device)[0], **options)
    else:
        tensors[1], upstreams = None, upstreams[:1]
    assert_no_worse(ours(centre, save_output=True, **options), peer, tensors, upstreams)

    tensors[2][[0, -1]] = 0.0
    _, gradients = results(ours(centre, save_output=True, **options), tensors, upstreams)
    _, expected = results(ours(centre, **options), tensors, upstreams)
    place = 2 if has_residual else 1
    assert gradients[place][[0, -1]].tolist() == [0.0, 0.0]
    gradients[place], expected[place] = gradients[place][1:-1], expected[place][1:-1]
    for found, wanted in zip(gradients[: place + 1], expected):
        inner = slice(None) if found.ndim == 1 else slice(1, -1)
        torch.testing.assert_close(found[..., inner], wanted[..., inner], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save_output", [False, True], ids=["from_sum", "from_output"])
def test_what_is_kept_for_the_backward(normal, save_output):
    (x, residual, weight, _), _ = sample(normal, False)
    leaves, saved = [y.requires_grad_() for y in (x, residual, weight)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (saved.append(y), y)[1], lambda y: y):
        output, total = ours(False, prenorm=True, save_output=save_output)(*leaves)
    large = [y.data_ptr() for y in saved if y.numel() == x.numel()]
    assert set(large) <= {output.data_ptr() if save_output else total.data_ptr(), x.data_ptr(), residual.data_ptr()}
    assert (output if save_output else total).data_ptr() in large


@either_norm
@either_way
def test_sum_far_from_zero(normal, chunked, centre):
    """Mean 10,000 and deviation 0.01, in the residual or in both: the variance keeps its digits."""
    noise = 1e-2 * normal(7, 67)
    for x, residual in ((1e4 + noise, None), (noise, torch.full_like(noise, 1e4)), (noise - 1e4, noise + 2e4)):
        total = x if residual is None else residual + x
        expected = torchs(centre)(total.cpu().double(), None)[0]
        assert (ours(centre)(x, residual)[0].cpu() - expected).abs().max() < 1e-5
    weight = normal(67)
    assert_no_worse(ours(centre), torchs(centre), (x, residual, weight, None), [normal(7, 67)])


@either_norm
def test_constant_rows(normal, device, centre):
    """Layer norm makes them the bias; RMS norm makes them plus or minus the weight."""
    x = torch.tensor([[3.0], [-0.1], [2.0**40]], device=device).expand(3, 19)
    weight, bias = normal(19), normal(19) if centre else None
    output = ours(centre)(x, x, weight, bias)[0]
    expected = bias.expand(3, 19) if centre else x.sign() * weight
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@numpy_warns
@either_norm
@either_way
def test_eps_of_zero(normal, device, chunked, centre):
    """Nothing special where rows vary; 0 / 0 where they do not, as in PyTorch."""
    tensors, upstreams = sample(normal, centre, (16, 64))
    assert_no_worse(ours(centre, eps=0.0), torchs(centre, eps=0.0), tensors, upstreams[:1])
    assert ours(centre, eps=0.0)(torch.zeros(2, 19, device=device), None)[0].isnan().all()
    assert torchs(centre, eps=0.0)(torch.zeros(2, 19), None)[0].isnan().all()


@either_norm
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (2, 0, 5)], ids=str)
def test_empty(device, centre, shape):
    tensors = [torch.empty(shape, device=device)] * 2 + [torch.ones(shape[-1:], device=device), None]
    outputs, gradients = results(ours(centre, prenorm=True, dropout_p=0.5), tensors, tensors[:2])
    assert [x.shape for x in (*outputs, *gradients)] == [torch.Size(shape)] * 4 + [tensors[2].shape]
    assert not gradients[2].any()


# Dropout


@either_backend
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.75])
def test_share_and_scale_of_what_is_kept(device, backend, dropout_p):
    """Five deviations of a fair count; neighbours along rows and columns drop independently."""
    keep, total = kept((64, 129), dropout_p, device, backend=backend)
    variance, count = dropout_p * (1 - dropout_p), keep.numel()
    assert abs(keep.float().mean() - (1 - dropout_p)) < 5 * math.sqrt(variance / count)
    torch.testing.assert_close(total[keep], torch.full_like(total[keep], 1 / (1 - dropout_p)))
    centred = keep.float() - (1 - dropout_p)
    for apart in ((0, 1), (0, 2), (0, 4), (1, 0), (1, 1)):
        assert (centred * centred.roll(apart, (0, 1))).mean().abs() < 5 * variance / math.sqrt(count), apart


@either_backend
def test_seeds_rows_and_calls(device, backend):
    keep = kept((8, 129), 0.5, device, backend=backend)[0]
    assert torch.equal(keep, kept((8, 129), 0.5, device, backend=backend)[0])
    assert not torch.equal(keep, kept((8, 129), 0.5, device, seed=8, backend=backend)[0])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(keep, 2))
    x = torch.ones(8, 129, device=device)
    first, second = (ours(True, dropout_p=0.5, prenorm=True, backend=backend)(x, 0 * x)[1] for _ in range(2))
    assert not torch.equal(first, second)


@either_backend
@either_norm
def test_probabilities_zero_and_one(normal, backend, centre):
    """At 0 the generator is left alone; at 1 the residual is normalised, and the input gets no gradient."""
    tensors, upstreams = sample(normal, centre)
    state = torch.get_rng_state()
    output = ours(centre, backend=backend, dropout_p=0.0)(*tensors)[0]
    assert torch.equal(output, ours(centre, backend=backend)(*tensors)[0])
    assert torch.equal(state, torch.get_rng_state())
    call = ours(centre, backend=backend, dropout_p=1.0, prenorm=True)
    (output, total), gradients = results(call, tensors, upstreams)
    assert torch.equal(total, tensors[1]) and not gradients[0].any() and gradients[1].any()
    assert torch.equal(output, ours(centre, backend=backend)(0 * tensors[0], *tensors[1:])[0])


def test_mask_is_the_same_for_every_tile_and_in_the_backward(normal, device, monkeypatch):
    """The sum shows the mask of the forward, the input's gradient through the sum alone that of the backward."""
    x, upstream = torch.ones(5, 37, device=device), normal(5, 37)
    call = ours(True, dropout_p=0.5, prenorm=True)
    expected = kept((5, 37), 0.5, device)[0] * 2.0
    for rows, columns, chunks in (
        (None, None, False), (1, 64, False), (2, 64, False), (4, 64, False), (8, 128, False),
        (1, 4, True), (1, 16, True), (1, 64, True),
    ):
        with monkeypatch.context() as patch:
            if rows:
                tiles(patch, rows, columns, chunks)
            (_, total), (dinput, _) = results(lambda *t: call(*t), (x, 0 * x), [0 * upstream, upstream])
        assert torch.equal(total, expected) and torch.equal(dinput, upstream * expected), (rows, columns, chunks)


@pytest.mark.usefixtures("poisoned")
@either_norm
@either_way
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (F16, F16, F16)], ids=str)
def test_dropout_values_and_gradients(normal, device, chunked, centre, dtypes):
    tensors, upstreams = sample(normal, centre, chunked, dtypes)
    keep = kept(chunked, 0.3, device)[0]
    peer = torchs(centre, prenorm=True, keep=keep, dropout_p=0.3)
    assert_no_worse(ours(centre, dropout_p=0.3, prenorm=True), peer, tensors, upstreams)


@either_way
def test_dropped_first_element_is_no_pivot(normal, chunked):
    """A row walked in chunks counts from the first number of the sum, in which a large input was dropped."""
    x, residual = normal(3, 40), normal(3, 40)
    x[:, 0] = 1e7
    expected = torchs(True)(residual.cpu().double(), None)[0]
    assert (ours(True, dropout_p=1.0)(x, residual)[0].cpu() - expected).abs().max() < 1e-5


# Memory


LAYOUTS = {
    "columns_of_wider_rows": lambda normal: normal(2, 5, 64)[..., 3:40],
    "transposed_leading": lambda normal: normal(5, 2, 37).transpose(0, 1),
    "transposed_columns": lambda normal: normal(2, 37, 5).transpose(1, 2),
    "every_second_column": lambda normal: normal(2, 5, 74)[..., ::2],
    "expanded_rows": lambda normal: normal(1, 1, 37).expand(2, 5, 37),
}


@either_norm
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(normal, centre, layout):
    """Of input, residual, weight and both upstream gradients, which are read and not written."""
    make = LAYOUTS[layout]
    upstreams = [make(normal), make(normal)]
    before = [x.clone() for x in upstreams]
    tensors = make(normal), make(normal), normal(37, 2)[:, 0], normal(1).expand(37) if centre else None
    assert_no_worse(ours(centre, prenorm=True), torchs(centre, prenorm=True), tensors, upstreams)
    assert all(torch.equal(a, b) for a, b in zip(upstreams, before))
    assert all(x.is_contiguous() for x in ours(centre, prenorm=True)(*tensors))


def test_contiguous_rows_are_not_copied(normal, monkeypatch):
    """The launchers read input, residual and both gradients where they lie."""
    tensors = [LAYOUTS["columns_of_wider_rows"](normal) for _ in range(4)]
    read = []
    for module, name, count in ((forward, "launch_forward", 2), (backward, "launch_backward", 2)):
        launch = getattr(module, name)

        def spy(*arguments, launch=launch, count=count):
            read.extend(x.data_ptr() for x in arguments[:count])
            launch(*arguments)

        monkeypatch.setattr(module, name, spy)
    results(ours(False, prenorm=True), tensors[:2], tensors[2:])
    assert read == [x.data_ptr() for x in tensors]


@either_norm
@either_way
def test_a_row_does_not_depend_on_its_batch_and_runs_repeat(normal, chunked, centre):
    (x, residual, *parameters), upstreams = sample(normal, centre, (13, 37))
    call = ours(centre, prenorm=True)
    together, gradients = results(call, (x, residual, *parameters), upstreams)
    again = results(call, (x, residual, *parameters), upstreams)
    assert all(torch.equal(a, b) for a, b in zip([*together, *gradients], itertools.chain(*again), strict=True))
    for rows in (slice(5, 6), slice(5, 11)):
        part, part_gradients = results(
            call, (x[rows], residual[rows].clone(), *parameters), [u[rows] for u in upstreams])
        assert all(torch.equal(a[rows], b) for a, b in zip([*together, *gradients[:2]], [*part, *part_gradients[:2]]))


@either_norm
@either_way
@pytest.mark.parametrize("from_output", [False, True], ids=["from_sum", "from_output"])
def test_nothing_is_written_beside_the_results(normal, device, chunked, centre, from_output):
    """Every result lies in the middle of a larger buffer whose ends must stay as they were."""
    buffers = []

    def guarded(*shape):
        buffers.append(torch.full((math.prod(shape) + 128,), -7.0, device=device))
        return buffers[-1][64:-64].view(shape)

    (x, residual, weight, bias), (upstream, grad_sum) = sample(normal, centre, (9, 37))
    seed, guarded_mean = torch.tensor([3], device=device), guarded(9)
    output, total, mean, rstd = guarded(9, 37), guarded(9, 37), guarded_mean if centre else None, guarded(9)
    rows = [_rows(y, 37) for y in (x, residual, upstream, grad_sum, output if from_output else total)]
    forward.launch_forward(*rows[:2], seed, weight, bias, output, total, mean, rstd, EPS, 0.4, F32)
    gradients = guarded(9, 37), guarded(9, 37), guarded(37), guarded(37) if centre else None
    backward.launch_backward(
        *rows[2:], seed, weight, bias, mean, rstd, *gradients, 0.4, centre, from_output,
    )
    for buffer in buffers:
        assert (buffer[:64] == -7.0).all() and (buffer[-64:] == -7.0).all()
    assert all((x != -7.0).all() for x in (output, total, rstd, *gradients) if x is not None)


# Samples of others, and any shape


@pytest.fixture(scope="module")
def op_db():
    """PyTorch's list of operations with sample inputs; its helpers import expecttest for what is not used here."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("expecttest") is None:
            patch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.name: op for op in op_db}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["nn.functional.layer_norm", "nn.functional.rms_norm"])
def test_samples_of_pytorch(op_db, device, name, dtype):
    function = kernels.layer_norm if "layer" in name else kernels.rms_norm
    count = 0
    for item in op_db[name].sample_inputs(device, dtype, requires_grad=True):
        if item.kwargs.get("eps", 0.0) is not None and item.kwargs.get("eps", 0.0) < 0:
            with pytest.raises(ValueError, match="eps must be"):
                function(item.input, *item.args, **item.kwargs, backend="triton")
            item.kwargs["eps"] = 0.5
        leaves = [x for x in (item.input, *item.args) if isinstance(x, torch.Tensor)]
        found = function(item.input, *item.args, **item.kwargs, backend="triton")
        expected = op_db[name].op(item.input, *item.args, **item.kwargs)
        upstream = torch.randn_like(expected)
        bound = {"rtol": 1e-4, "atol": 1e-4} if dtype == F32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found, expected, **bound)
        gradients = (torch.autograd.grad(output, leaves, upstream) for output in (found, expected))
        torch.testing.assert_close(*gradients, **bound)
        count += 1
    assert count >= 5


def test_native_samples_of_pytorch(op_db, device):
    """Output, mean and rstd of the operation itself."""
    for item in op_db["native_layer_norm"].sample_inputs(device, F32):
        shape, weight, bias, eps = item.args
        found = torch.ops.kernels.norm_forward(item.input, None, None, weight, bias, shape, abs(eps), 0.0, True, False)
        expected = torch.native_layer_norm(item.input, shape, weight, bias, abs(eps))
        for ours_, theirs in zip((found[0], found[2], found[3]), expected):
            torch.testing.assert_close(ours_.flatten(), theirs.flatten(), rtol=1e-4, atol=1e-4)


@settings(
    max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    leading=st.lists(st.integers(1, 5), max_size=2), n_cols=st.integers(2, 70), centre=st.booleans(),
    dtypes=st.sampled_from(list(MIXED.values())), has_weight=st.booleans(), dropout_p=st.sampled_from([0.0, 0.6]),
)
def test_any_shape(normal, device, leading, n_cols, centre, dtypes, has_weight, dropout_p):
    shape = (*leading, n_cols)
    tensors, upstreams = sample(normal, centre, shape, dtypes)
    tensors[2:] = tensors[2:] if has_weight else [None, None]
    keep = kept(shape, dropout_p, device)[0]
    peer = torchs(centre, prenorm=True, keep=keep, dropout_p=dropout_p)
    assert_no_worse(ours(centre, prenorm=True, dropout_p=dropout_p), peer, tensors, upstreams)


# Named after what went wrong elsewhere


@numpy_warns
def test_error_of_007_from_a_wrong_variance(device):
    """The smallest error of a wrong block among an exercise's checks; dividing by N - 1 makes one like it at N = 8."""
    x = torch.arange(8.0, device=device).expand(2, 8)
    expected = (x - 3.5) / math.sqrt(5.25)
    assert (ours(True, eps=0.0)(0 * x, x)[0] - expected).abs().max() < 1e-6
    wrong = (x - 3.5) / math.sqrt(6.0)
    assert (wrong / expected - 1).abs().max() > 0.06


@either_norm
def test_more_rows_than_a_grid_axis_holds_without_weight(normal, centre):
    (x, residual, *_), upstreams = sample(normal, centre, (65_539, 2))
    assert_no_worse(ours(centre, prenorm=True), torchs(centre, prenorm=True), (x, residual), upstreams)


@pytest.mark.usefixtures("poisoned")
@either_norm
@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 15, 17, 23])
def test_partial_sums_where_programs_do_not_divide_the_rows(normal, monkeypatch, centre, n_rows):
    """One row a tile, eight programs in the interpreter: one partial sum too few would show."""
    tiles(monkeypatch, 1, 64)
    tensors, upstreams = sample(normal, centre, (n_rows, 41))
    assert_no_worse(ours(centre), torchs(centre), tensors, upstreams[:1])


@pytest.mark.gpu
@either_norm
def test_more_than_two_to_the_31_elements(centre):
    """The last rows, whose offsets need 64 bits, are bit for bit those by themselves; so are their gradients."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    shape = (2**31 // 4099 + 5, 4099)
    x, residual, up, up_sum = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(4))
    assert x.numel() > 2**31
    outputs, gradients = results(ours(centre, prenorm=True), (x, residual), [up, up_sum])
    last, last_gradients = results(
        ours(centre, prenorm=True), (x[-5:].clone(), residual[-5:].clone()), [up[-5:].clone(), up_sum[-5:].clone()])
    assert all(torch.equal(a[-5:], b) for a, b in zip([*outputs, *gradients], [*last, *last_gradients]))
    keep = kept(shape, 0.5, "cuda")[0]
    assert abs(keep[-5:].float().mean() - 0.5) < 0.02 and not torch.equal(keep[-1], keep[-2])


# Transformations, compilation, autocast, checkpoints


def assert_same(transform, centre, *tensors, **options):
    """`transform` of our function equals that of PyTorch's; the functions add something nonlinear of each output."""
    found, expected = (
        transform(lambda *t, f=f: sum(y.sin() * (i + 1) for i, y in enumerate(f(*t))))(*tensors)
        for f in (ours(centre, prenorm=True, **options), torchs(centre, prenorm=True))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def small(normal, centre):
    """An input and a residual (2, 5, 7), a weight, and for layer norm a bias."""
    return [normal(2, 5, 7), normal(2, 5, 7), normal(7), *([normal(7)] if centre else [])]


@torch_warns
@either_norm
def test_forward_mode(normal, centre):
    tangents = small(normal, centre)
    assert_same(lambda f: lambda *t: jvp(f, t, tuple(tangents)), centre, *small(normal, centre))
    assert_same(lambda f: lambda x, *t: jvp(lambda y: f(y, *t), (x,), (tangents[0],)), centre, *small(normal, centre))


@either_norm
def test_reverse_mode_by_jacobian(normal, centre):
    for place in range(3):
        assert_same(lambda f: jacrev(f, argnums=place), centre, *small(normal, centre))


@either_norm
def test_double_backward(normal, centre):
    """A gradient penalty, through output and sum."""
    upstream = normal(2, 5, 7)

    def penalty(function):
        def of(*tensors):
            leaves = [x.detach().requires_grad_() for x in tensors]
            gradients = torch.autograd.grad(function(*leaves), leaves, upstream, create_graph=True)
            return torch.autograd.grad(sum(g.pow(3).sum() for g in gradients), leaves)

        return of

    assert_same(penalty, centre, *small(normal, centre))


@either_norm
def test_double_backward_through_dropout(normal, device, centre):
    """A gradient penalty under a fixed mask, to the input that is dropped from and to the residual."""
    x, residual, weight, *_ = small(normal, centre)
    keep = kept(x.shape, 0.4, device, centre=centre)[0]

    def penalty(function):
        torch.manual_seed(7)
        leaves = [y.detach().requires_grad_() for y in (x, residual, weight)]
        gradients = torch.autograd.grad(function(*leaves)[0], leaves, x, create_graph=True)
        return torch.autograd.grad(sum(y.pow(3).sum() for y in gradients), leaves)

    found = penalty(ours(centre, dropout_p=0.4))
    torch.testing.assert_close(found, penalty(torchs(centre, keep=keep, dropout_p=0.4)), rtol=1e-4, atol=1e-4)


@torch_warns
@either_norm
def test_higher_derivatives_are_refused(normal, centre):
    """Never a wrong number."""
    x, residual, *_ = small(normal, centre)
    leaf = x.detach().requires_grad_()
    with pytest.raises(NotImplementedError, match="double backward with save_output"):
        torch.autograd.grad(ours(centre, save_output=True)(leaf, residual)[0], leaf, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="forward mode through dropout"):
        jvp(lambda y: ours(centre, dropout_p=0.5)(y, residual)[0], (x,), (x,))


@either_norm
@pytest.mark.parametrize("in_dims", [(0, 0, None), (2, None, None), (None, 1, None), (1, 0, 1)], ids=str)
def test_vmap(normal, centre, in_dims):
    tensors = [
        x if dim is None else torch.stack([x, 2 * x + 1, -x], dim=dim)
        for x, dim in zip(small(normal, centre)[:3], in_dims)
    ]
    assert_same(lambda f: vmap(f, in_dims), centre, *tensors)
    assert_same(lambda f: vmap(grad(lambda *t: f(*t).pow(2).sum(), argnums=(0, 1, 2)), in_dims), centre, *tensors)
    assert_same(lambda f: vmap(f, in_dims), centre, *tensors, save_output=True)


@either_backend
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_vmap_over_dropout_draws_anew(device, backend, dropout_p):
    x = torch.ones(3, 16, 65, device=device, requires_grad=True)

    def call(y):
        return ours(False, dropout_p=dropout_p, prenorm=True, backend=backend)(y, torch.zeros_like(y))[1]

    total = vmap(call, randomness="different")(x)
    assert all(abs((t != 0).float().mean() - (1 - dropout_p)) < 0.08 for t in total)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(total, 2))
    assert torch.equal(torch.autograd.grad(total, x, torch.ones_like(x))[0], total)
    if backend == "triton":
        with pytest.raises(NotImplementedError, match='randomness="different"'):
            vmap(call, randomness="same")(x)


def test_vmap_keeps_the_shape_of_an_empty_sum(device):
    x = torch.empty(3, 0, 7, device=device)
    output, total = vmap(lambda y: ours(True, prenorm=True)(y, y))(x)
    assert output.shape == total.shape == x.shape


@torch_warns
@pytest.mark.parametrize("prenorm", [False, True], ids=["output", "output_and_sum"])
@pytest.mark.parametrize("save_output", [False, True], ids=["from_sum", "from_output"])
@either_norm
def test_compiles_without_a_graph_break(normal, centre, save_output, prenorm):
    """Dropout too: under compilation the sum shows the mask, which the gradient must share."""
    torch._dynamo.reset()
    tensors, upstreams = small(normal, centre), [normal(2, 5, 7), normal(2, 5, 7)]
    eager = ours(centre, prenorm=prenorm, save_output=save_output)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    found, expected = (results(f, tensors, upstreams[:1 + prenorm]) for f in (compiled, eager))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if prenorm:
        dropped = torch.compile(
            ours(centre, prenorm=True, save_output=save_output, dropout_p=0.5), fullgraph=True, backend="aot_eager")
        ones = torch.ones_like(tensors[0])
        (_, total), (dinput, _) = results(dropped, (ones, 0 * ones), [0 * ones, ones])
        assert torch.equal(dinput, total) and 0 < (total != 0).float().mean() < 1


@torch_warns
def test_compiled_rms_norm(normal):
    torch._dynamo.reset()
    tensors = normal(5, 7), None, normal(7)
    found, expected = (results(f, tensors, [tensors[0]]) for f in (
        torch.compile(ours(False), fullgraph=True, backend="aot_eager"), ours(False)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@either_backend
@either_norm
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_autocast_on_a_cpu(backend, centre, dtypes):
    """Output and gradients keep the dtypes that they have without autocast, whatever the mixture."""
    generator = torch.Generator().manual_seed(5)
    tensors, upstreams = sample(
        lambda *shape, dtype: torch.randn(shape, generator=generator).to(dtype), centre, dtypes=dtypes)
    with torch.autocast("cpu", BF16):
        found = results(ours(centre, prenorm=True, backend=backend), tensors, upstreams)
    expected = results(torchs(centre, prenorm=True), [x if x is None else x.float() for x in tensors],
                       [x.float() for x in upstreams])
    like = [tensors[0], upstreams[1], *(x for x in tensors if x is not None)]
    for x, y, z in zip(itertools.chain(*found), itertools.chain(*expected), like, strict=True):
        assert x.dtype == z.dtype
        assert (x.float() - y).norm() < 0.03 * y.norm()


@either_norm
def test_checkpoint_replays_dropout(normal, centre):
    tensors, upstreams = sample(normal, centre)
    call = ours(centre, dropout_p=0.5, prenorm=True)
    found, expected = (results(f, tensors, upstreams) for f in (
        lambda *t: checkpoint(call, *t, use_reentrant=False), call))
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*found), itertools.chain(*expected)))


# Backends and errors


@either_norm
def test_backends_and_float64(normal, centre):
    """Without dropout `backend="torch"` is PyTorch's functions; float64 goes there by itself."""
    tensors, upstreams = sample(normal, centre)
    peer = torchs(centre, prenorm=True)
    for dtype, backend in ((F32, "torch"), (torch.float64, "auto")):
        x = [None if y is None else y.to(dtype) for y in tensors]
        assert all(map(torch.equal, ours(centre, prenorm=True, backend=backend)(*x), peer(*x)))
    with pytest.raises(ValueError, match="float64"):
        ours(centre)(tensors[0], tensors[1].double())


ERRORS = {
    "residual_shape": (lambda x: (x, x[:1]), {}, ValueError, r"input's shape \(5, 7\), found \(1, 7\)"),
    "residual_device": (lambda x: (x, x.to("meta")), {}, ValueError, "residual must be on the input's device"),
    "residual_dtype": (lambda x: (x, x.int()), {}, TypeError, "residual must be of a dtype .*found torch.int32"),
    "input_dtype": (lambda x: (x.int(), x), {}, TypeError, "the norms take float16.*found torch.int32"),
    "weight_dtype": (lambda x: (x, x, x[0].half()), {}, TypeError, "weight must have the input's dtype"),
    "weight_device": (lambda x: (x, x, x[0].to("meta")), {}, ValueError, "weight must be on the input's device"),
    "weight_shape": (lambda x: (x, x, x[0, :5]), {}, ValueError, r"found \(5,\) for an input of shape \(5, 7\)"),
    "shape": (lambda x: (x, x), {"normalized_shape": (3, 7)}, ValueError, "trailing dimensions of the input"),
    "negative_p": (lambda x: (x, x), {"dropout_p": -0.1}, ValueError, "dropout_p must be a probability"),
    "large_p": (lambda x: (x, x), {"dropout_p": 1.5}, ValueError, "from 0 to 1, found 1.5"),
    "nan_p": (lambda x: (x, x), {"dropout_p": math.nan}, ValueError, "from 0 to 1, found nan"),
    "eps": (lambda x: (x, x), {"eps": -1.0}, ValueError, "eps must be"),
    "text_p": (lambda x: (x, x), {"dropout_p": "0.5"}, ValueError, "from 0 to 1, found '0.5'"),
    "float8": (lambda x: (x, x.to(torch.float8_e4m3fn)), {}, TypeError, "found torch.float8"),
    "backend": (lambda x: (x, x), {"backend": "cuda"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("function", [kernels.add_layer_norm, kernels.add_rms_norm])
@pytest.mark.parametrize("case", ERRORS)
def test_bad_calls_raise_in_one_line_before_any_launch(normal, monkeypatch, function, case, backend):
    monkeypatch.setattr(forward, "launch_forward", lambda *_: pytest.fail("launched"))
    arguments, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message) as raised:
        function(*arguments(normal(5, 7)), **{"backend": backend, **options})
    assert "\n" not in str(raised.value)


# The comparison itself


class WithoutReplay(torch.autograd.Function):
    """Dropout whose backward forgets the mask."""

    @staticmethod
    def forward(ctx, input, keep):
        return torch.where(keep, input * 2, 0.0)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


KEEP = torch.rand(11, 37, generator=torch.Generator().manual_seed(3)) < 0.5


def dropped(input):
    return torch.where(KEEP, input * 2, 0.0)


def normed(total, weight, bias, centre):
    output = torchs(centre)(total, None, weight, bias)[0]
    return output if centre or bias is None else output + bias


# Of a faulty function (input, residual, weight, bias, centre) what it makes of them, beside residual + dropped(input).
WRONG = {
    "dropped_residual": lambda x, r, *t: (normed(dropped(x) + 0 * r, *t), r + dropped(x)),
    "residual_after_norm": lambda x, r, *t: (r + normed(dropped(x), *t), r + dropped(x)),
    "dropout_without_scaling": lambda x, r, *t: (normed(r + KEEP * x, *t), r + KEEP * x),
    "dropout_of_the_sum": lambda x, r, *t: (normed(dropped(r + x), *t), dropped(r + x)),
    "mask_not_replayed": lambda x, r, *t: (normed(r + WithoutReplay.apply(x, KEEP), *t), r + dropped(x)),
    "no_gradient_to_the_residual": lambda x, r, *t: (normed(r.detach() + dropped(x), *t), r + dropped(x)),
    "no_gradient_from_the_sum": lambda x, r, *t: (normed(r + dropped(x), *t), (r + dropped(x)).detach() + 0 * r),
    "sum_before_dropout": lambda x, r, *t: (normed(r + dropped(x), *t), r + x),
    "the_other_norm": lambda x, r, w, b, c: (normed(r + dropped(x), w, b, not c), r + dropped(x)),
    "sum_in_bfloat16": lambda x, r, *t: (normed((r + dropped(x)).bfloat16().float(), *t), r + dropped(x)),
    "weight_from_one": lambda x, r, w, *t: (normed(r + dropped(x), 1 + w, *t), r + dropped(x)),
    "eps_outside_the_root": lambda x, r, *t: (normed(r + dropped(x), *t) / (1 + EPS), r + dropped(x)),
}


@either_norm
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_comparison_rejects(centre, wrong):
    generator = torch.Generator().manual_seed(5)
    tensors, upstreams = sample(lambda *shape, dtype: torch.randn(shape, generator=generator), centre, (11, 37))
    peer = torchs(centre, prenorm=True, keep=KEEP, dropout_p=0.5)
    right = lambda x, r, w, b: (normed(r + dropped(x), w, b, centre), r + dropped(x))  # noqa: E731
    assert_no_worse(right, peer, tensors, upstreams)
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse(lambda *t: wrong(*t, centre), peer, tensors, upstreams)
