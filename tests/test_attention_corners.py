"""Corners in which attention was once wrong: small tensors' strides, defaults, large masks, layouts, numbers, errors.

On both paths: the Triton kernels, interpreted, and PyTorch's on a CPU. What is right is said by hand, by the formula in
float64, or by the same call in a plain form.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import kernels
from kernels.attention.call import Call
from tests.conformance.formula import attention as formula
from tests.tolerances import assert_as_exact_as_torch

PATHS = pytest.mark.parametrize("path", ["triton", "torch"])
attention = functools.partial(kernels.scaled_dot_product_attention, enable_gqa=True)
varlen = kernels.varlen_attention


@pytest.fixture(autouse=True)
def as_on_the_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs a call is chosen as it is for users, also by sizes."""
    path = request.getfixturevalue("path") if "path" in request.fixturenames else "torch"
    monkeypatch.setattr("kernels.backend.INTERPRETED", path == "triton")


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=1e-4, atol=1e-5)


# Small tensors that are handed to kernels without their strides

COLUMN = torch.arange(12, dtype=torch.int64).reshape(3, 4)
LENGTHS = {
    "one for all": torch.tensor(3),
    "one, expanded": torch.tensor([4]).expand(3),
    "a column": COLUMN[:, 1] % 7,
    "every second": torch.tensor([7, 9, 2, 9, 0])[::2],
    "one in one dimension": torch.tensor([5]),
}


@PATHS
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_of_any_strides(lengths: str, path: str) -> None:
    x, used = torch.randn(3, 2, 7, 8), LENGTHS[lengths]
    expected = formula(x.double(), x.double(), x.double(), key_lengths=used.expand(3))[0]
    close(attention(x, x, x, key_lengths=used), expected)
    close(attention(x, x, x, key_lengths=used.int(), return_lse=True).output, expected)


@PATHS
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_slopes_and_sinks_of_any_strides(name: str, path: str) -> None:
    x, numbers = torch.randn(3, 4, 7, 8), torch.rand(4, 5)
    own = {"alibi_slopes": torch.rand(4, 3).T, "sinks": torch.rand(8)[::2]}[name]
    for given in (numbers[:, 2], own):
        close(attention(x, x, x, **{name: given}), formula(*(x.double(),) * 3, **{name: given})[0])


@PATHS
@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_lengths_under_vmap(batch: int, dim: int | None, path: str) -> None:
    x = torch.randn(2, batch, 2, 7, 8)
    used = torch.randint(1, 8, (2, batch) if dim == 0 else (batch,))
    found = torch.vmap(lambda y, n: attention(y, y, y, key_lengths=n), (0, dim))(x, used)
    for i in range(2):
        one = x[i].double()
        close(found[i], formula(one, one, one, key_lengths=used[i] if dim == 0 else used)[0])


def test_registered_operations_take_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", True)
    x = torch.randn(3, 2, 70, 8)
    starts = torch.tensor([0, 9, 30, 9, 70], dtype=torch.int32)[::2]
    asked = Call(None, COLUMN.int()[:, 2], torch.rand(2, 3).T, torch.rand(2, 2)[:, :1].T, scale=0.3)
    packed = Call(query_starts=starts, key_starts=starts.clone(), scale=0.3, max_queries=40, max_keys=40)
    for given, own in ((x, asked), (x[:1], packed)):
        plain = Call(*(y.contiguous() if isinstance(y, torch.Tensor) else y for y in own))
        results = []
        for call, loose in ((own, True), (plain, False)):
            outputs = torch.ops.kernels.attention_forward(given, given, given, *call, True)
            upstream = torch.ones_like(outputs[0]), torch.ones_like(outputs[1])
            rows = [y.mT.contiguous().mT if loose else y for y in outputs[1:]]
            mask = [True] * 3 + [False, call.sinks is not None]
            grads = torch.ops.kernels.attention_backward(*upstream, outputs[0], *rows, given, given, given, *call, mask)
            results.append([*outputs, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*results))


# Defaults of the process

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.ones(7, 9, dtype=torch.bool).tril()},
    "float mask": {"attn_mask": torch.randn(7, 9)},
    "large mask": {"attn_mask": torch.full((7, 9), -1e9)},
    "causal dropout": {"dropout_p": 0.1, "is_causal": True},
    "dropout": {"dropout_p": 0.1},
    "much dropout": {"dropout_p": 0.6, "attn_mask": torch.ones(7, 9, dtype=torch.bool)},
    "lengths": {"key_lengths": torch.full((33,), 5)},
    "slopes": {"alibi_slopes": torch.rand(4)},
    "window": {"window": (2, 1), "causal_alignment": "bottom_right"},
    "a negative scale": {"scale": -0.3},
    "rules": {"sinks": torch.rand(4), "softcap": 3.0, "return_lse": True, "need_weights": True},
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device: str) -> Any:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "meta as a context": lambda: torch.device("meta"),
    "meta as default": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@PATHS
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("case", CASES)
def test_defaults_of_the_process_change_nothing(case: str, default: str, path: str) -> None:
    batch = 33 if path == "torch" else 2
    leaves = [torch.randn(batch, 4, n, 16, requires_grad=True) for n in (7, 9, 9)]
    upstream = torch.randn(batch, 4, 7, 16)
    options = {name: x[:batch] if name == "key_lengths" else x for name, x in CASES[case].items()}

    def results() -> list[torch.Tensor]:
        torch.manual_seed(3)
        found = attention(*leaves, **options)
        outputs = list(found) if isinstance(found, tuple) else [found]
        return [*outputs, *torch.autograd.grad(outputs[0], leaves, upstream)]

    expected = results()
    with DEFAULTS[default]():
        found = results()
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and torch.equal(a, b)


@PATHS
@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_change_nothing_for_packed_sequences(default: str, path: str) -> None:
    x, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9])
    call = functools.partial(varlen, x, x, x, starts, None, 5, 5, softcap=2.0, return_lse=True)
    expected = call()
    with DEFAULTS[default]():
        found = call()
    assert torch.equal(found.output, expected.output) and torch.equal(found.lse, expected.lse)


# Rows under large finite numbers


@PATHS
@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.float32, -1e9),
        (torch.float32, 1e9),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.float16, -65504.0),
        (torch.bfloat16, -1e30),
        (torch.float64, torch.finfo(torch.float32).min),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_of_a_large_number_get_the_gradient_of_their_weights(
    dtype: torch.dtype, number: float, heads: int, path: str
) -> None:
    value = torch.ones(1, 1, 4, 8, dtype=dtype, requires_grad=True)
    query, key = torch.zeros(1, heads, 4, 8, dtype=dtype), torch.randn(1, 1, 4, 8, dtype=dtype)
    attention(query, key, value, torch.full((4, 4), number, dtype=dtype)).sum().backward()
    assert torch.equal(value.grad, torch.full_like(value, heads))


def test_large_scores_keep_the_sum_of_their_weights() -> None:
    """One log-sum-exp a row, which PyTorch's kernel keeps, is 2^-9 off at scores of 10,000."""
    query, key = torch.full((1, 1, 3, 4), 70.0), 70.0 + torch.randn(1, 1, 5, 4) / 1000
    leaves = [x.requires_grad_() for x in (query, key, torch.randn(1, 1, 5, 4))]
    ours = torch.autograd.grad(attention(*leaves).sin().sum(), leaves)
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    for a, b in zip(ours[2:], torch.autograd.grad(formula(*leaves)[0].sin().sum(), leaves)[2:]):
        torch.testing.assert_close(a.sum(), b.sum().float(), rtol=1e-4, atol=1e-4)


# Windows, layouts, dtypes


@PATHS
@pytest.mark.parametrize("more", [{}, {"softcap": 3.0}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("side", [sys.maxsize, 2**40])
def test_the_widest_windows_hide_nothing(side: int, more: dict[str, Any], path: str) -> None:
    x, extra = torch.randn(1, 2, 7, 8), {name: v for name, v in more.items() if name == "softcap"}
    for window in ((None, side), (side, None), (side, side)):
        found = attention(x, x, x, window=window, causal_alignment="bottom_right", **more)
        close(found.output if more.get("return_lse") else found, formula(*(x.double(),) * 3, **extra)[0])


@PATHS
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("view", ["unfold", "expanded rows", "expanded columns", "unfold and transposed"])
def test_overlapping_memory(view: str, which: int, path: str) -> None:
    views = {
        "unfold": lambda: torch.randn(1, 2, 12).unfold(2, 8, 1),
        "expanded rows": lambda: torch.randn(8).expand(1, 2, 5, 8),
        "expanded columns": lambda: torch.randn(1, 2, 5, 1).expand(1, 2, 5, 8),
        "unfold and transposed": lambda: torch.randn(1, 12, 2).unfold(1, 5, 1).permute(0, 2, 3, 1),
    }
    inputs = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    inputs[which] = views[view]()
    for training in (False, True):
        leaves = [x.detach().requires_grad_(training) for x in inputs]
        found, exact = attention(*leaves), [x.detach().double().clone().requires_grad_() for x in inputs]
        expected = formula(*exact)[0]
        close(found, expected)
        if training:
            upstream = torch.randn(1, 2, 5, 8)
            theirs = torch.autograd.grad(expected, exact, upstream.double())
            for a, b in zip(torch.autograd.grad(found, leaves, upstream), theirs):
                close(a, b)


@PATHS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"dropout_p": 0.1},
        {"return_lse": True},
        {"softcap": 2.0},
        {"attn_mask": torch.zeros(10, 10, requires_grad=True)},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
def test_outputs_are_ordered_in_memory_as_the_query(
    options: dict[str, Any], batch: int, training: bool, path: str
) -> None:
    if path == "triton":
        batch = min(batch, 2)
    for transposed in (True, False):
        x = torch.randn(batch, 10, 4, 16) if transposed else torch.randn(batch, 4, 10, 16)
        query = (x.transpose(1, 2) if transposed else x).requires_grad_(training)
        found = attention(query, query, query, **options)
        found = found.output if isinstance(found, tuple) else found
        (found.transpose(1, 2) if transposed else found).view(batch, -1)


@PATHS
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout_p": 0.1}, {"is_causal": True}, {"softcap": 2.0}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool)}],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_outputs_may_be_changed_in_place(options: dict[str, Any], batch: int, transposed: bool, path: str) -> None:
    batch = min(batch, 2) if path == "triton" else batch
    shape = (batch, 9, 4, 16) if transposed else (batch, 4, 9, 16)
    leaf = torch.randn(shape, requires_grad=True)
    query = leaf.transpose(1, 2) if transposed else leaf
    with torch.no_grad():
        attention(query, query, query, **options).mul_(2).add_(1)
    torch.manual_seed(0)
    attention(query, query, query, **options).clone().mul_(2).sum().backward()
    expected, leaf.grad = leaf.grad, None
    torch.manual_seed(0)
    output = attention(query, query, query, **options)
    try:
        output.mul_(2).sum().backward()
    except RuntimeError as error:  # as with PyTorch's: where the backward reads the output
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(leaf.grad, expected)


@PATHS
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"return_lse": True}], ids="+".join)
def test_outputs_of_packed_sequences_are_ordered_as_the_query(options: dict[str, Any], path: str) -> None:
    x, starts = torch.randn(6, 2, 8), torch.tensor([0, 2, 6])
    for query in (x, torch.randn(2, 6, 8).transpose(0, 1)):
        found = varlen(query, x, x, starts, None, 4, 4, **options)
        found = found.output if isinstance(found, tuple) else found
        (found if query is x else found.transpose(0, 1)).view(-1)


@PATHS
def test_packed_sequences_follow_autocast(path: str) -> None:
    x = torch.randn(9, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen(x, x, x, torch.tensor([0, 4, 9]), None, 5, 5).dtype == torch.bfloat16
        assert varlen(x[:0], x[:0], x[:0], torch.tensor([0, 0]), None, 0, 0).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_a_small_call_follows_autocast(training: bool) -> None:
    x = torch.randn(1, 2, 3, 4, requires_grad=training)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, x, x).dtype == torch.bfloat16


@PATHS
@pytest.mark.parametrize("window", [None, (2, None), (None, 1)], ids=str)
def test_lengths_move_the_places_of_as_many_queries_as_keys(window: Any, path: str) -> None:
    x, used = torch.randn(2, 2, 7, 8), torch.tensor([4, 7])
    options: dict[str, Any] = {"is_causal": window is None, "causal_alignment": "bottom_right", "key_lengths": used}
    found = attention(x, x, x, **options, window=window)
    close(found, formula(*(x.double(),) * 3, **options, window=window or (None, None))[0])


def test_sinks_and_slopes_of_a_float64_call_are_float64() -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    inputs = [torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda s, a: attention(x, x, x, sinks=s, alibi_slopes=a), inputs)
    starts = torch.tensor([0, 3, 5])
    packed = [x[0].transpose(0, 1)] * 3
    assert torch.autograd.gradcheck(lambda s, a: varlen(*packed, starts, None, 3, 3, sinks=s, alibi_slopes=a), inputs)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("more", [{}, {"softcap": 50.0}], ids=["", "softcap"])
def test_a_mask_of_any_dtype_under_autocast(dtype: torch.dtype, more: dict[str, Any], path: str) -> None:
    x, mask = torch.randn(1, 2, 7, 8), torch.randn(7, 7).to(dtype)
    mask[0, 3], mask[2] = -math.inf, torch.finfo(dtype).min
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x, x, x, mask, **more)
    assert found.dtype == torch.bfloat16
    theirs, exact = (formula(*(x.bfloat16().to(d),) * 3, mask, **more).output for d in (torch.bfloat16, torch.float64))
    if dtype != torch.float16:  # whose least number leaves float32 scores some digits
        exact[:, :, 2] = x.bfloat16().double().mean(2)
    assert_as_exact_as_torch(found, theirs, exact)


# Numbers of other types

NUMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "NumPy scalars": (
        {"dropout_p": numpy.float32(0.0), "is_causal": numpy.bool_(True), "scale": numpy.float64(0.3)},
        {"is_causal": True, "scale": 0.3},
    ),
    "tensors": ({"dropout_p": torch.tensor(0.0), "scale": torch.tensor(0.25)}, {"scale": 0.25}),
    "a whole tensor": ({"scale": torch.tensor(2)}, {"scale": 2.0}),
    "a window": ({"window": (numpy.int64(2), torch.tensor(1))}, {"window": (2, 1)}),
    "a list": ({"window": [numpy.int32(2), None]}, {"window": (2, None)}),
    "a cap": ({"softcap": numpy.float32(2.0), "deterministic": numpy.bool_(True)}, {"softcap": 2.0}),
    "a cap as a tensor": ({"softcap": torch.tensor(2.0)}, {"softcap": 2.0}),
}


@PATHS
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_other_types(case: str, path: str) -> None:
    given, plain = NUMBERS[case]
    x = torch.randn(2, 2, 7, 8)
    assert torch.equal(attention(x, x, x, **given), attention(x, x, x, **plain))
    kernels.explain(x, x, x, **given)
    starts = torch.tensor([0, 3, 7])
    packed = [x[0].transpose(0, 1)] * 3
    given, plain = ({n: v for n, v in options.items() if n != "deterministic"} for options in (given, plain))
    longest = numpy.int64(4), torch.tensor(4)
    assert torch.equal(varlen(*packed, starts, None, *longest, **given), varlen(*packed, starts, None, 4, 4, **plain))


def test_a_scale_that_learns_is_refused() -> None:
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="scale must be a number"):
        attention(x, x, x, scale=torch.tensor(0.5, requires_grad=True))


# Nothing to do, and what is no tensor


@PATHS
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"softcap": 2.0, "return_lse": True}, {"dropout_p": 0.2}, {"alibi_slopes": True}],
    ids="+".join,
)
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 0, 5, 8), (2, 0, 7, 8)),
        ((0, 2, 5, 8), (0, 2, 7, 8)),
        ((2, 0, 5, 8), (2, 2, 7, 8)),
        ((0, 5, 8), (0, 7, 8)),
        ((2, 2, 0, 8), (2, 2, 7, 8)),
        ((2, 2, 5, 8), (2, 2, 0, 8)),
        ((3, 0, 2, 5, 8), (3, 0, 2, 7, 8)),
    ],
    ids=str,
)
def test_no_heads_rows_or_batch_entries(shapes: Any, options: dict[str, Any], path: str) -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in (shapes[0], shapes[1], shapes[1])]
    slopes = {"alibi_slopes": torch.rand(shapes[0][:-2])} if "alibi_slopes" in options else {}
    found = attention(*leaves, **{**options, **slopes})
    output = found.output if isinstance(found, tuple) else found
    assert torch.equal(output, torch.zeros(shapes[0]))
    for x, grad in zip(leaves, torch.autograd.grad(output.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(x))


@PATHS
@pytest.mark.parametrize(
    "shapes", [((3, 5, 8), (3, 7, 8), (0, 3, 7, 4)), ((2, 3, 5, 8), (3, 7, 8), (0, 1, 3, 7, 4))], ids=str
)
def test_a_batch_of_none_that_the_value_alone_has(shapes: Any, path: str) -> None:
    query, key, value = (torch.randn(shape) for shape in shapes)
    lead = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    assert kernels.scaled_dot_product_attention(query, key, value).shape == (*lead, 5, 4)


@PATHS
def test_a_mask_of_more_dimensions_than_query_and_key(path: str) -> None:
    query, key, value = (torch.randn(shape) for shape in ((1, 1, 5, 8), (1, 7, 8), (3, 2, 7, 4)))
    mask = torch.randn(3, 2, 5, 7)
    found = kernels.scaled_dot_product_attention(query, key, value, mask)
    full = query.expand(3, 2, 5, 8).double(), key.expand(3, 2, 7, 8).double(), value.double()
    close(found, formula(*full, attn_mask=mask)[0])


@PATHS
def test_no_packed_sequences_have_a_graph(path: str) -> None:
    leaves = [torch.randn(0, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    output = varlen(*leaves, torch.tensor([0]), None, 0, 0, enable_gqa=True)
    assert output.shape == (0, 4, 8)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(output.sum(), leaves), leaves))


WRONG: dict[str, Any] = {"None": None, "a list": [[1.0, 2.0]], "True": True, "an array": numpy.zeros((1, 2, 3, 4))}
Q, STARTS = torch.zeros(1, 2, 3, 4), torch.tensor([0, 3])
PLACES: dict[str, Callable[[Any], Any]] = {
    "query": lambda x: kernels.scaled_dot_product_attention(x, Q, Q),
    "key": lambda x: kernels.scaled_dot_product_attention(Q, x, Q),
    "value": lambda x: attention(Q, Q, x, is_causal=True),
    "attn_mask": lambda x: attention(Q, Q, Q, x),
    "alibi_slopes": lambda x: attention(Q, Q, Q, alibi_slopes=x),
    "sinks": lambda x: attention(Q, Q, Q, sinks=x),
    "key_lengths": lambda x: attention(Q, Q, Q, key_lengths=x),
    "query of explain": lambda x: kernels.explain(x, Q, Q),
    "query of varlen": lambda x: varlen(x, Q[0], Q[0], STARTS, None, 3, 3),
    "value of varlen": lambda x: varlen(Q[0].mT, Q[0].mT, x, STARTS, None, 3, 3),
    "cu_seq_q": lambda x: varlen(Q[0], Q[0], Q[0], x, STARTS, 3, 3),
    "cu_seq_k": lambda x: varlen(Q[0], Q[0], Q[0], STARTS, x, 3, 3),
}
MAY_BE_NONE = ("attn_mask", "alibi_slopes", "sinks", "key_lengths", "cu_seq_k")


@PATHS
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_tensor_is_refused_in_one_line(place: str, what: str, path: str) -> None:
    if what == "None" and place in MAY_BE_NONE:
        pytest.skip("may be None")
    found = type(WRONG[what]).__name__
    with pytest.raises(TypeError, match=f"^{place.split()[0]} must be a tensor, found {found}; ") as caught:
        PLACES[place](WRONG[what])
    assert "\n" not in str(caught.value)


@PATHS
@pytest.mark.parametrize("what", ["None", "a list", "True", "an array"])
@pytest.mark.parametrize("name", ["dropout_p", "scale", "window", "softcap", "deterministic", "backend", "max_q"])
def test_what_is_no_number_is_refused_in_one_short_line(name: str, what: str, path: str) -> None:
    x = WRONG[what]
    if x is None and name in ("scale", "window", "softcap", "deterministic") or (x is True and name != "max_q"):
        pytest.skip("may be so")
    with pytest.raises((TypeError, ValueError), match=name) as caught:
        if name == "max_q":
            varlen(Q[0], Q[0], Q[0], torch.tensor([0, 2]), None, x, 3)
        else:
            attention(Q, Q, Q, **{name: x})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@PATHS
@pytest.mark.parametrize("name", ["is_causal", "enable_gqa", "causal_alignment"])
@pytest.mark.parametrize("x", [numpy.zeros(3), [True], None, "yes"], ids=str)
def test_what_is_no_flag_is_refused_in_one_line(name: str, x: Any, path: str) -> None:
    for call in (
        lambda **o: kernels.scaled_dot_product_attention(Q, Q, Q, **o),
        lambda **o: varlen(Q[0], Q[0], Q[0], torch.tensor([0, 2]), None, 2, 2, **o),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be") as caught:
            call(**{name: x})
        assert "\n" not in str(caught.value)


@PATHS
@pytest.mark.parametrize("place", ["query", "attn_mask", "query of explain"])
def test_tensors_without_strides_are_refused(place: str, path: str) -> None:
    with pytest.raises(TypeError, match="must be a dense tensor, found the layout torch.sparse_coo; convert it"):
        PLACES[place](torch.eye(4).to_sparse())


@PATHS
@pytest.mark.parametrize("window", [(2**70, 0), (0, 2**63), (-1, None), (1.5, 0), (True, 0), "ab", (1, 2, 3)], ids=str)
def test_windows_that_cannot_be(window: Any, path: str) -> None:
    with pytest.raises(ValueError, match=r"^window must be \(left, right\).* from 0 to 9223372036854775807, or None"):
        attention(Q, Q, Q, window=window)


@pytest.mark.parametrize("n_queries", [1, 6])
@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": "bool"},
        {"attn_mask": "float"},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"softcap": 3.0, "attn_mask": "bool"},
        {"sinks": torch.tensor([0.5, -1.0]), "window": (2, 0), "causal_alignment": "bottom_right"},
        {},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_nan_and_inf_do_without_gradients_what_they_do_with_them(options: dict[str, Any], n_queries: int) -> None:
    """On a CPU they are looked for in the output where no gradient is wanted, in the inputs elsewhere."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 2, n_queries, 8), (2, 1, 7, 8), (2, 1, 7, 8))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    mask = torch.rand(n_queries, 7, generator=generator) < 0.5
    mask[:, 3] = False
    if "attn_mask" in options:
        masks = {"bool": mask, "float": torch.zeros(mask.shape).masked_fill(~mask, -math.inf)}
        options = {**options, "attn_mask": masks[options["attn_mask"]]}
    attend = functools.partial(kernels.scaled_dot_product_attention, enable_gqa=True, backend="torch", **options)
    outcomes = set()
    for tensor, place in itertools.product(range(3), (0, 3, 6)):
        for bad in math.nan, math.inf, -math.inf:
            inputs = [x.clone() for x in drawn]
            inputs[tensor][1, 0, min(place, inputs[tensor].shape[2] - 1), 2] = bad
            with_gradients = attend(*(x.clone().requires_grad_() for x in inputs)).detach()
            without = attend(*inputs)
            torch.testing.assert_close(without, with_gradients, equal_nan=True)
            outcomes.add(bool(without.isfinite().all()))
    assert outcomes >= ({True, False} if "attn_mask" in options else {False})


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": torch.zeros(1)}], ids=str)
def test_an_infinite_key_that_is_seen_shows_though_it_weighs_nothing(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """Its score is -inf and the output finite, so that nothing but the key tells."""
    query, key, value = torch.ones(1, 1, 1, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    key[0, 0, 1, 2] = -math.inf
    mask = torch.tensor([True, True, True, False, True]).view(shape)
    assert torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).isfinite().all()
    found = kernels.scaled_dot_product_attention(query, key, value, mask, backend="torch", **options)
    assert found.isnan().all()
    hidden = kernels.scaled_dot_product_attention(
        query, key, value, mask & ~mask.new_tensor([0, 1, 0, 0, 0]), **options
    )
    assert hidden.isfinite().all()
