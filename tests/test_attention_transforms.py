"""Attention under transforms of torch.func, higher derivatives, torch.compile, torch.export and torch.fx.

Each on both paths: the Triton kernels, interpreted, and PyTorch's on a CPU.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import kernels
from kernels import scaled_dot_product_attention, varlen_attention
from tests.conformance.formula import attention as formula

PATHS = pytest.mark.parametrize("path", ["triton", "torch"])
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # PyTorch's own
attention = functools.partial(scaled_dot_product_attention, enable_gqa=True)


@pytest.fixture(autouse=True)
def as_on_the_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs a call is chosen as it is for users, also by sizes."""
    path = request.getfixturevalue("path") if "path" in request.fixturenames else "torch"
    monkeypatch.setattr("kernels.backend.INTERPRETED", path == "triton")


# Transforms and higher derivatives

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.tensor([[True, False, True], [True, True, False]])},
    "float mask": {"attn_mask": torch.tensor([[0.5, -math.inf, 0.25], [1.0, -1.0, 0.0]])},
    "rules": {"window": (1, 1), "softcap": 2.0, "sinks": torch.tensor([0.3, -0.5]), "alibi_slopes": torch.rand(2)},
}
TRANSFORMS: dict[str, Callable[[Callable[..., torch.Tensor]], Callable[..., Any]]] = {
    "vmap": lambda f: lambda q, k, t: vmap(f, (0, None))(torch.stack([q, t, 2 * q]), k),
    "vmap, in another dimension": lambda f: lambda q, k, t: vmap(f, (2, None), 1)(torch.stack([q, t, 2 * q], 2), k),
    "vmap of grad": lambda f: (
        lambda q, k, t: vmap(grad(lambda *x: f(*x).sin().sum()), (0, None))(torch.stack([q, t]), k)
    ),
    "jacrev": lambda f: lambda q, k, t: jacrev(f, (0, 1))(q, k),
    "vmap of vjp": lambda f: lambda q, k, t: vmap(vjp(f, q, k)[1])(torch.stack([t, q, q * t])),
    "jvp": lambda f: lambda q, k, t: jvp(lambda x: f(x, k), (q,), (t,)),
    "jvp of jvp": lambda f: lambda q, k, t: jvp(lambda x: jvp(lambda y: f(y, k), (x,), (t,))[1], (q,), (q,)),
    "jacfwd of jacrev": lambda f: lambda q, k, t: hessian(lambda x: f(x, k).sin().sum())(q),
    "jacrev of jacfwd": lambda f: lambda q, k, t: jacrev(jacfwd(lambda x: f(x, k).sin().sum()))(q),
    "jacrev of jacrev": lambda f: lambda q, k, t: jacrev(jacrev(lambda x: f(q, x).sin().sum()))(k),
    "jvp of grad": lambda f: lambda q, k, t: jvp(grad(lambda x: f(x, k).sin().sum()), (q,), (t,)),
    "third derivative": lambda f: lambda q, k, t: _third_derivative(f, q, k),
}


def _third_derivative(f: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    total = f(*leaves).sin().sum()
    for order in (1, 2, 3):
        grads = torch.autograd.grad(total, leaves, create_graph=order < 3)
        total = sum(x.pow(2).sum() for x in grads)
    return grads


@PATHS
@QUIET
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_that_of_the_formula(transform: str, call: str, path: str) -> None:
    query, key, tangent = torch.randn(1, 2, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 2, 2, 4)
    options = CALLS[call]
    found = TRANSFORMS[transform](lambda q, k: attention(q, k, k.sin(), **options))(query, key, tangent)
    exact = TRANSFORMS[transform](lambda q, k: formula(q, k, k.sin(), **options)[0])(
        query.double(), key.double(), tangent.double()
    )
    torch.testing.assert_close(found, torch.utils._pytree.tree_map(torch.Tensor.float, exact), rtol=2e-4, atol=2e-5)


@PATHS
@QUIET
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_a_transform_of_packed_sequences_is_that_of_each(alignment: str, path: str) -> None:
    lengths, key_lengths, x, keys = (3, 0, 2), (4, 1, 1), torch.randn(5, 2, 4), torch.randn(6, 2, 4)
    starts = [torch.tensor([0, *itertools.accumulate(n)]) for n in (lengths, key_lengths)]
    options: dict[str, Any] = {"is_causal": True, "causal_alignment": alignment}

    def packed(y: torch.Tensor) -> torch.Tensor:
        k = keys.to(y.dtype)
        return varlen_attention(y, k, k.sin(), *starts, 3, 4, alibi_slopes=torch.ones(3, 2), **options)

    def one_by_one(y: torch.Tensor) -> torch.Tensor:
        parts = []
        for q, k in zip(y.split(lengths), keys.to(y.dtype).split(key_lengths)):
            q, k = (z.transpose(0, 1)[None] for z in (q, k))
            parts.append(formula(q, k, k.sin(), alibi_slopes=torch.ones(2), **options)[0][0].transpose(0, 1))
        return torch.cat(parts)

    for transform in (jacfwd, lambda f: hessian(lambda y: f(y).sin().sum()), lambda f: lambda y: jvp(f, (y,), (y,))):
        found, exact = transform(packed)(x), transform(one_by_one)(x.double())
        torch.testing.assert_close(found, torch.utils._pytree.tree_map(torch.Tensor.float, exact), rtol=2e-4, atol=2e-5)
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    for f, y in ((packed, leaf), (one_by_one, exact_leaf)):
        first = torch.autograd.grad(f(y).sin().sum(), y, create_graph=True)[0]
        first.pow(2).sum().backward()
    torch.testing.assert_close(leaf.grad, exact_leaf.grad.float(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("what", ["shared heads", "keys that are not finite", "autocast", "float32 mask beside halves"])
def test_double_backward_on_a_cpu_of(what: str) -> None:
    """Where PyTorch's fused kernel runs, which has none."""
    heads, dtype = 2 if what == "shared heads" else 4, torch.bfloat16 if "halves" in what else torch.float32
    leaves = [torch.randn(2, h, n, 8, dtype=dtype, requires_grad=True) for h, n in ((4, 40), (heads, 50), (heads, 50))]
    mask = torch.rand(40, 50) < 0.7
    mask[:, 3] = False
    if "not finite" in what:
        with torch.no_grad():
            leaves[1][0, 1, 3] = math.nan
            leaves[2][1, 0, 3] = math.inf
    if "float32" in what:
        mask = torch.randn(40, 50).masked_fill(~mask, -math.inf)
    results = []
    for solve, as_dtype in ((attention, dtype), (formula, torch.float64)):
        inputs = [x.detach().to(as_dtype) for x in leaves]
        if solve is formula:
            inputs = [x.masked_fill(~torch.isfinite(x), 0.0) for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast" and solve is attention):
            output = solve(*inputs, attn_mask=mask)
        output = output[0] if isinstance(output, tuple) else output
        grads = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    rough = 5e-2 if dtype == torch.bfloat16 or what == "autocast" else 1e-4
    for ours, exact in zip(*results):
        assert (ours - exact).norm() < rough * exact.norm()


@PATHS
@QUIET
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_forward_mode_over_the_backward_of_a_finished_graph(options: dict[str, Any], path: str) -> None:
    from torch.autograd import forward_ad

    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    output, upstream = attention(query, query, query, **options), torch.randn(1, 2, 4, 8)
    with forward_ad.dual_level():
        dual = torch.autograd.grad(output, query, forward_ad.make_dual(upstream, upstream), retain_graph=True)[0]
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(output, query, upstream)[0], rtol=1e-4, atol=1e-5)


@PATHS
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_many_gradients_at_once(options: dict[str, Any], path: str) -> None:
    leaves = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    output, upstream = attention(*leaves, **options), torch.randn(3, 1, 2, 40, 8)
    together = torch.autograd.grad(output, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for ours, alone in zip(together, torch.autograd.grad(output, leaves, upstream[i], retain_graph=True)):
            torch.testing.assert_close(ours[i], alone, rtol=1e-4, atol=1e-5)


# torch.compile and torch.export


@PATHS
@QUIET
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"softcap": 2.0, "alibi_slopes": torch.ones(2)}, {"window": (2, 1), "return_lse": True}],
    ids=lambda options: "+".join(options),
)
def test_packed_sequences_compile_to_one_graph(options: dict[str, Any], path: str) -> None:
    def call(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        longest = starts.diff().max()
        found = varlen_attention(x, x, x, starts, None, longest, longest, **options)
        return found.output if isinstance(found, tuple) else found

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, starts = torch.randn(9, 2, 8, requires_grad=True), torch.tensor([0, 3, 5, 9])
    found, expected = compiled(x, starts), call(x, starts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@QUIET
def test_compiled_rows_of_large_masks_get_the_right_gradient() -> None:
    mask, value = torch.full((4, 4), -1e9), torch.ones(1, 1, 4, 8, requires_grad=True)
    torch._dynamo.reset()
    call = torch.compile(lambda v: attention(torch.zeros(1, 1, 4, 8), v, v, mask), fullgraph=True, backend="aot_eager")
    call(value).sum().backward()
    torch.testing.assert_close(value.grad, torch.ones_like(value))


@QUIET
def test_compiled_overlapping_queries_are_right() -> None:
    query, key = torch.randn(1, 2, 12).unfold(2, 8, 1), torch.randn(1, 2, 7, 8)
    torch._dynamo.reset()
    found = torch.compile(attention, fullgraph=True, backend="aot_eager")(query, key, key)
    torch.testing.assert_close(found, attention(query.clone(), key, key))


EXPORTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.1},
    "window": {"window": (3, 2)},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "a wide window": {"window": (50, 0)},
    "softcap": {"softcap": 2.0, "return_lse": True},
    "key_lengths": {"key_lengths": torch.tensor([1, 2])},
    "weights": {"need_weights": True},
}


# Key heads for four query heads: PyTorch 2.11 makes guards on lengths where it merges heads, in its own function too.
SHARED = 2 if torch.torch_version.TorchVersion(torch.__version__) >= (2, 12) else 4


class Wrapped(torch.nn.Module):
    """A function as a module, which torch.export wants."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


@QUIET
@pytest.mark.parametrize(
    ("call", "path", "cross"),
    [(call, path, (i + j) % 2 == 0) for i, call in enumerate(EXPORTED) for j, path in enumerate(("triton", "torch"))],
)
def test_one_export_serves_all_lengths(call: str, cross: bool, path: str) -> None:
    from torch.export import Dim

    solve = Wrapped(functools.partial(attention, **EXPORTED[call]))
    n_queries = Dim("L", min=2, max=4096)
    n_keys = Dim("S", min=2, max=4096) if cross else n_queries
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, SHARED, 11 if cross else 7, 8)
    shapes = {"args": ({2: n_queries}, {2: n_keys}, {2: n_keys})}
    exported = torch.export.export(solve, (query, key, key), dynamic_shapes=shapes).module()
    for length in (2, 65):  # short and long, as they are for the shortcuts of small calls
        query, key = torch.randn(2, 4, length, 8), torch.randn(2, SHARED, 70 if cross else length, 8)
        torch.manual_seed(0)
        found = exported(query, key, key)
        torch.manual_seed(0)
        expected = solve(query, key, key)
        if call == "dropout":
            assert found.shape == expected.shape and found.isfinite().all()
        else:
            for ours, eager in zip(found, expected):
                assert (ours is None) == (eager is None)
                if eager is not None:
                    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@PATHS
@QUIET
def test_one_export_serves_all_packs(path: str) -> None:
    from torch.export import Dim

    def call(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        longest = starts.diff().max()
        return varlen_attention(x, x, x, starts, None, longest, longest, is_causal=True)

    shapes = {"args": ({0: Dim("T", min=2, max=4096)}, {0: Dim("N", min=3, max=99)})}
    inputs = torch.randn(9, 2, 8), torch.tensor([0, 3, 5, 9])
    exported = torch.export.export(Wrapped(call), inputs, dynamic_shapes=shapes).module()
    inputs = torch.randn(90, 2, 8), torch.tensor([0, 33, 45, 80, 85, 90])
    torch.testing.assert_close(exported(*inputs), call(*inputs), rtol=1e-4, atol=1e-5)


# Tensors without numbers, and of other types

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.1},
    "bool mask": {"attn_mask": torch.bool},
    "float mask": {"attn_mask": torch.float32},
    "lengths": {"key_lengths": torch.int64},
    "window": {"window": (2, 3)},
    "slopes": {"alibi_slopes": torch.float32},
    "sinks": {"sinks": torch.float32, "softcap": 2.0},
    "everything out": {"return_lse": True, "need_weights": True},
    "bottom_right": {"causal_alignment": "bottom_right", "is_causal": True},
}
SHAPES = {"attn_mask": (7, 9), "key_lengths": (3,), "alibi_slopes": (4,), "sinks": (4,)}


def shapes_of(options: dict[str, Any], device: str) -> list[Any]:
    """Shape, dtype and device of all that comes out, and of the gradients."""
    made = {
        name: torch.zeros(SHAPES[name], dtype=x, device=device) if isinstance(x, torch.dtype) else x
        for name, x in options.items()
    }
    leaves = [torch.zeros(3, h, n, 8, device=device, requires_grad=True) for h, n in ((4, 7), (2, 9), (2, 9))]
    found = attention(*leaves, **made)
    outputs = list(found) if isinstance(found, tuple) else [found]
    grads = torch.autograd.grad(outputs[0].sum(), leaves)
    return [None if x is None else (x.shape, x.dtype, x.device) for x in (*outputs, *grads)]


@PATHS
@pytest.mark.parametrize("case", OPTIONS)
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(case: str, path: str) -> None:
    from torch._subclasses import FakeTensorMode

    expected = shapes_of(OPTIONS[case], "cpu")
    with FakeTensorMode():
        assert shapes_of(OPTIONS[case], "cpu") == expected
    found = shapes_of(OPTIONS[case], "meta")
    assert [x and x[:2] for x in found] == [x and x[:2] for x in expected]
    assert all(x is None or x[2].type == "meta" for x in found)


@PATHS
def test_packed_sequences_of_fake_and_meta_tensors(path: str) -> None:
    from torch._subclasses import FakeTensorMode

    def call(device: str) -> torch.Tensor:
        x, starts = torch.zeros(5, 2, 8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
        return varlen_attention(x, x, x[..., :3], starts, None, 4, 4, is_causal=True)

    with FakeTensorMode():
        assert call("cpu").shape == (5, 2, 3)
    assert call("meta").shape == (5, 2, 3)


class Model(torch.nn.Module):
    """Calls by the package and by name, with keywords."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        first = kernels.scaled_dot_product_attention(q, k, value=k, is_causal=True, softcap=2.0)
        second = scaled_dot_product_attention(first, k, k)
        packed = k[0].transpose(0, 1)
        return varlen_attention(second[0].transpose(0, 1), packed, packed, starts, None, 5, 5)


@PATHS
def test_symbolic_trace_records_calls_whole(path: str) -> None:
    traced = torch.fx.symbolic_trace(Model())
    names = [node.target.__name__ for node in traced.graph.nodes if "attention" in str(node.target)]
    assert names == ["scaled_dot_product_attention"] * 2 + ["varlen_attention"]
    inputs = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.tensor([0, 2, 5])
    assert torch.equal(traced(*inputs), Model()(*inputs))
    assert torch.equal(copy.deepcopy(traced)(*inputs), Model()(*inputs))
    q, sinks = inputs[0], torch.zeros(2)
    masked = torch.fx.symbolic_trace(lambda m, s: scaled_dot_product_attention(q, q, q, m, sinks=s))
    mask = torch.randn(5, 5)
    assert torch.equal(masked(mask, sinks), scaled_dot_product_attention(q, q, q, mask, sinks=sinks))


class Own(torch.Tensor):
    """A type of tensor that changes nothing."""


@PATHS
def test_a_plain_subclass_stays_itself(path: str) -> None:
    x = torch.randn(1, 2, 5, 8)
    own = x.as_subclass(Own)
    output, lse, _ = attention(own, own, x, return_lse=True, is_causal=True)
    assert type(output) is type(lse) is type(attention(x, own, x)) is Own
    assert torch.equal(output.as_subclass(torch.Tensor), attention(x, x, x, return_lse=True, is_causal=True).output)
