"""The norms under transformations, compilation, autocast and checkpoints; what they refuse; wrong norms rejected."""

import contextlib
import copy
import itertools
import math
import pickle

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import add_layer_norm, layer_norm

forward = pytest.importorskip("kernels.layer_norm.forward", reason="needs triton")
from tests.norm_problem import (  # noqa: E402 (it imports Triton)
    BF16,
    EPS,
    F32,
    MIXED,
    assert_no_worse,
    either_backend,
    either_norm,
    kept,
    ours,
    results,
    sample,
    torch_warns,
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
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_double_backward_with_save_output_is_refused(normal, centre, has_residual):
    """Never a wrong number."""
    x, residual, *_ = small(normal, centre)
    leaf = x.detach().requires_grad_()
    with pytest.raises(NotImplementedError, match="double backward with save_output"):
        output = ours(centre, save_output=True)(leaf, residual if has_residual else None)[0]
        torch.autograd.grad(output, leaf, x, create_graph=True)


@torch_warns
@either_backend
@either_norm
def test_forward_mode_through_dropout(normal, device, backend, centre):
    """The sum's tangent shows which elements are dropped; the output's is that of the sum without dropout."""
    x, residual, tangent = (normal(64, 65) for _ in range(3))
    call = ours(centre, dropout_p=0.5, prenorm=True, backend=backend)
    (_, total), (output_tangent, sum_tangent) = jvp(lambda y: tuple(call(y, residual)), (x,), (tangent,))
    keep = sum_tangent != 0
    assert abs(keep.float().mean() - 0.5) < 0.04
    torch.testing.assert_close(total, torch.where(keep, residual + 2 * x, residual))
    torch.testing.assert_close(sum_tangent, torch.where(keep, 2 * tangent, 0.0))
    expected = jvp(lambda y: torchs(centre)(y, None)[0], (total,), (sum_tangent,))[1]
    torch.testing.assert_close(output_tangent, expected, rtol=1e-4, atol=1e-4)


def exact_norm(centre, has_residual):
    """A norm by its formula, to be differentiated in float64: of input, weight and residual, all outputs in one."""

    def call(x, weight, residual):
        total = x + residual if has_residual else x
        y = total - total.mean(-1, keepdim=True) if centre else total
        y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
        return y.sin() + (total.cos() if has_residual else 0.0)

    return call


def norm_of_ours(centre, has_residual, backend):
    """The same by ours."""

    def call(x, weight, residual):
        options = {"prenorm": True} if has_residual else {}
        y, *total = ours(centre, backend=backend, **options)(x, residual if has_residual else None, weight)
        return y.sin() + (total[0].cos() if has_residual else 0.0)

    return call


def by_autograd(order):
    """Gradients of a scalar, those of a scalar made of these, and so on."""

    def transform(f, x, weight, residual, *_):
        leaves = [y.detach().requires_grad_() for y in (x, weight)]
        gradients = [f(*leaves, residual)]
        for place in range(order):
            scalar = sum(y.square().sum() for y in gradients)
            gradients = torch.autograd.grad(scalar, leaves, create_graph=place + 1 < order)
        return gradients

    return transform


def by_dual_numbers(f, x, weight, residual, *tangents):
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, (x, weight), tangents)
        return forward_ad.unpack_dual(f(*duals, residual)).tangent


def of_a_finished_graph(f, x, weight, residual, tangent, _):
    """The tangent of a backward whose forward ran before."""
    leaves = [y.detach().requires_grad_() for y in (x, weight)]
    y = f(*leaves, residual)
    return jvp(lambda u: torch.autograd.grad(y, leaves, u, create_graph=True), (tangent,), (tangent.cos(),))[1]


def pushed(f, residual, tangents):
    return lambda *t: jvp(lambda *u: f(*u, residual), t, tangents)[1]


def pulled(f, residual, upstream):
    return lambda *t: vjp(lambda *u: f(*u, residual), *t)[1](upstream)


def scalar(f):
    return lambda *t: f(*t).square().sum()


# Of a function f(input, weight, residual), at numbers x, w, r, with tangents t of x and u of w.
BOTH = (0, 1)
DERIVATIVES = {
    "backward": by_autograd(1),
    "double backward": by_autograd(2),
    "third derivative": by_autograd(3),
    "fourth derivative": by_autograd(4),
    "grad(grad(grad))": lambda f, x, w, r, t, u: grad(
        lambda a: grad(lambda b: grad(lambda c: f(c, w, r).sum())(b).sin().sum())(a).sin().sum()
    )(x),
    "jvp": lambda f, x, w, r, t, u: pushed(f, r, (t, u))(x, w),
    "dual numbers": by_dual_numbers,
    "jvp(jvp)": lambda f, x, w, r, t, u: jvp(pushed(f, r, (t, u)), (x, w), (t.cos(), u.cos()))[1],
    "jacfwd(jacfwd)": lambda f, x, w, r, t, u: jacfwd(jacfwd(f, BOTH), BOTH)(x, w, r),
    "jacrev(jacrev)": lambda f, x, w, r, t, u: jacrev(jacrev(f, BOTH), BOTH)(x, w, r),
    "jacfwd(jacrev)": lambda f, x, w, r, t, u: jacfwd(jacrev(f, BOTH), BOTH)(x, w, r),
    "jacrev(jacfwd)": lambda f, x, w, r, t, u: jacrev(jacfwd(f, BOTH), BOTH)(x, w, r),
    "vjp(jvp)": lambda f, x, w, r, t, u: vjp(pushed(f, r, (t, u)), x, w)[1](t.cos()),
    "jvp(vjp)": lambda f, x, w, r, t, u: jvp(pulled(f, r, t.cos()), (x, w), (t, u))[1],
    "jvp of a finished graph": of_a_finished_graph,
    "vmap": lambda f, x, w, r, t, u: vmap(lambda a: f(a, w, r))(torch.stack([x, t])),
    "vmap(grad)": lambda f, x, w, r, t, u: vmap(grad(lambda *a: scalar(f)(*a, r), BOTH))(
        torch.stack([x, t]), torch.stack([w, u])
    ),
    "grad(vmap)": lambda f, x, w, r, t, u: grad(
        lambda a, b: vmap(lambda c: f(c, b, r))(torch.stack([a, a.sin()])).square().sum(), BOTH
    )(x, w),
    "vmap(jvp)": lambda f, x, w, r, t, u: vmap(lambda a: pushed(f, r, (a, u))(x, w))(torch.stack([x, t])),
    "hessian": lambda f, x, w, r, t, u: hessian(scalar(f), BOTH)(x, w, r),
}


@torch_warns
@either_backend
@either_norm
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_is_that_of_the_formula(normal, device, name, has_residual, centre, backend):
    tensors = normal(2, 5), normal(5), normal(2, 5), normal(2, 5), normal(5)
    found = DERIVATIVES[name](norm_of_ours(centre, has_residual, backend), *tensors)
    expected = DERIVATIVES[name](exact_norm(centre, has_residual), *(x.cpu().double() for x in tensors))
    for one, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (one.cpu().double() - right).norm() < 1e-4 * max(right.norm(), 1.0)


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


@pytest.mark.slow
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
    found, expected = (results(f, tensors, upstreams[: 1 + prenorm]) for f in (compiled, eager))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if prenorm:
        dropped = torch.compile(
            ours(centre, prenorm=True, save_output=save_output, dropout_p=0.5), fullgraph=True, backend="aot_eager"
        )
        ones = torch.ones_like(tensors[0])
        (_, total), (dinput, _) = results(dropped, (ones, 0 * ones), [0 * ones, ones])
        assert torch.equal(dinput, total) and 0 < (total != 0).float().mean() < 1


@torch_warns
def test_compiled_rms_norm(normal):
    torch._dynamo.reset()
    tensors = normal(5, 7), None, normal(7)
    found, expected = (
        results(f, tensors, [tensors[0]])
        for f in (torch.compile(ours(False), fullgraph=True, backend="aot_eager"), ours(False))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@either_backend
@either_norm
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_autocast_on_a_cpu(backend, centre, dtypes):
    """Output and gradients keep the dtypes that they have without autocast, whatever the mixture."""
    generator = torch.Generator().manual_seed(5)
    tensors, upstreams = sample(
        lambda *shape, dtype: torch.randn(shape, generator=generator).to(dtype), centre, dtypes=dtypes
    )
    with torch.autocast("cpu", BF16):
        found = results(ours(centre, prenorm=True, backend=backend), tensors, upstreams)
    expected = results(
        torchs(centre, prenorm=True), [x if x is None else x.float() for x in tensors], [x.float() for x in upstreams]
    )
    like = [tensors[0], upstreams[1], *(x for x in tensors if x is not None)]
    for x, y, z in zip(itertools.chain(*found), itertools.chain(*expected), like, strict=True):
        assert x.dtype == z.dtype
        assert (x.float() - y).norm() < 0.03 * y.norm()


@either_norm
def test_checkpoint_replays_dropout(normal, centre):
    tensors, upstreams = sample(normal, centre)
    call = ours(centre, dropout_p=0.5, prenorm=True)
    found, expected = (
        results(f, tensors, upstreams) for f in (lambda *t: checkpoint(call, *t, use_reentrant=False), call)
    )
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*found), itertools.chain(*expected)))


# Other tensors: without numbers, recorded, of subclasses


def call_of(name, backend="auto", **options):
    """A norm by its name, of input, residual, weight and bias, as a function of all four."""

    def call(x, residual, weight, bias):
        function, parameters = getattr(kernels, name), (weight, bias) if "layer" in name else (weight,)
        if "add" in name:
            return function(x, residual, *parameters, backend=backend, **options)
        return function(x, weight.shape, *parameters, backend=backend)

    return call


NAMES = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
each_function = pytest.mark.parametrize("name", NAMES)


@each_function
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dropout_p, save_output", [(0.0, False), (0.05, False), (0.5, True), (1.0, False)], ids=str)
@pytest.mark.parametrize("kind", ["fake cpu", "fake cuda", "meta"])
def test_tensors_without_numbers(monkeypatch, name, dtype, dropout_p, save_output, kind):
    """Shapes, dtypes and devices; a fake tensor of a GPU gets to the Triton operations."""
    if kind == "fake cuda":
        monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    device = kind.split()[-1]
    with contextlib.nullcontext() if kind == "meta" else FakeTensorMode():
        # Without a GPU, autograd has no stream for fake gradients of one.
        wanted = device != "cuda" or torch.cuda.is_available()
        x, residual, weight, bias = (
            torch.empty(shape, device=device, dtype=dtype, requires_grad=wanted)
            for shape in [(67, 64), (67, 64), (64,), (64,)]
        )
        call = call_of(name, dropout_p=dropout_p, prenorm=True, save_output=save_output)
        outputs = call(x, residual, weight, bias)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert len(outputs) == 1 + ("add" in name)
        if wanted:
            sum(y.sum() for y in outputs).backward()
            outputs = *outputs, x.grad
        assert all((y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device) for y in outputs)


class Model(torch.nn.Module):
    """All ways to call a norm."""

    def __init__(self):
        super().__init__()
        self.layer_norm, self.rms_norm = kernels.nn.LayerNorm(7), kernels.nn.RMSNorm(7)

    def forward(self, x, residual):
        y, total = self.rms_norm(self.layer_norm(x), residual, prenorm=True)
        y = self.layer_norm(self.rms_norm(y), total)
        y = kernels.add_rms_norm(kernels.rms_norm(y, 7), x) + kernels.layer_norm(total, (7,))
        return layer_norm(y, 7) + add_layer_norm(y, residual, normalized_shape=7)


def test_symbolic_trace(normal):
    """A call of a norm is one node of the graph, which runs, and is copied, as the model is."""
    model, tensors = Model().to(normal(1).device), (normal(5, 7), normal(5, 7))
    traced = torch.fx.symbolic_trace(model)
    nodes = [node.target.__name__ for node in traced.graph.nodes if "norm" in getattr(node.target, "__name__", "")]
    assert nodes == [
        "layer_norm",
        "add_rms_norm",
        "rms_norm",
        "add_layer_norm",
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "layer_norm",
        "add_layer_norm",
    ]
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph(*tensors), model(*tensors))


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


class Watching(TorchFunctionMode):
    """What is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@each_function
@either_backend
def test_subclasses_and_modes_of_functions(normal, name, backend):
    """A subclass comes back as itself, a mode sees the call, and the numbers are the same."""
    tensors = normal(5, 7), normal(5, 7), normal(7), normal(7)
    call = call_of(name, backend, **({"prenorm": True} if "add" in name else {}))
    expected = tree_leaves(call(*tensors))
    found = tree_leaves(call(tensors[0].as_subclass(Marked), *tensors[1:]))
    assert all(type(y) is Marked for y in found)
    assert all(torch.equal(y.as_subclass(torch.Tensor), right) for y, right in zip(found, expected, strict=True))
    with Watching() as mode, torch.device("meta"):
        assert all(map(torch.equal, tree_leaves(call(*tensors)), expected))
    assert getattr(kernels, name) in mode.seen


@torch_warns
@each_function
@either_backend
def test_compiles_under_a_mode_of_functions(normal, name, backend):
    torch._dynamo.reset()
    tensors = normal(5, 7), normal(5, 7), normal(7), normal(7)
    compiled = torch.compile(call_of(name, backend), fullgraph=True, backend="aot_eager")
    with torch.device("meta"):
        torch.testing.assert_close(compiled(*tensors), call_of(name, backend)(*tensors), rtol=1e-5, atol=1e-5)


@torch_warns
@each_function
def test_one_tensor_in_several_places_compiles(normal, name):
    """Dynamo takes no tensor twice in a function of autograd."""
    torch._dynamo.reset()
    x, weight = normal(5, 7).requires_grad_(), normal(7).requires_grad_()
    call = call_of(name, "triton")
    found, expected = (
        torch.autograd.grad(f(x, x, weight, weight).sin().sum(), (x, weight))
        for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Lengths known later


class Normed(torch.nn.Module):
    """A norm as a module to be exported."""

    def __init__(self, call):
        super().__init__()
        self.weight, self.bias, self.call = torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(7)), call

    def forward(self, x, residual):
        return self.call(x, residual, self.weight, self.bias)


@torch_warns
@each_function
@either_backend
@pytest.mark.parametrize(
    ("way", "dropout_p"),
    [("strict", 0.0), ("not strict", 0.0), ("compiled", 0.0), ("strict", 0.05), ("not strict", 0.5), ("compiled", 0.5)],
)
def test_any_number_of_rows_by_one_graph(normal, device, name, backend, dropout_p, way):
    """On both sides of what a CPU takes for a small call."""
    if dropout_p and "add" not in name:
        pytest.skip("no dropout")
    torch._dynamo.reset()
    graphs = []
    model = Normed(call_of(name, backend, **({"dropout_p": dropout_p} if "add" in name else {}))).to(device)
    if way == "compiled":
        run = torch.compile(
            model, fullgraph=True, dynamic=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]
        )
    else:
        rows = {0: torch.export.Dim("L", min=2, max=4096)}
        run = torch.export.export(
            model, (normal(37, 7), normal(37, 7)), dynamic_shapes=(rows, rows), strict=way == "strict"
        ).module()
    for length in (3, 700, 4096) if backend == "torch" else (3, 53, 128):
        x, residual = normal(length, 7), normal(length, 7)
        output = run(x, residual)
        if dropout_p:
            assert output.shape == x.shape
        else:
            torch.testing.assert_close(output, model(x, residual), rtol=1e-5, atol=1e-5)
    assert len(graphs) == (way == "compiled")


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
    "no_input": (lambda x: (None, x), {}, TypeError, "input must be a tensor, found NoneType"),
    "list_input": (lambda x: ([1.0], x), {}, TypeError, "input must be a tensor, found list"),
    "no_residual": (lambda x: (x, None), {}, TypeError, "residual must be a tensor, found None; call layer_norm"),
    "array_residual": (lambda x: (x, numpy.ones((5, 7))), {}, TypeError, "residual must be a tensor, found ndarray"),
    "true_weight": (lambda x: (x, x, True), {}, TypeError, "weight must be a tensor or None, found bool"),
    "list_weight": (lambda x: (x, x, [1.0]), {}, TypeError, "weight must be a tensor or None, found list"),
    "sparse_residual": (lambda x: (x, x.to_sparse()), {}, TypeError, "residual must be a dense tensor.*sparse_coo"),
    "float_shape": (lambda x: (x, x), {"normalized_shape": 7.0}, TypeError, "must be an integer or several, found 7.0"),
    "no_p": (lambda x: (x, x), {"dropout_p": None}, ValueError, "from 0 to 1, found None"),
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


@either_backend
@either_norm
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_higher_derivatives_through_a_checkpoint(normal, backend, centre, dtype):
    """What is saved may be unpacked once only."""
    call, results, tensors = ours(centre, backend=backend), [], small(normal, centre)
    for checkpointed in (False, True):
        x, residual, *parameters = (y.detach().clone().to(dtype).requires_grad_() for y in tensors)
        run = (lambda *t: checkpoint(call, *t, use_reentrant=False)) if checkpointed else call
        output = run(x, residual, *parameters)[0]
        first = torch.autograd.grad(output.sin().sum(), x, create_graph=True)[0]
        results.append([first, *torch.autograd.grad(first.sin().sum(), (x, *parameters), allow_unused=True)])
    for found, expected in zip(*results):
        assert (found is None and expected is None) or torch.equal(found, expected)


def test_higher_derivatives_in_16_bits_without_numbers():
    x = torch.randn(2, 8, device="meta", dtype=BF16, requires_grad=True)
    assert torch.autograd.grad(kernels.layer_norm(x, 8).sum(), x, create_graph=True)[0].dtype == BF16
