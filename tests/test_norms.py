"""RMS norm, and either norm behind a sum and dropout: two loops -> no loop -> PyTorch -> the Triton kernels.

As in `test_layer_norm.py` the bound on an error is PyTorch's own at the same dtypes.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import sys
import types
import unittest

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import kernels
from kernels.layer_norm import api, eager, ops
from kernels.layer_norm.ops import _rows
from kernels.reference import rms_norm_no_loop, rms_norm_two_loop

backward = pytest.importorskip("kernels.layer_norm.backward", reason="needs triton")
forward = pytest.importorskip("kernels.layer_norm.forward", reason="needs triton")
from tests.norm_problem import (  # noqa: E402 (it imports Triton)
    BF16,
    EPS,
    F16,
    F32,
    MIXED,
    assert_no_worse,
    either_backend,
    either_norm,
    either_way,
    kept,
    numpy_warns,
    ours,
    results,
    sample,
    tiles,
    torch_warns,
    torchs,
)

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
@pytest.mark.parametrize(
    ("n_cols", "dtype", "chunked"),
    [  # every two of them together
        (n_cols, dtype, (i + j) % 2 == 1)
        for i, n_cols in enumerate([1, 2, 3, 5, 63, 64, 65, 257])
        for j, dtype in enumerate([F32, BF16, F16])
    ],
    indirect=["chunked"],
    ids=str,
)
def test_rms_norm_of_every_width(normal, chunked, n_cols, dtype):
    n_rows = chunked[0] - 2
    tensors = normal(n_rows, n_cols, dtype=dtype) * 3 + 1, None, normal(n_cols, dtype=dtype), None
    assert_no_worse(ours(False), torchs(False), tensors, [normal(n_rows, n_cols, dtype=dtype)])


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
    tensors, upstreams = sample(normal, centre, (29, 23))
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
    # Taking the bias off the output again costs a digit of what is left.
    assert_no_worse(ours(centre, save_output=True, **options), peer, tensors, upstreams, slack=3.0)

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


def exact_results(centre, tensors, upstream):
    """Output and gradients by the formula in float64, where nothing cancels."""
    leaves = [None if x is None else x.detach().cpu().double().requires_grad_() for x in tensors]
    x, residual, weight, bias = leaves
    total = x if residual is None else residual + x
    if tensors[0].dtype in (BF16, F16):
        total = total + (total.to(tensors[0].dtype).double() - total).detach()  # it is rounded before it is normalised
    if centre:
        total = total - total.detach()[..., :1]
        total = total - total.mean(-1, keepdim=True)
    output = total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight + (0.0 if bias is None else bias)
    given = [y for y in leaves if y is not None]
    return [output.detach(), *torch.autograd.grad(output, given, upstream.cpu().double())]


@either_backend
@either_norm
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bits_are_computed_in_float32(normal, backend, centre, has_residual, mean, dtype):
    """Every result has the error of rounding it once, and of float32's own."""
    (x, residual, *parameters), (upstream, _) = sample(normal, centre, (67, 61), (dtype,) * 3)
    x = x + mean
    tensors = [x, residual if has_residual else None, *parameters]
    outputs, gradients = results(ours(centre, backend=backend), tensors, [upstream])
    for found, exact in zip([*outputs, *gradients], exact_results(centre, tensors, upstream), strict=True):
        rounded = (exact.to(dtype).double() - exact).norm()
        assert (found.cpu().double() - exact).norm() < 1.05 * rounded + 1e-5 * exact.norm()


FAR_ROWS = [(3.0, 1.0), (30.0, 1.0), (-1e3, 1.0), (1e4, 0.01), (1e6, 1.0)]  # mean and deviation


def assert_rows_keep_their_digits(normal, centre, mean, deviation, dtype, bound, backend, shape=(61, 67)):
    (x, *_, bias), (upstream, _) = sample(normal, centre, shape)
    tensors = [(x - 1) / 2, None, normal(shape[1]), bias]
    tensors = [y if y is None else y.to(dtype) for y in tensors]
    tensors[0] = tensors[0] * deviation + mean
    outputs, gradients = results(ours(centre, backend=backend), tensors, [upstream.to(dtype)])
    for found, exact in zip([*outputs, *gradients], exact_results(centre, tensors, upstream), strict=True):
        assert (found.cpu().double() - exact).norm() < bound * exact.norm()


@either_norm
@pytest.mark.parametrize("device", ["cpu"])  # on a GPU PyTorch's kernel is taken as it is
@pytest.mark.parametrize("dtype, bound", [(F32, 8e-7), (torch.float64, 1.6e-15)], ids=str)
@pytest.mark.parametrize("mean, deviation", FAR_ROWS, ids=str)
def test_rows_far_from_zero_on_a_cpu(normal, mean, deviation, dtype, bound, centre):
    """Output and gradients as exact as at a mean of 0, but for what `FAR` lets go."""
    assert_rows_keep_their_digits(normal, centre, mean, deviation, dtype, bound, "torch")


@either_way
@pytest.mark.parametrize("mean, deviation", FAR_ROWS, ids=str)
def test_gradients_of_rows_far_from_zero(normal, chunked, mean, deviation):
    """One float32 number does not hold the mean to the digits that are left of its row."""
    assert_rows_keep_their_digits(normal, True, mean, deviation, F32, 8e-7, "triton", chunked)


@pytest.mark.parametrize("kind", ["finite", "nan", "inf"])
@pytest.mark.parametrize("dtype", [F32, torch.float64, BF16], ids=str)
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_rows_far_from_zero_change_no_bit_of_others(normal, has_residual, dtype, kind):
    tensors = [x if x is None else x.cpu().to(dtype) for x in sample(normal, True, (13, 37))[0]]
    if not has_residual:
        tensors[1] = None
    far = tensors[0].clone()
    far[[2, 7]] += 1e3
    far[2, 5] = {"finite": -1e3, "nan": math.nan, "inf": math.inf}[kind]
    others = [row for row in range(13) if row not in (2, 7)]
    upstream = sample(normal, True, (13, 37))[1][0].cpu().to(dtype)
    near, shifted = (results(ours(True, backend="torch"), [x, *tensors[1:]], [upstream]) for x in (tensors[0], far))
    count = 2 if has_residual else 1  # of gradients that have rows
    for one, other in zip([*near[0], *near[1][:count]], [*shifted[0], *shifted[1][:count]]):
        assert torch.equal(one[others], other[others])
    row = [x if x is None else x[7:8] for x in (far, tensors[1])]
    alone = results(ours(True, backend="torch"), [*row, *tensors[2:]], [upstream[7:8]])
    assert torch.equal(alone[0][0][0], shifted[0][0][7]) and torch.equal(alone[1][0][0], shifted[1][0][7])


@either_backend
@either_norm
def test_a_row_does_not_depend_on_its_batch_on_either_backend(normal, backend, centre):
    for n_cols in (1, 7, 64, 257):
        (x, residual, *parameters), _ = sample(normal, centre, (23, n_cols))
        together = ours(centre, backend=backend)(x, residual, *parameters)[0]
        for rows in (slice(4, 5), slice(3, 11)):
            assert torch.equal(together[rows], ours(centre, backend=backend)(x[rows], residual[rows], *parameters)[0])


@pytest.mark.usefixtures("as_on_a_cpu")
@pytest.mark.parametrize("sparse", ["input", "residual", "weight", "bias"])
def test_sparse_tensors_are_refused_in_one_line_on_a_cpu(sparse):
    tensors = {
        "input": torch.randn(4, 8),
        "residual": torch.randn(4, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    }
    kernels.add_layer_norm(**tensors)
    with pytest.raises(TypeError, match=f"{sparse} must be a dense tensor, found the layout torch.sparse_coo; convert"):
        kernels.add_layer_norm(**{**tensors, sparse: tensors[sparse].to_sparse()})


@pytest.mark.parametrize("shape", [(23, 7), (5, 3, 64), (9, 1)], ids=str)
def test_a_row_alone_runs_the_machine_code_of_its_batch(shape):
    """Triton specialises a kernel to what it knows of the strides, and another one may add up in another order."""
    x = torch.empty(shape)
    row = x[(slice(0, 1),) * (x.ndim - 1)]
    assert ops._row_layout(row.shape, row.stride(), shape[-1])[1] == ops._row_layout(x.shape, x.stride(), shape[-1])[1]


@either_backend
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("value", [1e6, -1e20, 3e38])
def test_one_column_gives_the_bias(device, backend, has_residual, value):
    x, weight, bias = (torch.full(shape, y, device=device) for shape, y in (((3, 1), value), ((1,), 2.0), ((1,), 3.0)))
    residual = torch.full_like(x, 0.5) if has_residual else None
    (output,), gradients = results(ours(True, backend=backend), (x, residual, weight, bias), [torch.ones_like(x)])
    assert torch.equal(output, torch.full_like(x, 3.0))
    assert not any(y.any() for y in gradients[:-1]) and gradients[-1].item() == 3.0


@either_norm
def test_constant_rows(normal, device, centre):
    """Layer norm makes them the bias; RMS norm makes them plus or minus the weight."""
    x = torch.tensor([[3.0], [-10.1], [2.0**40]], device=device).expand(3, 19)
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


def test_mask_is_the_same_for_every_tile_and_in_the_backward(normal, device):
    """The sum shows the mask of the forward, the input's gradient through the sum alone that of the backward."""
    x, upstream = torch.ones(5, 37, device=device), normal(5, 37)
    call = ours(True, dropout_p=0.5, prenorm=True)
    expected = kept((5, 37), 0.5, device)[0] * 2.0
    for rows, columns, chunks in (
        (None, None, False),
        (1, 64, False),
        (2, 64, False),
        (4, 64, False),
        (8, 128, False),
        (1, 4, True),
        (1, 16, True),
        (1, 64, True),
    ):
        with tiles(rows, columns, chunks) if rows else contextlib.nullcontext():
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


# Numbers, defaults of PyTorch, tensors


def under(setting):
    """A context in which tensors made without a device, or without a dtype, are others."""
    if setting == "device":
        return torch.device("meta")

    @contextlib.contextmanager
    def changed():
        set_default, old = (
            (torch.set_default_device, None)
            if setting == "default device"
            else (torch.set_default_dtype, torch.get_default_dtype())
        )
        set_default("meta" if setting == "default device" else setting)
        try:
            yield
        finally:
            set_default(old)

    return changed()


@either_backend
@either_norm
@pytest.mark.parametrize("dropout_p", [None, 0.05, 0.5, 1.0], ids=str)
@pytest.mark.parametrize("setting", ["device", "default device", torch.float64, BF16], ids=str)
def test_defaults_of_pytorch_change_nothing(normal, backend, centre, dropout_p, setting):
    """Tensors large enough for dropout by places; bit for bit."""
    (x, residual, *parameters), upstreams = sample(normal, centre, (67, 64))
    options = {} if dropout_p is None else {"dropout_p": dropout_p, "prenorm": True}
    tensors = x, None if dropout_p is None else residual, *parameters
    upstreams = upstreams[:1] if dropout_p is None else upstreams
    x[3] += 100.0
    call = ours(centre, backend=backend, **options)
    expected = results(call, tensors, upstreams)
    with under(setting):
        found = results(call, tensors, upstreams)
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


INTEGERS = [
    numpy.int64(7),
    (numpy.int32(7),),
    [numpy.int64(7)],
    torch.Size([7]),
    torch.tensor(7),
    numpy.array([7]),
    [torch.tensor(7)],
]
NUMBERS = [numpy.float64(0.25), numpy.float32(0.25), numpy.float16(0.25), torch.tensor(0.25)]


@either_backend
@either_norm
def test_numbers_of_numpy_and_tensors(normal, backend, centre):
    """Each is the Python number that it holds."""
    x, residual = normal(5, 7), normal(5, 7)
    name = "layer_norm" if centre else "rms_norm"
    function, add = getattr(kernels, name), getattr(kernels, f"add_{name}")
    expected = function(x, 7, eps=0.25, backend=backend)
    for shape, eps in itertools.product(INTEGERS, NUMBERS):
        assert torch.equal(function(x, shape, eps=eps, backend=backend), expected)
    torch.manual_seed(3)
    expected = add(x, residual, dropout_p=0.25, prenorm=True, backend=backend)
    for shape, dropout_p, flag in itertools.product(INTEGERS, NUMBERS, (numpy.bool_(True), torch.tensor(True))):
        torch.manual_seed(3)
        found = add(
            x.requires_grad_(),
            residual,
            normalized_shape=shape,
            dropout_p=dropout_p,
            prenorm=flag,
            save_output=flag,
            backend=backend,
        )
        assert all(map(torch.equal, found, expected))


@torch_warns
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_made_with_numbers_of_numpy(normal, device, name, compiled):
    x = normal(5, 7).requires_grad_()
    expected = getattr(kernels.nn, name)(7, eps=0.25).to(device)(x)
    for shape, eps in itertools.product(INTEGERS, NUMBERS):
        module = getattr(kernels.nn, name)(shape, eps=eps).to(device)
        assert module.normalized_shape == (7,) and module.eps == 0.25
        if compiled and (shape is INTEGERS[0] or eps is NUMBERS[0]):
            torch._dynamo.reset()
            module = torch.compile(module, fullgraph=True, backend="aot_eager")
        output = module(x)
        torch.testing.assert_close(output, expected)
        output.sum().backward()


@either_backend
@either_norm
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("prenorm", [False, True], ids=["output", "output_and_sum"])
@pytest.mark.parametrize("shape", [(5, 7), (0, 7)], ids=str)
def test_outputs_may_be_changed_in_place(normal, backend, centre, has_residual, prenorm, shape):
    """Those that the backward does not need, as in PyTorch: the output, but not the sum."""
    if prenorm and not has_residual:
        pytest.skip("no sum to return")

    def changed(function):
        def call(*tensors):
            output, *rest = function(*tensors)
            return output.mul_(2.0).sin_(), *rest

        return call

    tensors, upstreams = sample(normal, centre, shape)
    if not has_residual:
        tensors[1] = None
    options = {"prenorm": True} if prenorm else {}
    found, expected = (
        results(changed(f), tensors, upstreams[: 1 + prenorm])
        for f in (ours(centre, backend=backend, **options), torchs(centre, prenorm=prenorm))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Memory


@either_norm
def test_operations_read_every_tensor_by_its_strides(normal, centre):
    """Statistics, seed, parameters, upstream gradients: every second number of larger tensors, and expanded ones."""

    def strided(y):
        return y if y is None else torch.stack([y, torch.full_like(y, 7)], dim=-1).flatten(-2)[..., ::2]

    (x, residual, weight, bias), upstreams = sample(normal, centre, (9, 37))
    seed = torch.tensor([3], device=x.device)
    tensors = x, residual, seed, weight, bias
    rules = (37,), EPS, 0.4, centre, True
    expected, found = (
        torch.ops.kernels.norm_forward(*(arrange(y) for y in tensors), *rules) for arrange in (lambda y: y, strided)
    )
    assert all(map(torch.equal, found, expected))
    saved = *upstreams, expected[1], seed, weight, bias, *expected[2:]
    rules = (37,), F32, F32, 0.4, centre, False, [True, True, True, bias is not None]
    expected, found = (
        torch.ops.kernels.norm_backward(*(arrange(y) for y in saved), *rules) for arrange in (lambda y: y, strided)
    )
    assert all(map(torch.equal, found, expected))
    constant = [y if y is None else y[..., :1].expand(y.shape) for y in saved]
    found, expected = (
        torch.ops.kernels.norm_backward(*y, *rules)
        for y in (constant, [y if y is None else y.contiguous() for y in constant])
    )
    assert all(map(torch.equal, found, expected))


@either_backend
@either_norm
def test_input_that_overlaps_itself(normal, backend, centre):
    """Windows of a row of numbers; the gradient of each number is the sum over its windows."""
    numbers, weight, upstream = normal(40), normal(8), normal(11, 8)
    windows = lambda y: y.unfold(0, 8, 3)  # noqa: E731
    found, expected = (
        results(lambda y, w, f=f: f(windows(y), windows(y), w), (numbers, weight), [upstream])
        for f in (ours(centre, backend=backend), torchs(centre))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
            call, (x[rows], residual[rows].clone(), *parameters), [u[rows] for u in upstreams]
        )
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
    seed, guarded_mean = torch.tensor([3], device=device), guarded(9, 2)
    output, total, mean, rstd = guarded(9, 37), guarded(9, 37), guarded_mean if centre else None, guarded(9)
    rows = [_rows(y, 37) for y in (x, residual, upstream, grad_sum, output if from_output else total)]
    forward.launch_forward(*rows[:2], seed, weight, bias, output, total, mean, rstd, EPS, 0.4, F32)
    gradients = guarded(9, 37), guarded(9, 37), guarded(37), guarded(37) if centre else None
    backward.launch_backward(*rows[2:], seed, weight, bias, mean, rstd, *gradients, 0.4, centre, from_output)
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
        for ours_, theirs in zip((found[0], found[2].sum(-1), found[3]), expected):
            torch.testing.assert_close(ours_.flatten(), theirs.flatten(), rtol=1e-4, atol=1e-4)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    leading=st.lists(st.integers(1, 5), max_size=2),
    n_cols=st.integers(1, 70),
    centre=st.booleans(),
    dtypes=st.sampled_from(list(MIXED.values())),
    has_weight=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.6]),
)
def test_any_shape(normal, device, leading, n_cols, centre, dtypes, has_weight, dropout_p):
    shape = (*leading, n_cols)
    tensors, upstreams = sample(normal, centre, shape, dtypes)
    tensors[2:] = tensors[2:] if has_weight else [None, None]
    keep = kept(shape, dropout_p, device)[0]
    peer = torchs(centre, prenorm=True, keep=keep, dropout_p=dropout_p)
    assert_no_worse(ours(centre, prenorm=True, dropout_p=dropout_p), peer, tensors, upstreams)


@either_norm
@pytest.mark.parametrize("n_cols", [1, 37])
def test_a_gradient_without_that_of_the_statistics_is_rejected(normal, centre, n_cols):
    """Also where it is all there is: of a layer norm of one column the exact gradient is 0."""
    tensors, upstreams = sample(normal, centre, (29, n_cols))
    assert_no_worse(ours(centre), torchs(centre), tensors, upstreams[:1])
    with pytest.raises(AssertionError, match="gradient 0: error"):
        assert_no_worse(functools.partial(torchs(centre), held=True), torchs(centre), tensors, upstreams[:1])


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
def test_partial_sums_where_programs_do_not_divide_the_rows(normal, centre, n_rows):
    """One row a tile, eight programs in the interpreter: one partial sum too few would show."""
    tensors, upstreams = sample(normal, centre, (n_rows, 41))
    with tiles(1, 64):
        assert_no_worse(ours(centre), torchs(centre), tensors, upstreams[:1])


@pytest.mark.gpu
@pytest.mark.large
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
        ours(centre, prenorm=True), (x[-5:].clone(), residual[-5:].clone()), [up[-5:].clone(), up_sum[-5:].clone()]
    )
    assert all(torch.equal(a[-5:], b) for a, b in zip([*outputs, *gradients], [*last, *last_gradients]))
    keep = kept(shape, 0.5, "cuda")[0]
    assert abs(keep[-5:].float().mean() - 0.5) < 0.02 and not torch.equal(keep[-1], keep[-2])


# Modules


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_load_the_state_of_their_namesakes(normal, device, name, eps):
    options = {} if eps is None else {"eps": eps}
    theirs = getattr(torch.nn, name)((3, 5), **options).to(device)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(normal(3, 5))
    module = getattr(kernels.nn, name)((3, 5), **options).to(device)
    module.load_state_dict(theirs.state_dict())
    x, residual = normal(2, 3, 5), normal(2, 3, 5)
    torch.testing.assert_close(module(x), theirs(x))
    torch.testing.assert_close(module(x, residual), theirs(x + residual))
    for found, expected in zip(module(x, residual, prenorm=True), (theirs(x + residual), x + residual)):
        torch.testing.assert_close(found, expected)
    assert (module(x, residual, dropout_p=1.0) - theirs(residual)).abs().max() < 1e-5


@either_norm
@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("dropout_p", [None, 0.0])
@pytest.mark.parametrize("shape", [(19, 37), (2, 3, 64), (0, 7)], ids=str)
def test_a_plain_call_on_a_cpu_gives_bit_for_bit_what_it_gives_when_asked_all(
    normal, centre, dropout_p, shape, monkeypatch
):
    (x, residual, *parameters), upstreams = sample(normal, centre, shape)
    x[:1] += 100.0  # far from zero
    options = {} if dropout_p is None else {"dropout_p": dropout_p, "prenorm": True}
    tensors = x, None if dropout_p is None else residual, *parameters
    upstreams = upstreams[:1] if dropout_p is None else upstreams
    call = ours(centre, backend="torch", **options)
    asked = []

    def answer(*args):
        asked.append(eager.is_simple(*args))
        return asked[-1]

    monkeypatch.setattr(api, "is_simple", answer)
    found = tree_leaves(results(call, tensors, upstreams))
    assert all(asked) and asked
    monkeypatch.setattr(api, "is_simple", lambda *_: False)
    expected = tree_leaves(results(call, tensors, upstreams))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("device", ["cpu"])
def test_what_is_no_plain_call_of_a_norm(normal):
    x, weight = normal(5, 7), normal(7)
    plain = (x, x, (7,), weight, weight, 1e-5, 0.0, "torch")
    assert eager.is_simple(*plain) and eager.is_simple(x, None, (7,), weight, None, 0.0, 0.0, "torch")
    others = [
        (0, x.bfloat16()),
        (0, x[:, :6]),
        (1, x[:4]),
        (1, x.double()),
        (2, 7),
        (2, (5, 7)),
        (3, None),
        (3, weight[:6]),
        (4, weight.double()),
        (5, -1.0),
        (5, math.nan),
        (5, None),
        (6, 0.1),
        (6, torch.zeros(2)),
        (7, "triton"),
        (7, "auto"),  # here Triton's interpreter runs it
        (7, "best"),
    ]
    for place, other in others:
        assert not eager.is_simple(*plain[:place], other, *plain[place + 1 :]), (place, other)
