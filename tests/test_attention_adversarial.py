"""Attention where mistakes hide: random shapes, masks and layouts at once, and corners one would not write down."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention.plan import forced
from kernels.attention.tiles import Tile
from tests.conformance.judge import LEARNED, judge, make, same_bits, solve
from tests.tolerances import GRADIENT, assert_as_exact_as_torch

triton_attention = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
torch_attention = functools.partial(kernels.scaled_dot_product_attention, backend="torch")
problem = functools.partial(make, learned=LEARNED)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True, params=["general", "short"])
def kernel(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    """The kernel for any shape alone, or that for short sequences where it takes the call.

    The former in the interpreter with the smallest tiles, of two sides; on a GPU with those of the launcher.
    """
    tile, chip = (Tile(16, 32, 4, 1), 90) if device == "cpu" else (None, None)
    with forced("general" if request.param == "general" else None, tile, chip):
        yield


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers (except "expanded": those of the first head) at other strides."""
    if layout == "heads last":
        return x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    if layout == "strided":
        return x.mT.contiguous().mT
    if layout == "padded":
        return torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1 : 1 + x.shape[2], 1 : 1 + x.shape[3]]
    if layout == "expanded":
        return x[:1, :1].expand(x.shape)
    return x


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """One call: sizes, a mask broadcast anyhow, layouts."""
    b, hkv, group = (draw(st.integers(1, 2)) for _ in range(3))
    length = st.one_of(st.integers(1, 3), st.sampled_from([15, 16, 17, 31, 32, 33]))  # the sides of the tiles
    width = st.sampled_from([1, 2, 7, 16, 17, 24])
    sizes = (b, hkv * group, hkv, draw(length), draw(length), draw(width), draw(width))
    full = (b, hkv * group, sizes[3], sizes[4])
    axes = draw(st.integers(0, 4))
    return {
        "sizes": sizes,
        "mask": draw(st.sampled_from(["none", "bool", "float", "least"])),
        "mask_shape": tuple(draw(st.sampled_from([1, size])) for size in full[4 - axes :]),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.0, -0.7, 3.0])),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4)),
        "seed": draw(st.integers(0, 1000)),
    }


LAYOUTS = ["transposed", "heads last", "strided", "padded", "expanded"]


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking a failure would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=calls())
def test_any_call(call: dict, device: str) -> None:
    torch.manual_seed(call["seed"])
    shape = call["mask_shape"]
    masks = {
        "none": None,
        "bool": torch.rand(shape) < 0.6,
        "float": torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -math.inf),
        "least": torch.randn(shape).masked_fill(torch.rand(shape) < 0.5, torch.finfo(torch.float32).min),
    }
    p = problem(
        call["sizes"], device=device, attn_mask=masks[call["mask"]], is_causal=call["is_causal"], scale=call["scale"]
    )
    laid_out = {
        name: lay_out(getattr(p, name), layout)
        for name, layout in zip(("query", "key", "value", "grad"), call["layouts"])
    }
    judge(triton_attention, p.replace(**laid_out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_numbers_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """Scores in the thousands and gradients of weights beyond what float16 could square.

    In whole numbers, of which the largest is often there twice: rounding must not decide who is ahead.
    """
    p = problem((1, 2, 1, 33, 47, 24, 24), dtype, device, is_causal=True)
    larger = {"query": p.query.round() * 16, "key": p.key.round() * 16, "value": p.value * 30, "grad": p.grad * 10}
    judge(triton_attention, p.replace(**larger))


@pytest.mark.parametrize("shape", [(1, 1), (47,), (33, 1), (2, 1, 33, 1), (1, 2, 1, 47), (33, 47)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["mask", "mask+causal"])
def test_least_numbers_everywhere_and_causal(shape: tuple, is_causal: bool, device: str) -> None:
    """A mask of finfo.min alone changes nothing, whatever it is broadcast along."""
    p = problem((2, 2, 2, 33, 47, 16, 8), device=device, is_causal=is_causal)
    least = torch.full(shape, torch.finfo(torch.float32).min, device=device)
    output = triton_attention(p.query, p.key, p.value, least, is_causal=is_causal)
    zeros = torch.zeros_like(p.query)
    torch.testing.assert_close(output, triton_attention(zeros, p.key, p.value, is_causal=is_causal))


@pytest.mark.parametrize("n_queries", [1, 16, 33])
@pytest.mark.parametrize("n_keys", [1, 33])
def test_causal_is_a_lower_triangle(n_queries: int, n_keys: int, device: str) -> None:
    """As a flag, as a bool mask, as a float mask: one meaning, also where L and S differ."""
    p = problem((1, 2, 1, n_queries, n_keys, 16, 8), device=device)
    lower = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril()
    bias = torch.zeros(lower.shape, device=device).masked_fill(~lower, -math.inf)
    results = []
    for mask, is_causal in [(None, True), (lower, False), (bias, False), (lower, True)]:
        call = p.replace(attn_mask=mask, is_causal=is_causal, learned=("query", "key", "value"))
        results.append(solve(call, triton_attention))
    for other in results[1:]:
        for name, x in other.items():
            torch.testing.assert_close(x, results[0][name])


def test_a_result_does_not_depend_on_the_batch_it_is_in(device: str) -> None:
    p = problem((3, 4, 2, 33, 47, 16, 8), device=device, is_causal=True)
    alone = p.replace(**{name: getattr(p, name)[1:2] for name in ("query", "key", "value", "grad")})
    among = {name: x[1:2] for name, x in solve(p, triton_attention).items()}
    same_bits(solve(alone, triton_attention), among, "alone and among others")


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_an_expanded_upstream_gradient(masked: bool, device: str) -> None:
    """As `sum().backward()` and `mean(2)` send it: strides of 0. To a GPU that is other code, of other rounding."""
    mask = torch.randn(1, 2, 17, 1) if masked else None
    p = problem((1, 2, 1, 17, 33, 16, 8), device=device, attn_mask=mask)
    for grad in (torch.ones((), device=device), p.grad[:, :, :1], p.grad[..., :1]):
        expanded = grad.expand(p.grad.shape)
        assert 0 in expanded.stride()
        if device == "cuda":
            judge(triton_attention, p.replace(grad=expanded))
            continue
        found, expected = (solve(p.replace(grad=sent), triton_attention) for sent in (expanded, expanded.contiguous()))
        same_bits(found, expected, "expanded and contiguous")


@pytest.mark.parametrize("tile", [(16, 16), (64, 16), (16, 64)], ids=str)
def test_dropout_draws_the_same_in_every_tile_size(tile: tuple[int, int], device: str) -> None:
    options = {"attn_mask": torch.randn(2, 1, 47), "is_causal": True, "dropout_p": 0.4}
    p = problem((1, 2, 1, 33, 47, 16, 8), device=device, **options)
    results = []
    for own in (None, Tile(*tile, 4, 1)):
        torch.manual_seed(7)
        with forced(tile=own):
            results.append(solve(p, triton_attention))
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name])


def test_dropout_is_independent_between_heads_batches_and_positions(device: str) -> None:
    batch, heads, n = 3, 4, 64
    zeros = torch.zeros(batch, heads, n, 8, device=device)
    unit = torch.eye(n, device=device).expand(batch, heads, n, n)
    signs = (triton_attention(zeros, zeros, unit, dropout_p=0.5) != 0).flatten(0, 1).double() * 2 - 1
    between = torch.einsum("aij,bij->ab", signs, signs).fill_diagonal_(0) / n
    assert between.abs().max() < 4.5, "heads or batch entries share draws"  # 66 pairs, in standard deviations
    for shift, axis in [(1, 1), (1, 2), (16, 1), (32, 2)]:
        together = (signs * signs.roll(shift, axis)).mean() * math.sqrt(signs.numel())
        assert together.abs() < 4.5, f"positions {shift} apart along axis {axis} share draws"
    mirrored = (signs * signs.mT).triu(1).sum() / math.sqrt(batch * heads * n * (n - 1) / 2)
    assert mirrored.abs() < 4.5, "queries and keys are mixed up"


@pytest.mark.parametrize("dropout_p", [1e-12, 1.0])
def test_the_ends_of_dropout(dropout_p: float, device: str) -> None:
    p = problem((1, 2, 2, 17, 33, 16, 8), device=device, attn_mask=torch.randn(17, 33))
    found, whole = (solve(call, triton_attention) for call in (p.replace(dropout_p=dropout_p), p))
    for name, x in whole.items():
        torch.testing.assert_close(found[name], x if dropout_p < 1 else torch.zeros_like(x))


@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 7), (5, 0), (0, 0)])
@pytest.mark.parametrize("shape", ["1111", "11L1", "111S", "BHLS", "B11S"])
def test_no_queries_or_no_keys_with_a_mask(n_queries: int, n_keys: int, shape: str, device: str) -> None:
    sizes = {"1": 1, "B": 2, "H": 3, "L": n_queries, "S": n_keys}
    mask = torch.randn([sizes[axis] for axis in shape])
    p = problem((2, 3, 3, n_queries, n_keys, 8, 4), device=device, is_causal=True, attn_mask=mask)
    for x in solve(p, triton_attention).values():
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("mask", [(2, 1, 1, 9, 11), (3, 1, 9, 1), (1, 3, 1, 1, 11), (2, 3, 4, 9, 11)], ids=str)
def test_five_dimensions_with_a_mask_that_learns(mask: tuple, device: str) -> None:
    sizes = [(2, 3, 4, 9, 8), (1, 3, 2, 11, 8), (2, 1, 2, 11, 5)]
    results = []
    for attention in (triton_attention, torch_attention):
        torch.manual_seed(3)
        inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in (*sizes, mask)]
        if attention is torch_attention:  # PyTorch's own wants the mask's axes in full
            output = attention(*inputs[:3], inputs[3].expand(2, 3, 4, 9, 11), is_causal=True, enable_gqa=True)
        else:
            output = attention(*inputs, is_causal=True, enable_gqa=True)
        results.append((output, *torch.autograd.grad(output, inputs, torch.randn(output.shape).to(device))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
@pytest.mark.parametrize("n_queries", [1, 32, 33])
def test_a_key_nobody_sees_gets_no_gradient(kind: str, n_queries: int, device: str) -> None:
    """Not even where it is NaN or Inf and the last query tile is not full."""
    bad = [35, 40]
    p = problem((1, 2, 1, n_queries, 47, 16, 8), device=device)
    mask = torch.ones(1, 47, dtype=torch.bool, device=device)
    mask[:, bad] = False
    if kind == "float":
        mask = torch.zeros(1, 47, device=device).masked_fill(~mask, -math.inf)
    p = p.replace(attn_mask=None if kind == "causal" else mask, is_causal=kind == "causal", learned=LEARNED)
    results = []
    for fill in (None, math.nan, math.inf):
        key, value = p.key.clone(), p.value.clone()
        for x in (key, value):
            if fill is not None:
                x[:, :, bad] = fill
        found = solve(p.replace(key=key, value=value), triton_attention)
        results.append(found)
        assert not found["gradient of key"][:, :, bad].any() and not found["gradient of value"][:, :, bad].any()
    for other in results[1:]:
        for name, x in other.items():
            torch.testing.assert_close(x, results[0][name])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("how", ["all one tensor", "query from key", "value from mask"])
def test_inputs_that_depend_on_each_other(how: str, create_graph: bool, device: str) -> None:
    numbers = torch.randn(1, 4, 11, 8, device=device) / 3  # or every query would see itself alone
    results = []
    single, double = torch.float32, torch.float64
    for attention, dtype in (triton_attention, single), (torch_attention, single), (torch_attention, double):
        x = numbers.to(dtype, copy=True).requires_grad_()
        key, mask = x * 1, None
        query, value = (key * 2, key) if how == "query from key" else (key, key)
        if how == "value from mask":
            mask = x[..., :1] * 2
            value = mask.expand(1, 4, 11, 8) * 3
        output = attention(query, key, value, mask)
        results.append(torch.autograd.grad(output.square().sum(), x, create_graph=create_graph)[0].detach())
    assert_as_exact_as_torch(*results, GRADIENT)
