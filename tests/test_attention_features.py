"""What attention knows beyond PyTorch's: places, windows, soft cap, slopes, sinks, lengths, packs, log-sum-exp.

Each call of the Triton kernels is held to the formula in float64, within the formula's own error at the same dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention.plan import forced
from kernels.attention.tiles import Tile
from tests.conformance.formula import attention as formula
from tests.conformance.judge import LEARNED, judge, make

attention = functools.partial(kernels.scaled_dot_product_attention, enable_gqa=True, backend="triton")
judged = functools.partial(make, results=("output", "lse", "weights"), learned=LEARNED)


@pytest.fixture(autouse=True)
def small_tiles(device: str) -> Iterator[None]:
    """In the interpreter, tiles so small that short sequences already cross several; on a GPU, the real ones.

    The kernels for short sequences, which keep no log-sum-exp, are left out: tests/test_short.py.
    """
    with forced(kernel="general", tile=Tile(16, 16, 4, 1) if device == "cpu" else None):
        yield


@pytest.fixture
def interpreted(device: str) -> None:
    """For what only the interpreter shows."""
    if device != "cpu":
        pytest.skip("looks into the interpreter")


SIZES = (2, 2, 1, 37, 43, 12, 20)
FEATURES: dict[str, dict[str, Any]] = {
    "bottom_right": {"causal_alignment": "bottom_right", "is_causal": True},
    "window": {"window": (5, 3)},
    "left window": {"window": (20, None)},
    "right window": {"window": (None, 2)},
    "causal window": {"window": (9, 30), "is_causal": True},
    "window at the bottom right": {"window": (3, 0), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 1.5},
    "slopes": {"alibi_slopes": lambda: torch.rand(2)},
    "slopes by batch entry": {"alibi_slopes": lambda: torch.rand(2, 2), "causal_alignment": "bottom_right"},
    "sinks": {"sinks": lambda: torch.randn(2)},
    "key_lengths": {"key_lengths": lambda: torch.tensor([11, 43])},
    "no keys in use": {"key_lengths": lambda: torch.tensor([0, 17]), "sinks": lambda: torch.randn(2)},
    "lengths at the bottom right": {
        "key_lengths": lambda: torch.tensor([29, 40]),
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "all": {
        "attn_mask": lambda: torch.randn(2, 37, 43),
        "is_causal": True,
        "window": (20, None),
        "softcap": 3.0,
        "alibi_slopes": lambda: torch.rand(2),
        "sinks": lambda: torch.randn(2),
        "causal_alignment": "bottom_right",
        "key_lengths": lambda: torch.tensor([43, 31]),
        "learned": ("query", "key", "value", "attn_mask", "sinks"),  # slopes that learn are a mask to the kernels
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float16 and device == "cpu":
        pytest.skip("in the interpreter bfloat16 stands for it")
    judge(attention, judged(SIZES, dtype, device, **FEATURES[feature]))


@pytest.mark.slow
@pytest.mark.timeout(240)  # on a GPU it compiles eighty kernels
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_combination_means_what_its_parts_mean(device: str, data: st.DataObject) -> None:
    def some(name: str, *values: object) -> object:
        return data.draw(st.sampled_from(values), name)

    torch.manual_seed(data.draw(st.integers(0, 10_000), "seed"))
    hkv, group = some("hkv", 1, 2), some("group", 1, 2)
    sizes = (some("b", 1, 2), hkv * group, hkv, some("l", 1, 5, 17, 35), some("s", 1, 7, 23, 40), some("e", 3, 8), 5)
    batch, heads, _, n_queries, n_keys = sizes[:5]
    mask_shape = [some("mask", 1, full) for full in (batch, heads, n_queries, n_keys)]
    mask = torch.randn(mask_shape)
    arguments = {
        "attn_mask": some("kind", None, mask, mask < 0.5, mask.masked_fill(mask > 1.0, -math.inf)),
        "is_causal": some("is_causal", False, True),
        "causal_alignment": some("causal_alignment", "top_left", "bottom_right"),
        "window": some("window", (None, None), (0, 0), (3, None), (None, 2), (20, 11)),
        "softcap": some("softcap", None, 0.7),
        "alibi_slopes": some("slopes", None, torch.rand(heads), torch.rand(batch, heads)),
        "sinks": some("sinks", None, torch.randn(heads)),
        "key_lengths": some("key_lengths", None, torch.randint(0, n_keys + 1, (batch,))),
    }
    judge(attention, judged(sizes, device=device, **arguments))


@pytest.mark.parametrize("sizes", [(1, 2, 1, 19, 21, 300, 12), (1, 1, 1, 17, 18, 8, 270), (1, 1, 1, 5, 7, 513, 600)])
def test_heads_wider_than_a_tile(sizes: tuple[int, ...], device: str) -> None:
    judge(attention, judged(sizes, device=device, is_causal=True, attn_mask=torch.randn(sizes[3:5]), softcap=5.0))


@pytest.mark.parametrize("e", [1, 2048])
def test_narrowest_and_widest_heads(e: int, device: str) -> None:
    judge(attention, judged((1, 1, 1, 3, 5, e, e), device=device))


def test_dropout_replays_with_every_feature(device: str) -> None:
    """With the value the identity, the output is the dropped weights: each is 0 or its weight over 1 - p."""
    options = {**FEATURES["all"], "attn_mask": None, "key_lengths": torch.tensor([19, 13])}
    call = make((2, 2, 1, 17, 19, 8, 19), device=device, **options, dropout_p=0.3)
    value = torch.eye(19, device=device).expand(2, 1, 19, 19).contiguous().requires_grad_()
    results = {"return_lse": True, "need_weights": True}
    output, _, weights = call.run(attention, {**call.given(), "value": value}, **results)
    kept = output != 0.0
    torch.testing.assert_close(output, torch.where(kept, weights / 0.7, 0.0))
    assert 0.05 < (weights != 0.0)[~kept].sum() / (weights != 0.0).sum() < 0.6
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, value, upstream)
    expected = (output.detach().mT @ upstream).unflatten(1, (1, 2)).sum(2)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [2**31 - 1, 2**40])
def test_a_window_wider_than_any_sequence_is_none(side: int, device: str) -> None:
    inputs = make((1, 2, 2, 37, 43, 8, 8), device=device).inputs
    for window, options in (((side, side), {}), ((side, None), {}), ((side, 0), {"is_causal": True})):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output, expected = attention(*leaves, window=window), attention(*leaves, **options)
        upstream = torch.randn_like(output)
        for ours, right in zip(*([x, *torch.autograd.grad(x, leaves, upstream)] for x in (output, expected))):
            torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("is_short", [False, True], ids=["general", "short"])
def test_a_soft_cap_does_not_overflow_float16(is_short: bool, device: str) -> None:
    """Gradients as loss scaling makes them: dS is rounded to 16 bits, and must not be multiplied by the cap before."""
    leaves = [x.requires_grad_() for x in make((1, 2, 2, 11, 9, 16, 16), torch.float16, device).inputs]
    with forced(kernel="short" if is_short else "general"):
        output = attention(*leaves, softcap=50.0)
        gradients = torch.autograd.grad(output, leaves, torch.full_like(output, 500.0).mul_(torch.randn_like(output)))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_result_is_a_tensor_until_more_is_asked_for(device: str) -> None:
    q, k, v = make((1, 2, 2, 5, 7, 8, 8), device=device).inputs
    plain = attention(q, k, v)
    assert isinstance(plain, torch.Tensor)
    result = attention(q, k, v, return_lse=True)
    assert isinstance(result, kernels.AttentionResult) and result.weights is None and result.lse.shape == (1, 2, 5)
    assert torch.equal(result.output, plain)
    result = attention(q[0], k[0], v[0], need_weights=True)
    assert result.lse is None and result.weights.shape == (2, 5, 7)
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 5, device=device))


def test_keys_out_of_sight_are_never_read(device: str) -> None:
    """NaN beyond a window and beyond the keys in use reaches neither output nor gradient."""
    q, k, v = make((2, 2, 2, 40, 64, 8, 8), device=device).inputs
    lengths = torch.tensor([30, 45], device=device)
    options = {"key_lengths": lengths, "window": (8, 0), "causal_alignment": "top_left"}
    results = []
    for junk in (0.0, math.nan):
        spoiled = [x.clone() for x in (k, v)]
        for x in spoiled:
            x[:, :, 45:] = junk
            x[0, :, 30:] = junk
        leaves = [x.requires_grad_() for x in (q.detach().clone(), *spoiled)]
        output = attention(*leaves, **options)
        results.append((output, *torch.autograd.grad(output, leaves, torch.ones_like(output))))
    for clean, spoiled in zip(*results):
        assert torch.equal(clean, spoiled)


@pytest.mark.usefixtures("interpreted")
def test_rows_without_keys_have_no_gradient_whatever_tiles_they_share() -> None:
    """A sink of -inf, forward tiles without any key, and backward tiles that hold their queries beside others."""
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for n in (64, 16, 16))
    options = {"is_causal": True, "causal_alignment": "bottom_right", "sinks": torch.tensor([-math.inf])}
    output = attention(q, k, v, **options)
    alone = attention(q[:, :, 48:], k, v, is_causal=True)
    upstream = torch.randn_like(output)
    with forced(tile=Tile(64, 16, 4, 1)):
        found = torch.autograd.grad(output, (q, k, v), upstream)
        expected = torch.autograd.grad(alone, (q, k, v), upstream[:, :, 48:])
    for ours, right in zip((output[:, :, 48:], *found), (alone, *expected)):
        torch.testing.assert_close(ours, right)


# Visits of tiles


def visits(monkeypatch: pytest.MonkeyPatch, n_queries: int, n_keys: int, **options: Any) -> int:
    """How many key tiles of 16 the forward of one head reads, in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = 0
    create_dot = InterpreterBuilder.create_dot

    def counted(self: object, *args: object) -> object:
        nonlocal count
        count += 1
        return create_dot(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counted)
        attention(*(torch.randn(1, 1, n, 8) for n in (n_queries, n_keys, n_keys)), **options)
    assert count % 2 == 0, "two products a tile"
    return count // 2


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 8 * 8),
        ({"is_causal": True}, 8 * 9 // 2),
        ({"window": (16, 0)}, 1 + 7 * 2),  # a tile of queries reaches into the tile before its own
        ({"window": (17, 0)}, 1 + 2 + 6 * 3),
        ({"window": (0, 0)}, 8),
        ({"window": (None, 16)}, 8 * 9 // 2 + 7),
        ({"key_lengths": torch.tensor([33])}, 8 * 3),
        ({"key_lengths": torch.tensor([0])}, 0),
        ({"is_causal": True, "key_lengths": torch.tensor([40])}, 1 + 2 + 6 * 3),
        ({"attn_mask": torch.ones(128, 128, dtype=torch.bool), "is_causal": True}, 8 * 9 // 2),
    ],
    ids=str,
)
def test_only_the_tiles_in_sight_are_visited(
    options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visits(monkeypatch, 128, 128, **options) == expected


@pytest.mark.usefixtures("interpreted")
def test_bottom_right_skips_what_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    assert visits(monkeypatch, 16, 128, **options) == 8
    assert visits(monkeypatch, 128, 16, **options) == 1, "only the last tile of queries sees a key"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", [(37, 41), (40, 33), (64, 48), (5, 80)], ids=str)
def test_no_entry_past_the_end_of_a_mask_is_read(
    sizes: tuple[int, int], is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor before its beginning, forward and backward: where a byte is read, it is the mask's."""
    from triton.runtime.interpreter import InterpreterBuilder

    mask, load = torch.rand(sizes) < 0.7, InterpreterBuilder.create_masked_load
    read = set()

    def watched(self: object, pointers: Any, inside: Any, *rest: object) -> object:
        if pointers.get_element_ty().primitive_bitwidth == 8:
            read.update((pointers.data[inside.data].astype("int64") - mask.data_ptr()).tolist())
        return load(self, pointers, inside, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    leaves = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (sizes[0], sizes[1], sizes[1])]
    output = attention(*leaves, attn_mask=mask, is_causal=is_causal)
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert read <= set(range(mask.numel())) and (is_causal or len(read) == mask.numel())


# Packed sequences

LENGTHS = [((5, 0, 17, 33), (7, 3, 0, 20)), ((1,), (1,)), ((0, 0), (0, 0)), ((16, 16), (16, 16))]


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "feature",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"window": (3, 4)},
        {"softcap": 2.0, "sinks": lambda: torch.randn(4), "alibi_slopes": lambda: torch.rand(4)},
    ],
    ids=lambda f: "+".join(f) or "plain",
)
def test_packed_sequences_are_those_by_themselves(feature: dict, lengths: tuple, path: str, device: str) -> None:
    options = {name: x().to(device) if callable(x) else x for name, x in feature.items()}
    totals = [sum(n) for n in lengths]
    shapes = [(totals[0], 4, 8), (totals[1], 2, 8), (totals[1], 2, 6)]
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    starts = [torch.tensor([0, *itertools.accumulate(n)], device=device) for n in lengths]
    longest = [max(n) for n in lengths]
    output, lse, _ = kernels.varlen_attention(
        *leaves, *starts, *longest, enable_gqa=True, return_lse=True, backend=path, **options
    )
    assert output.shape == (totals[0], 4, 6) and lse.shape == (totals[0], 4)
    parts = zip(*(x.double().split(n) for x, n in zip(leaves, (lengths[0], lengths[1], lengths[1]))))
    parts = [[x.transpose(0, 1)[None] for x in part] for part in parts]
    expected = torch.cat([formula(*part, **options).output[0].transpose(0, 1) for part in parts])
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(output)
    ours = torch.autograd.grad(output, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_starts_that_do_not_fit_are_refused() -> None:
    q = torch.randn(10, 2, 8)
    for starts, longest, message in (
        ([0, 4, 9], 6, "from 0 to the 10 rows"),
        ([1, 10], 9, "from 0"),
        ([0, 10], 9, "at most max_q = 9"),
        ([0, 6, 4, 10], 9, "in steps"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.varlen_attention(q, q, q, torch.tensor(starts), None, longest, longest)
    with pytest.raises(TypeError, match="cu_seq_q must be"):
        kernels.varlen_attention(q, q, q, torch.tensor([0.0, 10.0]), None, 10, 10)
    with pytest.raises(ValueError, match="packed"):
        kernels.varlen_attention(q[None], q[None], q[None], torch.tensor([0, 10]), None, 10, 10)


# Errors

BAD = {
    "an unknown alignment": ({"causal_alignment": "left"}, ValueError, "'top_left' or 'bottom_right', found 'left'"),
    "a window of one number": ({"window": 5}, ValueError, r"window must be \(left, right\)"),
    "a negative window": ({"window": (-1, 0)}, ValueError, "from 0 to [0-9]+, or None"),
    "a cap of zero": ({"softcap": 0.0}, ValueError, "softcap must be a positive number"),
    "slopes for other heads": ({"alibi_slopes": torch.rand(3)}, ValueError, r"must have the shape \(2, 4\)"),
    "whole slopes": ({"alibi_slopes": torch.ones(4, dtype=torch.int64)}, TypeError, "floating point"),
    "sinks that broadcast": ({"sinks": torch.rand(1)}, ValueError, r"sinks must have the shape \(4,\)"),
    "lengths as floats": ({"key_lengths": torch.ones(2)}, TypeError, "int32 or int64"),
    "lengths as a list": ({"key_lengths": [1, 2]}, TypeError, "must be a tensor"),
    "a length too many": ({"key_lengths": torch.tensor([3, 8])}, ValueError, "from 0 to the 7 keys"),
    "lengths a head": ({"key_lengths": torch.ones(2, 4, dtype=torch.int32)}, ValueError, r"\(2,\)"),
    "a deterministic string": ({"deterministic": "yes"}, ValueError, "True, False or None"),
}


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("case", BAD)
def test_errors_say_rule_and_finding_in_one_line(case: str, path: str, device: str) -> None:
    options, error, message = BAD[case]
    if case == "a length too many" and device == "cuda":
        pytest.skip("lengths on a GPU are not looked at, which would wait for it")
    call = make((2, 4, 4, 5, 7, 8, 8), device=device, **options)
    q, k, v, options = *call.inputs, call.options
    with pytest.raises(error, match=message) as caught:
        kernels.scaled_dot_product_attention(q, k, v, backend=path, **options)
    assert "\n" not in str(caught.value)


# vmap and higher derivatives


def test_vmap_gives_what_a_loop_gives(device: str) -> None:
    q, k, v = (torch.randn(3, 2, 4, 7, 8, device=device) for _ in range(3))
    sinks, mask = torch.randn(3, 4, device=device), torch.randn(3, 7, 7, device=device)

    def solve(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, m, sinks=s, is_causal=True).square().sum()

    by_example = torch.func.grad_and_value(solve, argnums=(0, 1, 2, 3, 4))
    dims = (0, None, 0, 0, None)
    grads, values = torch.vmap(by_example, dims)(q, k[0], v, sinks, mask[0])
    for i in range(3):
        expected, value = by_example(q[i], k[0], v[i], sinks[i], mask[0])
        torch.testing.assert_close(values[i], value)
        for a, b in zip(grads, expected):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_vmap_of_dropout_draws_for_each_or_refuses(device: str) -> None:
    q = torch.randn(2, 1, 1, 9, 16, device=device)
    solve = functools.partial(attention, dropout_p=0.5)
    output = torch.vmap(solve, randomness="different")(q[:1].expand(2, 1, 1, 9, 16), q, q)
    assert output.shape == q.shape
    with pytest.raises(NotImplementedError, match='randomness="different"'):
        torch.vmap(solve, randomness="same")(q, q, q)


def test_double_backward_with_every_feature(device: str) -> None:
    """The gradient's gradient against the formula's, through output and log-sum-exp."""
    call = judged(SIZES, device=device, **FEATURES["all"], results=("output", "lse"))
    results = []
    for dtype in (torch.float32, torch.float64):
        arguments = call.tensors(dtype)
        if dtype == torch.float32:
            output, lse, _ = call.run(attention, arguments, return_lse=True)
        else:
            output, lse, _ = formula(**arguments, is_causal=True)
        leaves = [arguments[name] for name in call.learned]
        upstream = call.grad.to(dtype), call.grad_lse.to(dtype)
        grads = torch.autograd.grad((output, lse), leaves, upstream, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3)
