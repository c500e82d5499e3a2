"""Layer norm: two loops -> no loop -> PyTorch -> the Triton kernels, interpreted or, where there is one, on a GPU.

The bound on an error is PyTorch's own at the same dtype, both measured against float64: see `tolerances.py`.
"""

import itertools
import math

import numpy
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import kernels
from kernels.layer_norm import autograd, eager, ops
from kernels.reference import layer_norm_no_loop, layer_norm_two_loop

backward = pytest.importorskip("kernels.layer_norm.backward", reason="needs triton")
forward = pytest.importorskip("kernels.layer_norm.forward", reason="needs triton")
from kernels.layer_norm.tiles import choose_tile, n_programs  # noqa: E402
from tests.norm_problem import assert_no_worse, tiles, torchs  # noqa: E402 (it imports Triton)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def name_of(value):
    """Short test ids for dtypes."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture
def chunks_of_16():
    """Make both passes walk every row in chunks of 16 columns, as they do rows too long for the registers."""
    with tiles(1, 16, chunked=True):
        yield


def on_triton(input, shape, weight=None, bias=None, eps=EPS):
    """The kernels, or an error where they cannot run."""
    return kernels.layer_norm(input, shape, weight, bias, eps, backend="triton")


def output_and_gradients(function, tensors, upstream, shape, eps=EPS):
    """Output of function(input, shape, weight, bias, eps), and the gradients of those of the three that are given."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    output = function(leaves[0], shape, *leaves[1:], eps)
    grads = torch.autograd.grad(output, [x for x in leaves if x is not None], upstream)
    return [output.detach(), *grads]


def assert_no_worse_than_pytorch(function, tensors, upstream, shape=None, eps=EPS):
    """`assert_no_worse` of function(input, shape, weight, bias, eps)."""
    shape = tensors[0].shape[-1:] if shape is None else shape
    alone = lambda x, residual, *parameters: (function(x, shape, *parameters, eps),)  # noqa: E731
    assert_no_worse(alone, torchs(True, eps), (tensors[0], None, *tensors[1:]), [upstream])


# Values


def test_two_loops_no_loop_pytorch_kernel(normal):
    """The whole chain of trust on one example."""
    x, weight, bias = normal(5, 11), normal(11), normal(11)
    in_float64 = [t.cpu().double() for t in (x, weight, bias)]
    two_loop, no_loop = (function(*in_float64, EPS) for function in (layer_norm_two_loop, layer_norm_no_loop))
    pytorch = torch.nn.functional.layer_norm(in_float64[0], (11,), *in_float64[1:], EPS)
    torch.testing.assert_close(two_loop, no_loop, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(no_loop, pytorch, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(on_triton(x, (11,), weight, bias).cpu().double(), pytorch, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("n_cols", [1, 2, 3, 7, 63, 64, 65, 127, 129, 1000, 1024, 1025])
def test_widths_and_dtypes(normal, n_cols, dtype):
    n_rows = 67 if n_cols < 100 else 13
    tensors = normal(n_rows, n_cols, dtype=dtype) * 3 + 1, normal(n_cols, dtype=dtype), normal(n_cols, dtype=dtype)
    assert_no_worse_than_pytorch(on_triton, tensors, normal(n_rows, n_cols, dtype=dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("n_cols", [1, 2, 15, 16, 17, 37, 64])
def test_rows_walked_in_chunks(normal, chunks_of_16, n_cols, dtype):
    tensors = normal(7, n_cols, dtype=dtype) * 3 + 1, normal(n_cols, dtype=dtype), normal(n_cols, dtype=dtype)
    assert_no_worse_than_pytorch(on_triton, tensors, normal(7, n_cols, dtype=dtype))


def test_row_too_long_for_the_registers(normal):
    """Widths at which the real tiles are chunked: backward from 8,193 columns, forward from 16,385 in float32."""
    assert choose_tile("backward", 8210, 4).chunked and choose_tile("forward", 16411, 4).chunked
    assert_no_worse_than_pytorch(on_triton, (normal(3, 8210), normal(8210), normal(8210)), normal(3, 8210))
    x = normal(3, 16411)
    expected = torch.nn.functional.layer_norm(x.cpu().double(), (16411,))
    assert (on_triton(x, (16411,)).cpu() - expected).abs().max() < 1e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("has_weight", [False, True], ids=["no_weight", "weight"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_without_weight_or_bias(normal, request, chunked, has_weight, has_bias):
    if chunked:
        request.getfixturevalue("chunks_of_16")
    weight, bias = (normal(37) if given else None for given in (has_weight, has_bias))
    assert_no_worse_than_pytorch(on_triton, (normal(29, 37), weight, bias), normal(29, 37))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_float32_parameters_with_half_input(normal, dtype):
    """The output has the input's dtype, the gradients those of their tensors."""
    tensors = normal(13, 37, dtype=dtype), normal(37), normal(37)
    assert_no_worse_than_pytorch(on_triton, tensors, normal(13, 37, dtype=dtype))


def test_several_normalized_dimensions(normal):
    tensors = normal(2, 7, 3, 5), normal(3, 5), normal(3, 5)
    assert_no_worse_than_pytorch(on_triton, tensors, normal(2, 7, 3, 5), shape=(3, 5))


def test_int_stands_for_one_dimension(normal):
    x = normal(3, 5)
    assert torch.equal(on_triton(x, 5), on_triton(x, (5,)))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_eps(normal, eps):
    """Small rows, so that eps can weigh as much as the variance and more."""
    assert_no_worse_than_pytorch(on_triton, (normal(7, 13) * 0.01, normal(13), normal(13)), normal(7, 13), eps=eps)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_rows_far_from_zero(normal, request, chunked):
    """Mean 10,000 and deviation 0.01: the naive E[x^2] - E[x]^2 has no correct digit here."""
    if chunked:
        request.getfixturevalue("chunks_of_16")
    x = 1e4 + 1e-2 * normal(7, 67)
    assert_no_worse_than_pytorch(on_triton, (x, normal(67), normal(67)), normal(7, 67))
    expected = torch.nn.functional.layer_norm(x.cpu().double(), (67,))
    assert (on_triton(x, (67,)).cpu() - expected).abs().max() < 1e-5


def test_constant_rows_of_large_numbers_stay_finite(device):
    """Rounding may leave a variance below 0 here, far beyond eps."""
    x = torch.logspace(0, 15, 31, device=device).unsqueeze(1).expand(31, 67)
    assert on_triton(x, (67,)).isfinite().all()


@pytest.mark.parametrize("shape", [(5, 1), (5, 7)], ids=["one_column", "constant_rows"])
def test_rows_without_variance(normal, device, shape):
    """The output is the bias, and no gradient passes: a constant shift of a row changes nothing.

    But for rounding, of what cancels: x and its mean, the gradients and their mean, over the root of eps.
    """
    x = torch.arange(5.0, device=device).reshape(5, 1).expand(shape) * 0.1
    weight, bias = normal(shape[1]), normal(shape[1])
    output, dinput, dweight, _ = output_and_gradients(on_triton, (x, weight, bias), torch.ones_like(x), shape[1:])
    unit = 2 * torch.finfo(x.dtype).eps / EPS**0.5
    assert ((output - bias).abs() <= unit * (weight * x).abs() + unit * EPS**0.5 * bias.abs()).all()
    assert (dinput.sum(dim=1).abs() <= unit * weight.abs().sum()).all()
    assert (dweight.abs() <= unit * x.abs().sum(dim=0)).all()


@pytest.mark.parametrize("shape, normalized", [((0, 7), (7,)), ((3, 0), (0,)), ((2, 0, 3, 5), (3, 5))])
def test_empty(device, shape, normalized):
    x = torch.empty(shape, device=device)
    parameters = torch.ones(normalized, device=device), torch.ones(normalized, device=device)
    output, *grads = output_and_gradients(on_triton, (x, *parameters), torch.empty_like(x), normalized)
    assert output.shape == shape
    for like, found in zip((x, *parameters), grads):
        assert torch.equal(found, torch.zeros_like(like))


# Memory


def strided(normal, layout):
    """A (2, 5, 37) tensor of the named layout."""
    if layout == "columns_of_wider_rows":
        return normal(2, 5, 64)[..., 3:40]
    if layout == "transposed_leading":
        return normal(5, 2, 37).transpose(0, 1)
    if layout == "transposed_columns":
        return normal(2, 37, 5).transpose(1, 2)
    if layout == "every_second_column":
        return normal(2, 5, 74)[..., ::2]
    if layout == "expanded_rows":
        return normal(1, 1, 37).expand(2, 5, 37)
    return normal(2, 5, 1).expand(2, 5, 37) if layout == "expanded_columns" else normal(2, 5, 37)


LAYOUTS = ("columns_of_wider_rows", "transposed_leading", "transposed_columns", "every_second_column", "expanded_rows")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_input(normal, layout):
    tensors = strided(normal, layout), normal(37), normal(37)
    assert not tensors[0].is_contiguous()
    assert_no_worse_than_pytorch(on_triton, tensors, normal(2, 5, 37))
    assert on_triton(tensors[0], (37,)).is_contiguous()


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded_columns"])
def test_strided_upstream_gradient_is_read_and_not_written(normal, layout):
    upstream = strided(normal, layout)
    before = upstream.clone()
    assert_no_worse_than_pytorch(on_triton, (normal(2, 5, 37), normal(37), normal(37)), upstream)
    assert torch.equal(upstream, before)


def test_strided_parameters(normal):
    tensors = normal(5, 37), normal(37, 2)[:, 0], normal(1).expand(37)
    assert_no_worse_than_pytorch(on_triton, tensors, normal(5, 37))


def test_rows_with_a_stride_are_not_copied(normal):
    x = normal(2, 5, 64)[..., 3:40]
    assert ops._rows(x, 37).data_ptr() == x.data_ptr()


def test_offsets_beyond_32_bits(device):
    """The third row starts 2^31 elements on. Only three pages of the 4 GiB are touched, so none are allocated."""
    stride = 2**30 + 16
    try:
        x = torch.empty(2 * stride + 64, dtype=torch.float16, device=device).as_strided((3, 37), (stride, 1))
    except RuntimeError as error:
        pytest.skip(f"no room for 4 GiB of address space: {error}")
    rows = torch.linspace(-3, 5, 111).square().reshape(3, 37).to(x)
    x.copy_(rows)
    assert torch.equal(on_triton(x, (37,)), on_triton(rows, (37,)))


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_a_row_does_not_depend_on_its_batch(normal, request, chunked):
    if chunked:
        request.getfixturevalue("chunks_of_16")
    x = normal(41, 67)
    together = on_triton(x, (67,))
    assert torch.equal(together[5:6], on_triton(x[5:6], (67,)))
    assert torch.equal(together[5:23], on_triton(x[5:23].clone(), (67,)))


def test_gradients_repeat_bit_for_bit(normal):
    tensors, upstream = (normal(131, 67), normal(67), normal(67)), normal(131, 67)
    first, second = (output_and_gradients(on_triton, tensors, upstream, (67,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_only_the_gradients_that_are_needed(normal, request, chunked):
    """Every subset gives the same numbers as all four, and has no elements for those left out."""
    if chunked:
        request.getfixturevalue("chunks_of_16")
    n_rows = 3 if chunked else 19
    x, residual, weight, bias = normal(n_rows, 37), normal(n_rows, 37), normal(37), normal(37)
    seed = torch.tensor([5], device=x.device)
    _, total, mean, rstd = torch.ops.kernels.norm_forward(x, residual, seed, weight, bias, (37,), EPS, 0.25, True, True)
    saved = normal(n_rows, 37), normal(n_rows, 37), total, seed, weight, bias, mean, rstd
    rules = (37,), x.dtype, x.dtype, 0.25, True, False
    complete = torch.ops.kernels.norm_backward(*saved, *rules, [True] * 4)
    for mask in itertools.product([False, True], repeat=4):
        for needed, found, expected in zip(mask, torch.ops.kernels.norm_backward(*saved, *rules, mask), complete):
            assert torch.equal(found, expected) if needed else found.numel() == 0


def test_kernels_run_and_say_which_gradients_autograd_wants(normal, monkeypatch):
    """`backend="triton"` reaches the launchers, and a frozen tensor costs nothing."""
    wanted = []
    launch = backward.launch_backward

    def spy(*arguments):
        wanted.append([gradient is not None for gradient in arguments[8:12]])
        launch(*arguments)

    monkeypatch.setattr(backward, "launch_backward", spy)
    x, weight = normal(5, 7).requires_grad_(), normal(7)
    on_triton(x, (7,), weight, normal(7).requires_grad_()).backward(normal(5, 7))
    assert wanted == [[True, False, False, True]] and weight.grad is None


# Choice of tiles


def test_tiles_cover_every_width():
    for n_cols, element_size in itertools.product([*range(1, 1100), *range(4000, 70000, 997), 2**17], [2, 4]):
        for tile in (choose_tile(kernel, n_cols, element_size) for kernel in ("forward", "backward")):
            assert tile.chunked or tile.block_n >= n_cols
            assert all(side & (side - 1) == 0 for side in (tile.rows, tile.block_n, tile.num_warps))
            assert tile.rows * tile.block_n * element_size <= 2048 * tile.num_warps  # 64 bytes a thread


def test_programs_never_outnumber_the_work():
    assert n_programs(n_tiles=3, n_column_blocks=1, num_warps=4, n_multiprocessors=132) == 3
    assert n_programs(n_tiles=10**6, n_column_blocks=1, num_warps=4, n_multiprocessors=132) == 528
    assert n_programs(n_tiles=10**6, n_column_blocks=1000, num_warps=4, n_multiprocessors=132) == 1


# Backends and errors


def test_backend_torch_is_pytorch(normal):
    tensors = normal(5, 7), normal(7), normal(7)
    found = kernels.layer_norm(tensors[0], (7,), *tensors[1:], EPS, backend="torch")
    assert torch.equal(found, torch.nn.functional.layer_norm(tensors[0], (7,), *tensors[1:], EPS))


def test_float64_goes_to_pytorch(normal):
    x = normal(5, 7).double()
    assert torch.equal(kernels.layer_norm(x, (7,)), torch.nn.functional.layer_norm(x, (7,)))
    with pytest.raises(ValueError, match="float64"):
        on_triton(x, (7,))


BAD_CALLS = {
    "integers": (lambda x: (x.int(), (7,)), TypeError, "the norms take float16.*found torch.int32"),
    "shape": (lambda x: (x, (5,)), ValueError, r"found \(5,\) for an input of shape \(5, 7\)"),
    "empty_shape": (lambda x: (x, ()), ValueError, "trailing dimensions"),
    "long_shape": (lambda x: (x, (3, 5, 7)), ValueError, "trailing dimensions"),
    "weight_shape": (lambda x: (x, (7,), x[0, :5]), ValueError, r"weight must have the shape .* found \(5,\)"),
    "bias_shape": (lambda x: (x, (7,), None, x), ValueError, r"bias must have the shape .* found \(5, 7\)"),
    "weight_dtype": (lambda x: (x, (7,), x[0].half()), TypeError, "weight must have the input's dtype"),
    "two_dtypes": (lambda x: (x.half(), (7,), x[0], x[0].half()), TypeError, "share a dtype"),
    "device": (lambda x: (x, (7,), x[0].to("meta")), ValueError, "weight must be on the input's device"),
    "negative_eps": (lambda x: (x, (7,), None, None, -1e-5), ValueError, "eps must be"),
    "nan_eps": (lambda x: (x, (7,), None, None, math.nan), ValueError, "eps must be"),
    "text_eps": (lambda x: (x, (7,), None, None, "1e-5"), ValueError, "eps must be"),
    "no_eps": (lambda x: (x, (7,), None, None, None), ValueError, "eps must be"),
    "no_input": (lambda x: (None, (7,)), TypeError, "input must be a tensor, found NoneType; make it one with"),
    "list_input": (lambda x: ([1.0] * 7, (7,)), TypeError, "input must be a tensor, found list"),
    "array_input": (lambda x: (numpy.ones(7), (7,)), TypeError, "input must be a tensor, found ndarray"),
    "true_input": (lambda x: (True, (7,)), TypeError, "input must be a tensor, found bool"),
    "array_weight": (lambda x: (x, (7,), numpy.ones(7)), TypeError, "weight must be a tensor or None, found ndarray"),
    "true_bias": (lambda x: (x, (7,), None, True), TypeError, "bias must be a tensor or None, found bool"),
    "list_bias": (lambda x: (x, (7,), None, [0.0] * 7), TypeError, "bias must be a tensor or None, found list"),
    "sparse_input": (lambda x: (x.to_sparse(), (7,)), TypeError, "input must be a dense tensor, .*sparse_coo"),
    "sparse_weight": (lambda x: (x, (7,), x[0].to_sparse()), TypeError, "weight must be a dense tensor"),
    "no_shape": (lambda x: (x, None), TypeError, "normalized_shape must be an integer or several, found None"),
    "float_shape": (lambda x: (x, 7.0), TypeError, "must be an integer or several, found 7.0"),
    "floats_in_shape": (lambda x: (x, (7.0,)), TypeError, r"must be an integer or several, found \(7.0,\)"),
    "true_shape": (lambda x: (x, True), TypeError, "must be an integer or several, found True"),
    "text_shape": (lambda x: (x, "7"), TypeError, "must be an integer or several, found '7'"),
    "negative_shape": (lambda x: (x, -7), ValueError, r"trailing dimensions of the input, found \(-7,\)"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_in_one_line(normal, case, backend):
    arguments, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message) as raised:
        kernels.layer_norm(*arguments(normal(5, 7)), backend=backend)
    assert "\n" not in str(raised.value)


def test_unknown_backend(normal):
    with pytest.raises(ValueError, match="backend must be one of"):
        kernels.layer_norm(normal(5, 7), (7,), backend="cuda")


# Registered operations, transformations, compilation


OPCHECKED = {
    "compact": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed_columns": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["own_dtype", "as_in_autocast"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, None], ids=name_of)
def test_operations_pass_opcheck(normal, weight_dtype, dtype):
    """Layer norm of one input, with and without parameters."""
    x = normal(2, 5, 7, dtype=torch.bfloat16)
    weight, bias = (None if weight_dtype is None else normal(7, dtype=weight_dtype) for _ in range(2))
    arguments = x, None, None, weight, bias, (7,), EPS, 0.0, True, False, dtype
    torch.library.opcheck(torch.ops.kernels.norm_forward.default, arguments)
    output, total, mean, rstd = torch.ops.kernels.norm_forward(*arguments)
    assert output.dtype == (dtype or x.dtype) and mean.dtype == rstd.dtype == torch.float32 and total.numel() == 0
    mask = [True, False, weight is not None, False]
    arguments = torch.ones_like(output), None, x, None, weight, bias, mean, rstd, (7,), x.dtype, x.dtype, 0.0
    torch.library.opcheck(torch.ops.kernels.norm_backward.default, (*arguments, True, False, mask))


@pytest.mark.parametrize(
    "layout, centre, dropout_p, from_output",
    [
        ("compact", True, 0.3, False),
        ("compact", False, 0.0, True),
        ("transposed", True, 0.3, True),
        ("transposed", False, 0.0, False),
        ("transposed_columns", True, 0.0, False),
        ("expanded", False, 0.3, False),
    ],
)
def test_operations_with_a_residual_pass_opcheck(normal, layout, centre, dropout_p, from_output):
    """Every layout of input, residual and both upstream gradients; a bfloat16 branch beside a float32 residual."""
    arrange = OPCHECKED[layout]
    x, residual, weight = arrange(normal(2, 5, 7, dtype=torch.bfloat16)), arrange(normal(2, 5, 7)), normal(7)
    bias = normal(7) if centre else None
    seed = torch.tensor([11], device=x.device) if dropout_p else None
    arguments = x, residual, seed, weight, bias, (7,), EPS, dropout_p, centre, not from_output
    torch.library.opcheck(torch.ops.kernels.norm_forward.default, arguments)
    output, total, mean, rstd = torch.ops.kernels.norm_forward(*arguments)
    assert total.shape == ((0,) if from_output else x.shape) and total.dtype == torch.float32
    assert output.dtype == x.dtype and mean.numel() == (20 if centre else 0) and rstd.shape == (10,)
    upstream, grad_sum = arrange(normal(2, 5, 7, dtype=torch.bfloat16)), arrange(normal(2, 5, 7))
    saved = upstream, None if from_output else grad_sum, output if from_output else total, seed, weight, bias, mean
    rules = rstd, (7,), x.dtype, residual.dtype, dropout_p, centre, from_output, [True, True, True, centre]
    torch.library.opcheck(torch.ops.kernels.norm_backward.default, (*saved, *rules))


def test_operations_run_on_triton_only(normal, monkeypatch):
    """There is no second implementation behind them that could hide a call that went astray."""
    arguments = None, None, None, None, (7,), EPS, 0.0, True, False
    with pytest.raises(NotImplementedError, match="Triton kernel, and .*float64"):
        torch.ops.kernels.norm_forward(normal(5, 7).double(), *arguments)
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="on the CPU and TRITON_INTERPRET=1"):
        torch.ops.kernels.norm_forward(torch.ones(5, 7), *arguments)


def test_float32_output_of_a_half_input(normal):
    """What CUDA autocast asks for: the output is not rounded to bfloat16, gradients keep their tensors' dtypes."""
    x, weight, bias = normal(11, 37, dtype=torch.bfloat16), normal(37), normal(37)

    def in_autocast(input, shape, weight, bias, eps):
        rules = autograd.NormRules(shape, eps, dtype=torch.float32)
        return autograd.apply_norm(input, None, None, weight, bias, rules)[0]

    upstream = normal(11, 37)
    found = output_and_gradients(in_autocast, (x, weight, bias), upstream, (37,))
    expected = output_and_gradients(torch.nn.functional.layer_norm, (x.float(), weight, bias), upstream, (37,))
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1].bfloat16(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(found[2:], expected[2:], rtol=1e-5, atol=1e-5)


def three_tensors(normal):
    """An input (2, 5, 7), weight and bias."""
    return normal(2, 5, 7), normal(7), normal(7)


def mine(input, weight, bias):
    """The kernels, then something nonlinear."""
    return on_triton(input, (7,), weight, bias).sin()


def pytorch(input, weight, bias):
    """The same by PyTorch."""
    return torch.nn.functional.layer_norm(input, (7,), weight, bias, EPS).sin()


def assert_same(transform, *tensors):
    """`transform` of our function equals that of PyTorch's."""
    torch.testing.assert_close(transform(mine)(*tensors), transform(pytorch)(*tensors), rtol=1e-5, atol=1e-5)


def test_forward_mode(normal):
    tensors, tangents = three_tensors(normal), three_tensors(normal)
    assert_same(lambda f: lambda *t: jvp(f, t, tangents)[1], *tensors)
    for i in range(3):
        assert_same(lambda f: jacfwd(f, argnums=i), *tensors)


@pytest.mark.parametrize("centre", [True, False], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("double_backward", [False, True], ids=["first", "second"])
def test_derivatives_in_float64(normal, double_backward, centre):
    """The formula that double backward and forward mode are made of, against finite differences."""
    tensors = [x.double().requires_grad_() for x in three_tensors(normal)]

    def function(input, weight, bias):
        return eager.plain_norm(input, (7,), weight, bias, EPS, centre)[0]

    if double_backward:
        assert torch.autograd.gradgradcheck(function, tensors)
    else:
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)


def test_double_backward(normal):
    """A gradient penalty."""
    upstream = normal(2, 5, 7)

    def penalty(function):
        def of(*tensors):
            leaves = [x.detach().requires_grad_() for x in tensors]
            gradients = torch.autograd.grad(function(*leaves), leaves, upstream, create_graph=True)
            return torch.autograd.grad(sum(g.pow(3).sum() for g in gradients), leaves)

        return of

    tensors = three_tensors(normal)
    torch.testing.assert_close(penalty(mine)(*tensors), penalty(pytorch)(*tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_dims", [(0, None, None), (2, None, None), (None, 0, None), (1, 0, 1)], ids=str)
def test_vmap(normal, in_dims):
    tensors = [
        x if dim is None else torch.stack([x, 2 * x + 1, -x], dim=dim) for x, dim in zip(three_tensors(normal), in_dims)
    ]
    assert_same(lambda f: vmap(f, in_dims), *tensors)
    assert_same(lambda f: vmap(grad(lambda *t: f(*t).pow(2).sum(), argnums=(0, 1, 2)), in_dims), *tensors)


def test_jacobian_by_reverse_mode(normal):
    assert_same(lambda f: jacrev(f, argnums=0), *three_tensors(normal))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(normal, dynamic, backend):
    """Forward and backward graphs hold the registered operations on the Triton path, and neither on PyTorch's."""
    targets = []

    def record(graph, _):
        targets.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def function(input, weight, bias):
        return kernels.layer_norm(input, (7,), weight, bias, EPS, backend=backend).sin()

    torch._dynamo.reset()
    compiled = torch.compile(
        function, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=record, bw_compiler=record)
    )
    for length in (5, 11):
        leaves = [x.requires_grad_() for x in (normal(2, length, 7), normal(7), normal(7))]
        upstream = normal(2, length, 7)
        found, expected = (f(*leaves) for f in (compiled, pytorch))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(output, leaves, upstream) for output in (found, expected))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert len(targets) == (2 if dynamic else 4)
    names = [f"kernels.norm_{way}.default" for way in ("forward", "backward")]
    assert [name in graph for name, graph in zip(names, targets)] == [backend == "triton"] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo and Inductor about themselves
def test_compiles_with_inductor(normal):
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in three_tensors(normal)]
    found, expected = torch.compile(mine, fullgraph=True)(*leaves), pytorch(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(output, leaves, torch.ones_like(found)) for output in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


# The comparison itself


def wrong_variance(input, shape, weight, bias, eps):
    """N - 1 in place of N."""
    variance, mean = torch.var_mean(input.float(), dim=-1, correction=1, keepdim=True)
    return ((input - mean) / torch.sqrt(variance + eps) * weight + bias).to(input.dtype)


def without_eps(input, shape, weight, bias, eps):
    return torch.nn.functional.layer_norm(input, shape, weight, bias, 0.0)


def without_weight(input, shape, weight, bias, eps):
    return torch.nn.functional.layer_norm(input, shape, None, bias, eps) + 0 * weight


def without_gradient(input, shape, weight, bias, eps):
    output = torch.nn.functional.layer_norm(input, shape, weight, bias, eps)
    return output.detach() + 0 * (output + weight + bias + input)


def with_half_statistics(input, shape, weight, bias, eps):
    mean = input.mean(dim=-1, keepdim=True).half().float()
    return torch.nn.functional.layer_norm(input, shape, weight, bias, eps) + (input.mean(dim=-1, keepdim=True) - mean)


WRONG = (wrong_variance, without_eps, without_weight, without_gradient, with_half_statistics)


@pytest.mark.parametrize("wrong", WRONG)
def test_comparison_rejects(normal, wrong):
    """Each of these passes a loose absolute tolerance somewhere; none passes here."""
    tensors = 0.3 * normal(11, 37), normal(37), normal(37)
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse_than_pytorch(wrong, tensors, normal(11, 37))


@pytest.mark.parametrize("wrong", [wrong_variance, without_weight, without_gradient])
def test_comparison_rejects_in_bfloat16(normal, wrong):
    tensors = [x.bfloat16() for x in (normal(11, 37), normal(37), normal(37))]
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse_than_pytorch(wrong, tensors, normal(11, 37).bfloat16())
