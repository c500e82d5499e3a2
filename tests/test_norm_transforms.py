"""The norms under transformations, compilation, autocast and checkpoints; what they refuse; wrong norms rejected."""

import itertools
import math

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import kernels

forward = pytest.importorskip("kernels.layer_norm.forward", reason="needs triton")
from tests.norm_problem import (  # noqa: E402 (it imports Triton)
    BF16, EPS, F32, MIXED, assert_no_worse, either_backend, either_norm, kept, ours, results, sample, torch_warns,
    torchs,
)


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
