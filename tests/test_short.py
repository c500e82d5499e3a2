"""The Triton kernels for short sequences: every length, packing, features, and who takes which call.

tests/test_attention.py and tests/test_attention_adversarial.py run their checks on these kernels too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention import plan, tiles
from kernels.attention.call import Call
from kernels.attention.explanation import NAMES
from kernels.attention.plan import forced
from tests.conformance.formula import attention as formula
from tests.conformance.judge import judge, make, solve
from tests.test_attention_features import FEATURES

attention = functools.partial(kernels.scaled_dot_product_attention, enable_gqa=True, backend="triton")
pytestmark = pytest.mark.usefixtures("poisoned", "short_only")
SHORT, HOPPER = (NAMES[name] for name in ("short", "hopper"))


@pytest.fixture
def short_only() -> Iterator[None]:
    """No call of this file may quietly go to the kernel for any shape. In the interpreter as on a Hopper chip."""
    with forced(kernel="short", capability=None if torch.cuda.is_available() else 90):
        yield


# Lengths and heads


@pytest.mark.parametrize("length", [*range(1, 20), 31, 32, 33, 63, 64])
def test_every_length(length: int, device: str) -> None:
    """More sequences than a program takes, and not a multiple; a batch entry ends within a tile."""
    heads = 7 if length < 8 else 3
    judge(attention, make((3, heads, heads, length, length, 16, 16), device=device, is_causal=length % 2 == 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 2, 1, 5, 5, 16, 16),
        (2, 6, 2, 3, 7, 24, 19),
        (1, 1, 1, 1, 64, 128, 128),
        (2, 2, 2, 64, 1, 7, 128),
        (1, 3, 1, 17, 9, 65, 33),
        (3, 4, 4, 8, 16, 32, 1),
        (33, 1, 1, 2, 2, 1, 1),
        (1, 2, 2, 40, 64, 64, 64),
    ],
    ids=lambda s: "B{}-H{}-Hkv{}-L{}-S{}-E{}-Ev{}".format(*s),
)
def test_sizes_and_dtypes(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float32 and tiles.block_of(max(sizes[3:5])) * tiles.block_of(max(sizes[5:])) > 1024:
        pytest.skip("float32 goes that far with narrow heads only")
    judge(attention, make(sizes, dtype, device))


@pytest.mark.parametrize("feature", [name for name in FEATURES if "sinks" not in FEATURES[name]])
@pytest.mark.parametrize("sizes", [(2, 2, 1, 7, 5, 12, 20), (2, 2, 1, 37, 43, 12, 16)], ids=["packed", "alone"])
def test_each_feature(sizes: tuple[int, ...], feature: str, device: str) -> None:
    options = FEATURES[feature]
    if "key_lengths" in options:
        options = {**options, "key_lengths": options["key_lengths"]() % (sizes[4] + 1)}
    judge(attention, make(sizes, device=device, **options))


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_combination_means_what_its_parts_mean(data: st.DataObject) -> None:
    def some(name: str, *values: object) -> Any:
        return data.draw(st.sampled_from(values), name)

    torch.manual_seed(data.draw(st.integers(0, 10_000), "seed"))
    hkv, lengths = some("hkv", 1, 2, 3), (1, 2, 3, 5, 8, 9, 16, 17)
    sizes = (
        some("b", 1, 2, 5),
        hkv * some("group", 1, 2),
        hkv,
        some("l", *lengths),
        some("s", *lengths),
        some("e", 3, 16),
        5,
    )
    batch, heads, _, n_queries, n_keys = sizes[:5]
    mask = torch.randn([some("mask", 1, full) for full in (batch, heads, n_queries, n_keys)])
    options = {
        "attn_mask": some("kind", None, mask, mask < 0.5, mask.masked_fill(mask > 1.0, -math.inf)),
        "is_causal": some("is_causal", False, True),
        "causal_alignment": some("causal_alignment", "top_left", "bottom_right"),
        "window": some("window", (None, None), (0, 0), (3, None), (None, 2)),
        "softcap": some("softcap", None, 0.7),
        "alibi_slopes": some("slopes", None, torch.rand(heads), torch.rand(batch, heads)),
        "key_lengths": some("key_lengths", None, torch.randint(0, n_keys + 1, (batch,))),
    }
    judge(attention, make(sizes, **options))


def test_dropout_drops_the_weights_that_the_general_kernel_drops(device: str) -> None:
    call, results = make((3, 4, 2, 7, 6, 16, 8), device=device, dropout_p=0.4), []
    for kernel in ("short", "general"):
        torch.manual_seed(3)
        with forced(kernel=kernel):
            results.append(solve(call, attention))
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name])
    assert not torch.equal(results[0]["output"], solve(call.replace(dropout_p=0.0), attention)["output"])


def test_more_sequences_than_a_second_grid_axis_holds(device: str) -> None:
    """In the interpreter the programs of the first and last sequences alone; all of them on a GPU."""
    heads = 80_000 if device == "cuda" else 300
    q, k, v = (torch.randn(heads, 1, 5, 16, device=device) for _ in range(3))
    output = attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


# What is not a number


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("length", [5, 12])
def test_nan_and_inf_stay_in_their_sequence(length: int, name: str, bad: float, device: str) -> None:
    """Sequences share tiles; what is wrong with one is no matter of the others."""
    call = make((4, 3, 3, length, length, 16, 16), device=device)
    broken = getattr(call, name).clone()
    broken[1, 1, 2, 3] = bad
    clean, spoiled = solve(call, attention), solve(call.replace(**{name: broken}), attention)
    others = torch.ones(4, 3, dtype=torch.bool)
    others[1, 1] = False
    for what, x in clean.items():
        assert torch.equal(x[others], spoiled[what][others])
    assert any(not x[1, 1].isfinite().all() for x in spoiled.values())


def test_keys_beyond_the_length_are_never_read(device: str) -> None:
    call = make((3, 2, 2, 6, 8, 16, 16), device=device, key_lengths=torch.tensor([8, 3, 0]))
    results = []
    for junk in (0.0, math.nan):
        key, value = call.key.clone(), call.value.clone()
        for x in key, value:
            x[1, :, 3:], x[2] = junk, junk
        results.append(solve(call.replace(key=key, value=value), attention))
    clean, spoiled = results
    for name, x in clean.items():
        assert torch.equal(x, spoiled[name])
    assert not clean["output"][2].any() and not clean["gradient of key"][1, :, 3:].any()


def test_a_kernel_that_mixes_packed_sequences_is_rejected(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from kernels.attention import short

    if device == "cuda":
        pytest.skip("the kernel is changed in the interpreter")
    right = short.short_scores

    def mixed(*args: Any) -> Any:
        return right(*(x._replace(together=x.together == x.together) if hasattr(x, "together") else x for x in args))

    monkeypatch.setattr(short, "short_scores", mixed)
    with pytest.raises(AssertionError):
        judge(attention, make((2, 3, 3, 5, 5, 16, 16)))


# Which call they take


def shaped(*sizes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Query, key and value of sizes L, S, E, Ev."""
    n_queries, n_keys, e, ev = sizes
    return tuple(torch.empty(1, 2, n, width, dtype=dtype) for n, width in ((n_queries, e), (n_keys, e), (n_keys, ev)))


@pytest.mark.parametrize(
    ("sizes", "extras", "statistics", "reason"),
    [
        ((64, 64, 128, 128), {}, "", ""),
        ((1, 1, 1, 1), {}, "", ""),
        ((65, 5, 16, 16), {}, "", "up to 64 queries and keys of 16 16-bit numbers here, found 65 and 5"),
        ((5, 65, 16, 16), {}, "", "up to 64 queries and keys of 16 16-bit numbers here, found 5 and 65"),
        ((5, 5, 16, 129), {}, "", "heads of up to 128, found 129"),
        ((0, 5, 16, 16), {}, "", "nothing to attend to"),
        ((5, 0, 16, 16), {}, "", "nothing to attend to"),
        ((5, 5, 16, 16), {}, "the log-sum-exp", "the log-sum-exp needs statistics"),
        ((5, 5, 16, 16), {"query_starts": torch.zeros(2)}, "", "packed"),
    ],
)
def test_which_calls_are_short(sizes: tuple[int, ...], extras: dict, statistics: str, reason: str) -> None:
    found = plan.why_not_short(*shaped(*sizes, dtype=torch.float16), Call(**extras), statistics, 90)
    assert reason in found and bool(found) == bool(reason)


def test_which_calls_are_short_elsewhere_and_in_float32() -> None:
    def why(*sizes: int, dtype: torch.dtype = torch.bfloat16, chip: int = 80) -> str:
        return plan.why_not_short(*shaped(*sizes, dtype=dtype), Call(), "", chip)

    assert why(32, 32, 128, 128) == why(64, 64, 16, 16, dtype=torch.float32, chip=90) == ""
    assert why(64, 64, 16, 16) == why(64, 64, 128, 128, chip=100) == why(64, 64, 16, 16, chip=120) == ""
    assert "up to 32 queries and keys of 17 16-bit numbers here, found 33 and 5" in why(33, 5, 17, 16)
    assert "up to 32 queries" in why(33, 5, 32, 32, chip=120) and "up to 64" in why(65, 5, 32, 32, chip=100)
    assert "up to 32 queries and keys of 20 float32 numbers" in why(33, 5, 20, 20, dtype=torch.float32, chip=90)
    assert "up to 32 queries and keys of 16 float32 numbers" in why(33, 5, 16, 16, dtype=torch.float32, chip=100)


def test_rows_far_apart_are_not_short() -> None:
    q, k, v = shaped(5, 5, 16, 16)
    far = torch.empty(1 << 25, device="meta").as_strided((1, 2, 5, 16), (0, 0, 1 << 22, 1))
    assert "too far apart" in plan.why_not_short(q, far, v, Call(), "", 90)


def test_explain_says_which_and_why() -> None:
    q, k, v = shaped(9, 11, 16, 16)
    explain = functools.partial(kernels.explain, q, k, v, backend="triton")
    mask = torch.zeros(9, 11, requires_grad=True)
    with forced(kernel=""):
        assert str(explain()) == "The Triton kernel for short sequences runs this call."
        for options, reason in (
            ({"return_lse": True}, "the log-sum-exp"),
            ({"sinks": torch.zeros(2)}, "a sink"),
            ({"attn_mask": mask}, "the gradient of a mask"),
        ):
            why_not = list(explain(**options).why_not.values())
            assert why_not[0] == f"{reason} needs statistics of the rows, which they do not keep"
        with torch.no_grad():
            assert explain(attn_mask=mask).why_not == {}
    with forced(kernel="general"):
        assert explain().why_not == dict.fromkeys((SHORT, HOPPER), "the general kernel was asked for")
    with pytest.raises(ValueError, match="short kernel was asked for and cannot run: a sink needs statistics"):
        explain(sinks=torch.zeros(2))


def test_nothing_is_kept_for_the_backward_but_the_inputs(device: str) -> None:
    leaves = [x.requires_grad_() for x in make((2, 2, 2, 5, 5, 16, 16), device=device).inputs]
    output = attention(*leaves)
    kept = [x for x in output.grad_fn.saved_tensors if x is not None]
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in leaves]


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_little_of_a_tile_is_waste(kernel: str) -> None:
    """Of the rows that are worked on, more than half hold something; short ones share tiles."""
    for length in range(1, tiles.MAX_SHORT + 1):
        tile = tiles.choose_short_tile(kernel, length, 16, 2)
        rows = tiles.block_of(length)
        assert length * tile.pack <= rows and length * tile.pack > rows / 2
        assert tile.heads & (tile.heads - 1) == 0


# Through PyTorch


def test_double_backward_and_vmap(device: str) -> None:
    q, k, v = make((2, 2, 2, 5, 6, 8, 8), device=device).inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    first = torch.autograd.grad(attention(*leaves, is_causal=True).square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    first64 = torch.autograd.grad(formula(*exact, is_causal=True).output.square().sum(), exact, create_graph=True)
    second64 = torch.autograd.grad(sum(x.square().sum() for x in first64), exact)
    for ours, right in zip(second, second64):
        torch.testing.assert_close(ours.double(), right, rtol=1e-3, atol=1e-4)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, is_causal=True).square().sum()

    mapped = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q[:, None], k[:, None], v[:, None])
    for ours, right in zip(mapped, first):
        torch.testing.assert_close(ours[:, 0], right.detach())


def test_operations_pass_opcheck(device: str) -> None:
    q, k, v = make((2, 2, 2, 5, 6, 8, 8), device=device).inputs
    arguments = (q, k, v, *Call(scale=0.3))
    torch.library.opcheck(torch.ops.kernels.attention_forward, (*arguments, False))
    output, row_max, _ = torch.ops.kernels.attention_forward(*arguments, False)
    assert row_max.shape == (0,)
    backward = (torch.ones_like(output), None, None, None, None, *arguments, [True] * 5)
    torch.library.opcheck(torch.ops.kernels.attention_backward, backward)


def test_heads_of_two_rows_share_a_program_with_few_others() -> None:
    """Of eight times eight Triton 3.6 makes wrong code: `spoils_a_pair` in bench/compile_check.py."""
    found = {n: tiles.choose_short_tile("backward", n, 16, 2) for n in (1, 2, 3)}
    assert [(tile.heads, tile.pack) for tile in found.values()] == [(8, 16), (4, 8), (8, 5)]
    assert tiles.choose_short_tile("forward", 2, 16, 2).heads == 8
