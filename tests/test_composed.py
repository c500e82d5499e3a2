"""Two formulas held to two loops in Python's floats: that of the kernels, `composed_attention`, and that of the tests,
which every kernel is held to. And the mask for PyTorch's kernels, held to the former.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.attention import formula
from kernels.attention.call import Call
from kernels.attention.cpu import route
from kernels.attention.cpu.route import extended_attention
from kernels.attention.formula import composed_attention
from tests.conformance.formula import Answer
from tests.conformance.formula import attention as no_loop
from tests.tolerances import FORWARD, GRADIENT, assert_as_exact_as_torch

SIZES = (2, 4, 2, 5, 7, 3, 2)  # B, Hq, Hkv, L, S, E, Ev
LEAST = torch.finfo(torch.float32).min


class Given(NamedTuple):
    """One call of attention; `kept` is (B, Hq, L, S) bool, the weights that dropout keeps."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    asked: Call
    kept: torch.Tensor | None = None

    def leaves(self, dtype: torch.dtype = torch.float64) -> tuple[Given, list[torch.Tensor]]:
        """The call with every differentiable tensor a leaf in `dtype`, and those leaves."""
        asked = {
            name: x.detach().to(dtype).requires_grad_()
            for name, x in self.asked._asdict().items()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        }
        tensors = [x.detach().to(dtype).requires_grad_() for x in self[:3]]
        return Given(*tensors, self.asked._replace(**asked), self.kept), [*tensors, *asked.values()]


def make_call(
    sizes: tuple[int, ...] = SIZES, asked: Call = Call(), dtype: torch.dtype = torch.float64, **numbers: object
) -> Given:
    """Random query, key and value beside what is asked."""
    b, hq, hkv, n_queries, n_keys, e, ev = sizes
    shapes = (b, hq, n_queries, e), (b, hkv, n_keys, e), (b, hkv, n_keys, ev)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return Given(*tensors, asked._replace(**{"scale": 0.7, **numbers}))


def visible(call: Given) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """Of each batch entry, head and query: these three, the query's place, and the keys it may see, one by one."""
    (b, hq, n_queries, _), n_keys = call.query.shape, call.key.shape[2]
    asked = call.asked
    mask = asked.attn_mask
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != -math.inf).expand(b, hq, n_queries, n_keys)
    for batch, head, i in itertools.product(range(b), range(hq), range(n_queries)):
        in_use = n_keys
        if asked.key_lengths is not None:
            in_use = max(0, min(n_keys, int(asked.key_lengths[batch])))
        place = i + in_use - n_queries if asked.bottom_right else i
        keys = []
        for j in range(in_use):
            if asked.right is not None and j > place + asked.right:
                continue
            if asked.left is not None and j < place - asked.left:
                continue
            if mask is not None and not mask[batch, head, i, j]:
                continue
            keys.append(j)
        yield batch, head, i, place, keys


def two_loops(call: Given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, lse and weights: one query and one key at a time, in Python's floats."""
    asked = call.asked
    (b, hq, n_queries, e), (hkv, n_keys), ev = call.query.shape, call.key.shape[1:3], call.value.shape[3]
    query, key, value = (x.tolist() for x in call[:3])
    output = torch.zeros(b, hq, n_queries, ev, dtype=torch.float64)
    lse = torch.full((b, hq, n_queries), -math.inf, dtype=torch.float64)
    weights = torch.zeros(b, hq, n_queries, n_keys, dtype=torch.float64)
    for batch, head, i, place, keys in visible(call):
        shared = head // (hq // hkv)
        scores = {}
        for j in keys:
            x = asked.scale * sum(query[batch][head][i][c] * key[batch][shared][j][c] for c in range(e))
            if asked.softcap:
                x = asked.softcap * math.tanh(x / asked.softcap)
            if asked.alibi_slopes is not None:
                x -= float(asked.alibi_slopes.expand(b, hq)[batch, head]) * abs(place - j)
            if asked.attn_mask is not None and asked.attn_mask.dtype != torch.bool:
                x += float(asked.attn_mask.expand(weights.shape)[batch, head, i, j])
            scores[j] = x
        terms = list(scores.values())
        if asked.sinks is not None:
            terms.append(float(asked.sinks.expand(b, hq)[batch, head]))
        if not terms:
            continue
        top = max(terms)
        total = sum(math.exp(x - top) for x in terms)
        lse[batch, head, i] = top + math.log(total)
        for j, x in scores.items():
            weights[batch, head, i, j] = weight = math.exp(x - top) / total
            if call.kept is not None:
                weight *= float(call.kept[batch, head, i, j]) / (1 - asked.dropout_p)
            for c in range(ev):
                output[batch, head, i, c] += weight * value[batch][shared][j][c]
    return output, lse, weights


def without_loop(call: Given) -> Answer:
    """Output, lse and weights by the formula of the tests, in the dtype of the query."""
    asked = call.asked
    return no_loop(
        *call[:3],
        asked.attn_mask,
        scale=asked.scale,
        causal_alignment="bottom_right" if asked.bottom_right else "top_left",
        window=(asked.left, asked.right),
        softcap=asked.softcap or None,
        alibi_slopes=asked.alibi_slopes,
        sinks=asked.sinks,
        key_lengths=asked.key_lengths,
        kept=call.kept,
        dropout_p=asked.dropout_p,
    )


def assert_is_formula(call: Given, reference: Given | None = None) -> None:
    """Hold output, lse and weights of `call`, by both formulas, to two loops over it, or over another call."""
    right = two_loops(reference or call)
    for three in (composed_attention(*call), without_loop(call)):
        for found, expected in zip(three, right):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def features() -> dict[str, Given]:
    """Each feature alone, and some together."""
    torch.manual_seed(20_260_102)
    double = {"dtype": torch.float64}
    lengths = torch.tensor([3, 6])
    sinks, slopes = torch.randn(1, 4, **double), torch.rand(1, 4, **double)
    bias = torch.randn(2, 1, 5, 7, **double).masked_fill(torch.rand(2, 1, 5, 7) < 0.3, -math.inf)
    least = torch.zeros(5, 7, **double).masked_fill(torch.rand(5, 7) < 0.5, LEAST)
    least[2] = LEAST
    calls = {
        "nothing": make_call(),
        "causal": make_call(right=0),
        "causal, from the last key": make_call(right=0, bottom_right=True),
        "more queries than keys": make_call((2, 4, 2, 7, 5, 3, 2), right=0, bottom_right=True),
        "window": make_call(left=1, right=2),
        "window to the left": make_call(left=2, bottom_right=True),
        "window of one": make_call(left=0, right=0),
        "softcap": make_call(softcap=0.8),
        "one slope a head": make_call(asked=Call(alibi_slopes=slopes)),
        "slopes by batch entry": make_call(asked=Call(alibi_slopes=torch.rand(2, 4, **double)), bottom_right=True),
        "sinks": make_call(asked=Call(sinks=sinks)),
        "sinks by batch entry": make_call(asked=Call(sinks=torch.randn(2, 4, **double))),
        "lengths": make_call(asked=Call(key_lengths=lengths)),
        "lengths out of range": make_call(asked=Call(key_lengths=torch.tensor([-2, 11])), bottom_right=True),
        "lengths and last key": make_call(asked=Call(key_lengths=lengths), right=0, bottom_right=True),
        "bool mask": make_call(asked=Call(attn_mask=torch.rand(1, 4, 5, 7) < 0.6)),
        "mask of keys": make_call(asked=Call(attn_mask=torch.rand(2, 1, 1, 7) < 0.6)),
        "float mask": make_call(asked=Call(attn_mask=bias)),
        "mask of least numbers": make_call(asked=Call(attn_mask=least[None, None])),
        "rows without a key": make_call(asked=Call(torch.tensor([1, 1, 0, 1, 0]).bool()[None, None, :, None])),
        "sinks of rows without a key": make_call(asked=Call(None, torch.tensor([0, 4]), None, sinks), right=0),
        "everything": make_call(
            asked=Call(bias, lengths, slopes, sinks), softcap=1.5, left=2, right=1, bottom_right=True
        ),
    }
    dropped = make_call(dropout_p=0.25, right=1, asked=Call(sinks=sinks))
    calls["dropout"] = dropped._replace(kept=torch.rand(2, 4, 5, 7) < 0.75)
    return calls


FEATURES = features()
by_feature = pytest.mark.parametrize("name", FEATURES)


@by_feature
def test_a_feature_is_what_two_loops_say(name: str) -> None:
    assert_is_formula(FEATURES[name])


@st.composite
def calls(draw: st.DrawFn) -> Given:
    """Any sizes, any rules, any tensors beside them."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    b, hkv, group, e, ev = (draw(st.integers(1, 3)) for _ in range(5))
    n_queries, n_keys = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    hq = hkv * group
    sides = st.none() | st.integers(0, 4)
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "float", "least"]))
    if kind != "none":
        shape = [draw(st.sampled_from([1, size])) for size in (b, hq, n_queries, n_keys)]
        mask = torch.rand(shape) < 0.7
        if kind != "bool":
            mask = torch.randn(shape).masked_fill(mask, -math.inf if kind == "float" else LEAST)
    asked = Call(
        mask,
        torch.randint(-1, n_keys + 3, (b,), dtype=torch.int32) if draw(st.booleans()) else None,
        torch.rand(draw(st.sampled_from([1, b])), hq) if draw(st.booleans()) else None,
        torch.randn(draw(st.sampled_from([1, b])), hq) if draw(st.booleans()) else None,
    )
    call = make_call(
        (b, hq, hkv, n_queries, n_keys, e, ev),
        asked,
        scale=draw(st.sampled_from([0.0, -0.7, 3.0])),
        softcap=draw(st.sampled_from([0.0, 0.5, 30.0])),
        left=draw(sides),
        right=draw(sides),
        bottom_right=draw(st.booleans()),
    )
    if draw(st.booleans()):
        kept = torch.rand(b, hq, n_queries, n_keys) < 0.6
        call = call._replace(asked=call.asked._replace(dropout_p=0.4), kept=kept)
    return call


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_any_features_together_are_what_two_loops_say(call: Given) -> None:
    assert_is_formula(call)


WRONG = {
    "alignment": {"bottom_right": False},
    "right side": {"right": 0},
    "left side": {"left": 3},
    "softcap": {"softcap": 1.6},
    "sink": {"sinks": torch.zeros(1, 4)},
    "missing sink": {"sinks": None},
    "slope": {"alibi_slopes": torch.full((1, 4), 0.5)},
    "length": {"key_lengths": torch.tensor([3, 5])},
    "mask": {"attn_mask": torch.zeros(1, 1, 1, 7)},
}


@pytest.mark.parametrize("what", WRONG)
def test_the_comparison_rejects_a_wrong(what: str) -> None:
    call, change = FEATURES["everything"], WRONG[what]
    wrong = call._replace(asked=call.asked._replace(**change))
    with pytest.raises(AssertionError, match="not close"):
        assert_is_formula(wrong, call)


def results(call: Given, leaves: list[torch.Tensor], *changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, lse and weights as functions of the leaves, for gradcheck: an lse of -inf counts as 0."""
    number = {id(leaf): x for leaf, x in zip(leaves, changed)}
    asked = Call(*(number.get(id(x), x) for x in call.asked))
    output, lse, weights = composed_attention(*changed[:3], asked, call.kept)
    return output, lse.masked_fill(lse == -math.inf, 0.0), weights


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "mask of least numbers"])  # see below
def test_gradients_of_a_feature_are_those_of_small_differences(name: str) -> None:
    call, leaves = FEATURES[name].leaves()
    assert torch.autograd.gradcheck(lambda *x: results(call, leaves, *x), leaves)


def test_a_mask_of_least_numbers_gets_the_gradient_of_weights() -> None:
    """Small differences vanish beside them. Where all keys are least they share the weight: none is forbidden."""
    call, leaves = FEATURES["mask of least numbers"].leaves()
    _, _, weights = composed_attention(*call)
    (grad,) = torch.autograd.grad(composed_attention(*call)[1].sum(), call.asked.attn_mask)
    torch.testing.assert_close(grad, weights.sum((0, 1), keepdim=True))
    torch.testing.assert_close(weights[:, :, 2], torch.full((2, 4, 7), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("name", ["softcap", "sinks of rows without a key", "everything"])
def test_second_derivatives_are_those_of_small_differences(name: str) -> None:
    call, leaves = FEATURES[name].leaves()
    assert torch.autograd.gradgradcheck(lambda *x: results(call, leaves, *x), leaves, fast_mode=True)


def test_a_row_without_a_key_gives_zeros_and_gets_none() -> None:
    call, leaves = FEATURES["lengths out of range"].leaves()
    output, lse, weights = composed_attention(*call)
    assert not output[0].any() and not weights[0].any() and (lse[0] == -math.inf).all()
    found = torch.autograd.grad((output, lse), leaves, (torch.randn_like(output), torch.randn_like(lse)))
    assert all(not grad[0].any() and grad[1].any() for grad in found)


def test_a_row_without_a_key_has_its_sink_as_lse() -> None:
    call, _ = FEATURES["sinks of rows without a key"].leaves()
    output, lse, _ = composed_attention(*call)
    assert not output[0].any()
    torch.testing.assert_close(lse[0], call.asked.sinks[0, :, None].expand(4, 5))
    (grad,) = torch.autograd.grad(lse[0].sum(), call.asked.sinks)
    torch.testing.assert_close(grad, torch.full((1, 4), 5.0, dtype=torch.float64))


@pytest.mark.parametrize(("n_queries", "n_keys", "batch"), [(0, 7, 2), (5, 0, 2), (0, 0, 2), (5, 7, 0)])
def test_empty_sizes_work(n_queries: int, n_keys: int, batch: int) -> None:
    call = make_call((batch, 4, 2, n_queries, n_keys, 3, 2), softcap=2.0, left=1, right=1, bottom_right=True)
    lengths = torch.full((batch,), 3)
    asked = Call(torch.randn(batch, 1, 1, n_keys), lengths, torch.rand(1, 4), torch.randn(1, 4))
    for extra in (Call(), asked):
        some, leaves = call._replace(asked=extra).leaves()
        output, lse, weights = composed_attention(*some)
        assert output.shape == (batch, 4, n_queries, 2) and not output.any()
        assert lse.shape == (batch, 4, n_queries) and weights.shape == (batch, 4, n_queries, n_keys)
        assert not any(grad.any() for grad in torch.autograd.grad(output, leaves, torch.randn_like(output)))


def outcome(call: Given, upstream: list[torch.Tensor], attention: str = "composed") -> list[torch.Tensor]:
    """Output, lse (where finite, else 0) and every gradient."""
    call, leaves = call.leaves(call.query.dtype)
    if attention == "composed":
        output, lse, _ = composed_attention(*call)
    else:
        output, lse, _ = extended_attention(*call[:4], need_lse=False, need_weights=False)
    if lse is None:
        return [output, *torch.autograd.grad(output, leaves, upstream[0])]
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    return [output, lse, *torch.autograd.grad((output, lse), leaves, upstream)]


def upstream_of(call: Given) -> list[torch.Tensor]:
    """Random gradients of output and lse."""
    output, lse, _ = composed_attention(*call)
    return [torch.randn_like(output), torch.randn_like(lse)]


@by_feature
def test_care_changes_nothing_where_all_is_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done about NaN and Inf where numbers cannot be looked at: compiled, vmapped, on a GPU."""
    call = FEATURES[name]
    upstream = upstream_of(call)
    found = outcome(call, upstream)
    monkeypatch.setattr(formula, "all_finite", lambda *_: False)
    for a, b in zip(outcome(call, upstream), found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_score_that_overflows_and_may_not_be_seen_is_not() -> None:
    """Of finite numbers, so that the inputs do not show it."""
    call = make_call((1, 1, 1, 3, 4, 2, 2), Call(attn_mask=torch.tensor([[[[True, True, False, True]]]])))
    call.query[..., 0], call.key[..., 2, 0] = 1e200, 1e200
    hidden = call._replace(key=call.key.index_fill(2, torch.tensor([2]), 0.0))
    upstream = upstream_of(hidden)
    assert (call.query[0, 0] @ call.key[0, 0].mT)[:, 2].isposinf().all()
    for a, b in zip(outcome(call, upstream), outcome(hidden, upstream)):
        torch.testing.assert_close(a, b)


def test_a_value_whose_gradient_overflows_and_may_not_be_seen_is_not() -> None:
    """A gradient of a weight is inf, and times the weight, which is zero, NaN."""
    call = make_call((1, 1, 1, 3, 4, 2, 2), Call(attn_mask=torch.tensor([[[[True, True, False, True]]]])))
    hidden = call._replace(value=call.value.index_fill(2, torch.tensor([2]), 0.0))
    call.value[..., 2, :] = torch.finfo(torch.float64).max
    upstream = [x.abs() + 4.0 for x in upstream_of(hidden)]
    for a, b in zip(outcome(call, upstream), outcome(hidden, upstream)):
        torch.testing.assert_close(a, b)


def test_what_dropout_draws_does_not_depend_on_what_may_not_be_seen() -> None:
    call = make_call((2, 1, 1, 2, 3, 4, 4), Call(key_lengths=torch.tensor([3, 2]), dropout_p=0.5, softcap=2.0))
    found = []
    for hidden in 0.0, math.nan:
        call.value[1, :, 2] = hidden
        torch.manual_seed(1)
        found.append((composed_attention(*call)[0], torch.rand(())))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("cap", [1e-300, 1e-3])
def test_a_small_soft_cap_does_not_overflow(cap: float) -> None:
    call = make_call(SIZES, Call(softcap=cap))
    call.key[:] *= 1e306
    assert composed_attention(*call)[0].isfinite().all()


def test_the_default_dtype_is_not_that_of_the_result() -> None:
    call = make_call((1, 2, 2, 3, 4, 2, 2), Call(softcap=2.0), right=0)
    given = [x.float() for x in (call.query, call.key, call.value)]
    torch.set_default_dtype(torch.float64)
    try:
        output, lse, weights = composed_attention(*given, call.asked)
    finally:
        torch.set_default_dtype(torch.float32)
    assert lse is not None and output.dtype == lse.dtype == weights.dtype == torch.float32


def refuse(what: str) -> Callable[..., None]:
    return lambda *_, **__: pytest.fail(what)


@pytest.mark.parametrize(
    ("n_queries", "rules"),
    [(5, {"softcap": 2.0}), (5, {"right": 6, "left": 4}), (1, {"right": 0, "left": 6, "bottom_right": True})],
)
def test_what_no_rule_asks_for_is_not_done(n_queries: int, rules: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """No places, no mask, no care; and the log-sum-exp only on demand."""
    call = make_call((2, 4, 2, n_queries, 7, 3, 2), Call(sinks=torch.randn(1, 4)), **rules)
    for part in ("_numbers", "_finite_rows"):
        monkeypatch.setattr(formula, part, refuse(part))
    assert_is_formula(call)
    monkeypatch.setattr(torch, "log", refuse("log"))
    assert composed_attention(*call, need_lse=False)[1] is None


@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_number_that_nothing_hides(what: str, fill: float) -> None:
    """Neither the cap nor a weight of 0 makes a result of it, and such a row sends nothing back."""
    clean = make_call(softcap=2.0, asked=Call(sinks=torch.randn(1, 4)))
    bad = getattr(clean, what).clone()
    bad[0, 1, 2, 0] = fill
    dirty = clean._replace(**{what: bad})
    sees = torch.zeros(2, 4, 5, dtype=torch.bool)
    sees[(0, 1, 2) if what == "query" else (0, slice(2, 4))] = True
    upstream = upstream_of(clean)
    found = outcome(dirty, upstream)
    assert torch.equal(found[0].isnan(), sees[..., None].expand(found[0].shape))
    for grad in upstream:  # without those rows, nothing tells the two calls apart
        grad[sees] = 0.0
    assert all(grad.isfinite().all() for grad in found[2:])
    for a, b in zip(outcome(dirty, upstream)[2:], outcome(clean, upstream)[2:]):
        torch.testing.assert_close(a, b)


def test_a_sink_of_minus_infinity_is_none() -> None:
    """Nor does it get a gradient, or a second one, from rows that see no key."""
    mask = torch.tensor([1, 1, 0, 1, 0]).bool()[None, None, :, None]
    call, leaves = make_call(asked=Call(mask, sinks=torch.full((1, 4), -math.inf)), dtype=torch.float64).leaves()
    without = call._replace(asked=call.asked._replace(sinks=None))
    for a, b in zip(composed_attention(*call), composed_attention(*without)):
        torch.testing.assert_close(a, b)
    output, lse, _ = composed_attention(*call)
    sent = [torch.randn_like(x, requires_grad=True) for x in (output, lse)]
    first = torch.autograd.grad((output, lse), leaves, sent, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), [*leaves, *sent])
    assert not first[3].any() and not second[3].any() and all(x.isfinite().all() for x in (*first, *second))


HIDDEN = {  # the last two keys, by each rule that can hide them from every query
    "lengths": {"key_lengths": torch.tensor([5, 5])},
    "causal": {"right": 0},
    "window": {"right": 1, "n_queries": 4},
    "bool mask": {"attn_mask": (torch.arange(7) < 5)[None, None, None]},
    "float mask": {"attn_mask": torch.zeros(1, 1, 5, 7).masked_fill(torch.arange(7) >= 5, -math.inf)},
}


@pytest.mark.parametrize(
    ("attention", "cap", "fill"),
    [*itertools.product(["composed", "extended"], [None, 2.0], [math.nan, math.inf]), ("composed", None, -LEAST)],
)
@pytest.mark.parametrize("rule", HIDDEN)
def test_a_key_nobody_sees_reaches_nothing(rule: str, cap: float | None, attention: str, fill: float) -> None:
    change = dict(HIDDEN[rule])
    n_queries = change.pop("n_queries", 5)
    asked = Call(**{name: x for name, x in change.items() if name in Call._fields})
    clean = make_call((2, 4, 2, n_queries, 7, 3, 2), asked, torch.float32, softcap=cap)
    if attention == "composed":
        rules = {"alibi_slopes": torch.rand(1, 4), "sinks": torch.randn(1, 4)}
        clean = clean._replace(asked=clean.asked._replace(**rules))
    key, value = clean.key.clone(), clean.value.clone()
    key[:, :, 5:], value[:, :, 5:] = fill, fill
    upstream = upstream_of(clean)
    found = outcome(clean._replace(key=key, value=value), upstream, attention)
    for a, b in zip(found, outcome(clean, upstream, attention)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", ["composed", "extended"])
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("fill", [math.nan, -math.inf], ids=str)
def test_a_bad_key_reaches_those_who_see_it_and_no_other(what: str, fill: float, attention: str) -> None:
    asked = Call(torch.randn(2, 1, 5, 7), torch.tensor([6, 7]))
    if attention == "composed":
        asked = asked._replace(alibi_slopes=torch.rand(1, 4), sinks=torch.randn(1, 4))
    clean = make_call(asked=asked, dtype=torch.float32, right=0)
    bad = getattr(clean, what).clone()
    bad[:, 1, 3, 0] = fill  # seen by queries 3 and 4, of the last two heads
    dirty = clean._replace(**{what: bad})
    sees = torch.zeros(2, 4, 5, dtype=torch.bool)
    sees[:, 2:, 3:] = True
    upstream = upstream_of(clean)
    found, expected = outcome(dirty, upstream, attention), outcome(clean, upstream, attention)
    assert torch.equal(found[0].isnan(), sees[..., None].expand(found[0].shape))
    n_results = len(found) - 3 - sum(isinstance(x, torch.Tensor) and x.is_floating_point() for x in asked)
    grad_query = n_results
    torch.testing.assert_close(found[grad_query][~sees], expected[grad_query][~sees])
    assert all(grad.isfinite().all() for grad in found[n_results:])
    for grad in upstream:  # without those rows, nothing tells the two calls apart
        grad[sees] = 0.0
    found, expected = outcome(dirty, upstream, attention), outcome(clean, upstream, attention)
    for a, b in zip(found[n_results:], expected[n_results:]):
        torch.testing.assert_close(a, b)
    if attention == "composed":
        _, lse, weights = composed_attention(*dirty)
        assert torch.equal(lse.isnan(), sees if what == "key" else torch.zeros_like(sees))
        assert torch.equal(weights.isnan().any(-1), lse.isnan()) and not weights[..., 6].any()


def test_a_bad_query_reaches_its_own_row_alone() -> None:
    """Not even that where the row sees no key, as a padded one does not."""
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[:, :, 4] = False
    clean = make_call(asked=Call(mask), right=1)
    query = clean.query.clone()
    query[:, :, [2, 4]] = math.nan
    upstream = upstream_of(clean)
    for grad in upstream:
        grad[:, :, 2] = 0.0
    found, expected = (outcome(call, upstream) for call in (clean._replace(query=query), clean))
    assert found[0][:, :, 2].isnan().all() and not found[0][:, :, 4].any()
    for a, b in zip(found[2:], expected[2:]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "softcap", "lengths", "sinks", "all"])
def test_a_result_is_as_exact_as_the_formula_in_its_dtype(name: str, dtype: torch.dtype) -> None:
    """The lse, which is float32 for halves, is held to float32's."""
    every = {"softcap": 2.0, "left": 11, "right": 3}
    asked = Call(torch.randn(2, 1, 1, 31), torch.tensor([31, 23]), torch.rand(1, 4) / 4, torch.randn(1, 4))
    rules, extra = {
        "plain": ({}, Call()),
        "softcap": ({"softcap": 2.0}, Call()),
        "lengths": ({}, asked._replace(attn_mask=None, alibi_slopes=None, sinks=None)),
        "sinks": ({"right": 0}, Call(sinks=asked.sinks)),
        "all": (every, asked),
    }[name]
    call = make_call((2, 4, 2, 29, 31, 17, 13), extra, dtype, **rules)
    grad = torch.randn(2, 4, 29, 13).to(dtype)
    found = []
    for attention, precision in ((composed_attention, dtype), (None, dtype), (None, torch.float64)):
        some, leaves = call.leaves(precision)
        some = some._replace(asked=call.asked)
        output, lse, _ = attention(*some) if attention else without_loop(some)
        found.append([output, *torch.autograd.grad(output, leaves[:3], grad.to(precision)), lse])
    for ours, theirs, exact, what in zip(*found, ["output", "grad of query", "grad of key", "grad of value", "lse"]):
        if what == "lse":
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)
        else:
            assert_as_exact_as_torch(ours, theirs, exact, FORWARD if what == "output" else GRADIENT, what)


def test_a_float32_mask_beside_halves_keeps_its_numbers() -> None:
    """finfo.min of float32 would be -inf as a float16."""
    mask = torch.full((1, 1, 1, 7), LEAST)
    call = make_call(asked=Call(mask), dtype=torch.float16)
    output, lse, weights = composed_attention(*call)
    assert output.dtype == weights.dtype == torch.float16 and lse.dtype == torch.float32
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 7))
    torch.testing.assert_close(output, call.value.mean(2, keepdim=True).repeat_interleave(2, 1).expand(output.shape))


def test_autocast_does_not_reach_the_formula() -> None:
    call = make_call(asked=Call(sinks=torch.randn(1, 4)), dtype=torch.float32)
    expected = composed_attention(*call)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(composed_attention(*call), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("need_lse", [False, True], ids=["mask", "formula"])
def test_under_autocast_least_of_all_is_still_not_never(need_lse: bool) -> None:
    call = make_call(asked=Call(torch.full((1, 1, 1, 7), LEAST), torch.tensor([4, 7])), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, *_ = extended_attention(*call[:4], need_lse=need_lse, need_weights=False)
    halves = [x.bfloat16() for x in call[:3]]
    theirs, exact = (
        without_loop(Given(*(x.to(d) for x in halves), call.asked)) for d in (torch.bfloat16, torch.float64)
    )
    assert_as_exact_as_torch(output, theirs.output, exact.output)


def test_dropout_is_drawn_from_the_generator_and_not_in_the_weights() -> None:
    call = make_call((2, 4, 2, 31, 37, 3, 37), dropout_p=0.25)
    call = call._replace(value=torch.eye(37, dtype=torch.float64).expand(2, 2, 37, 37))
    torch.manual_seed(1)
    output, _, weights = composed_attention(*call)
    kept = output != 0.0
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(output[kept], weights[kept] / 0.75)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.manual_seed(1)
    assert torch.equal(composed_attention(*call)[0], output)
    torch.testing.assert_close(composed_attention(*call._replace(kept=kept))[0], output)
    assert not composed_attention(*call._replace(asked=call.asked._replace(dropout_p=1.0)))[0].any()


def test_vmap_is_a_loop() -> None:
    call = FEATURES["everything"]
    batches = [torch.randn(3, *x.shape, dtype=x.dtype) for x in call[:3]]
    lengths, sinks = torch.tensor([[0, 7], [3, 6], [5, 1]]), torch.randn(3, 1, 4, dtype=torch.float64)

    def attend(query, key, value, lengths, sinks):  # type: ignore[no-untyped-def]
        return composed_attention(query, key, value, call.asked._replace(key_lengths=lengths, sinks=sinks))

    found = torch.func.vmap(attend)(*batches, lengths, sinks)
    for n, one in enumerate(zip(*batches, lengths, sinks)):
        for a, b in zip(found, attend(*one)):
            torch.testing.assert_close(a[n], b)

    def loss(*x: torch.Tensor) -> torch.Tensor:
        return attend(*x)[0].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 4)))(*batches, lengths, sinks)
    leaves = [x.clone().requires_grad_() for x in (*batches, sinks)]
    total = sum(loss(*(x[n] for x in leaves[:3]), lengths[n], leaves[3][n]) for n in range(3))
    for a, b in zip(grads, torch.autograd.grad(total, leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, in its rules for forward mode
def test_forward_mode_agrees_with_backward() -> None:
    call = FEATURES["everything"]
    direction = torch.randn_like(call.query)
    _, tangent = torch.func.jvp(lambda query: composed_attention(query, *call[1:])[0], (call.query,), (direction,))
    some, leaves = call.leaves()
    grad = torch.randn_like(tangent)
    (grad_query,) = torch.autograd.grad(composed_attention(*some)[0], leaves[:1], grad)
    torch.testing.assert_close((tangent * grad).sum(), (grad_query * direction).sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, inside the compiler
@pytest.mark.parametrize("name", ["lengths and last key", "everything"])
def test_compiles_to_one_graph(name: str) -> None:
    call, leaves = FEATURES[name].leaves()

    def attend(query, key, value, asked):  # type: ignore[no-untyped-def]
        found = composed_attention(query, key, value, asked)
        return *found, extended_attention(query, key, value, asked, need_lse=False, need_weights=False)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = (f(*call[:3], call.asked) for f in (compiled, attend))
    for a, b in zip((*found[:3], found[3][0]), (*expected[:3], expected[3][0])):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(x[0].square().sum(), leaves) for x in (found, expected))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def masks() -> dict[str, tuple[Call, dict]]:
    """Rules that a mask for PyTorch's kernels can say."""
    torch.manual_seed(20_260_103)
    lengths, slopes = torch.tensor([0, 6]), torch.rand(1, 4)
    some, bias = torch.rand(2, 4, 5, 7) < 0.6, torch.randn(1, 4, 1, 7)
    learned = torch.randn(2, 1, 5, 7).masked_fill(torch.rand(5, 7) < 0.3, -math.inf)
    return {
        "window": (Call(), {"left": 1, "right": 2}),
        "causal from the last key": (Call(), {"right": 0, "bottom_right": True}),
        "lengths": (Call(key_lengths=lengths), {}),
        "lengths, from the last key": (Call(key_lengths=lengths), {"right": 0, "left": 3, "bottom_right": True}),
        "lengths and a mask of heads": (Call(some, lengths), {}),
        "mask and causal": (Call(some), {"right": 0}),
        "slopes": (Call(alibi_slopes=slopes), {"right": 0}),
        "slopes and masks": (Call(some, lengths, slopes), {"bottom_right": True}),
        "slopes and a float mask": (Call(bias, lengths, torch.rand(2, 4)), {"left": 2}),
        "float mask and window": (Call(learned), {"left": 2, "right": 1}),
        "float mask of keys": (Call(bias, lengths), {}),
        "least numbers": (Call(torch.full((1, 1, 1, 7), LEAST), lengths), {"right": 0}),
    }


MASKS = masks()


@pytest.mark.parametrize("bad", [False, True], ids=["", "bad keys"])
@pytest.mark.parametrize("hkv", [2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_for_pytorchs_kernels_says_what_the_formula_does(
    name: str, hkv: int, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rules = MASKS[name]
    call = make_call((2, 4, hkv, 5, 7, 3, 2), asked, torch.float32, **rules)
    if bad:
        call.key[:, 1, 4], call.value[:, 0, 6] = math.nan, math.inf
    upstream = torch.randn(2, 4, 5, 2)
    found = []
    for attention in (composed_attention, extended_attention):
        some, leaves = call.leaves(torch.float32)
        some = some._replace(asked=some.asked._replace(alibi_slopes=asked.alibi_slopes))
        leaves = [x for x in leaves if x.shape != (1, 4) and x.shape != (2, 4)]
        if attention is composed_attention:
            output, *_ = composed_attention(*some)
        else:
            monkeypatch.setattr(route, "composed_attention", lambda *_: pytest.fail("ran the formula"))
            output, lse, weights = extended_attention(*some[:4], need_lse=False, need_weights=False)
            assert lse is None and weights is None
        found.append([output, *torch.autograd.grad(output, leaves, upstream)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_right_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    asked, rules = MASKS[name]
    call = make_call(asked=asked, dtype=dtype, **rules)
    output, *_ = extended_attention(*call[:4], need_lse=False, need_weights=False)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output, composed_attention(*call)[0], rtol=tolerance, atol=2 * tolerance)


BEYOND_MASKS = {
    "softcap": ({"softcap": 2.0}, Call()),
    "sinks": ({}, Call(sinks=torch.zeros(1, 4))),
    "slopes that learn": ({}, Call(alibi_slopes=torch.ones(1, 4, requires_grad=True))),
}


@pytest.mark.parametrize("name", [*BEYOND_MASKS, "lse", "weights"])
def test_what_no_mask_can_say_runs_as_the_formula(name: str) -> None:
    rules, asked = BEYOND_MASKS.get(name, ({}, Call()))
    call = make_call(asked=asked, dtype=torch.float32, **rules)
    found = extended_attention(*call[:4], need_lse=name == "lse", need_weights=name == "weights")
    for a, b, wanted in zip(found, composed_attention(*call), (True, name == "lse", name == "weights")):
        assert torch.equal(a, b) if wanted else a is None


SMALL = {  # rules, lengths, shape of the mask or None, is_causal
    "causal": ({"right": 0}, None, None, True),
    "wide window": ({"left": 4, "right": 6}, None, None, False),
    "one key beyond a wide window": ({"left": 4, "right": 5}, None, (1, 1, 5, 7), False),
    "window": ({"right": 0, "left": 3}, None, (1, 1, 5, 7), False),
    "lengths": ({"bottom_right": True}, [3, 7], (2, 1, 1, 7), False),
    "lengths and causal": ({"right": 0, "bottom_right": True}, [3, 7], (2, 1, 5, 7), False),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_mask_is_as_small_as_the_rules_allow(name: str) -> None:
    """None where `is_causal` or nothing says it; and heads never multiply it."""
    rules, lengths, shape, causal = SMALL[name]
    call = make_call(asked=Call(key_lengths=torch.tensor(lengths) if lengths else None), **rules)
    mask, is_causal = route._as_mask(call.asked, call.query, 7)
    assert (None if mask is None else mask.shape) == shape and is_causal == causal
    output, *_ = extended_attention(*call[:4], need_lse=False, need_weights=False)
    torch.testing.assert_close(output, composed_attention(*call)[0])


def test_decoding_from_the_last_key_needs_no_mask() -> None:
    call = make_call((2, 4, 2, 1, 7, 3, 2), left=6, right=0, bottom_right=True)
    assert route._as_mask(call.asked, call.query, 7) == (None, False)


@pytest.mark.parametrize("query_dtype", [torch.float16, torch.float64], ids=str)
def test_a_float32_mask_keeps_its_numbers_on_pytorchs_kernels(query_dtype: torch.dtype) -> None:
    call = make_call(asked=Call(torch.full((1, 1, 1, 7), LEAST), torch.tensor([4, 7])), dtype=query_dtype)
    output, *_ = extended_attention(*call[:4], need_lse=False, need_weights=False)
    expected = call.value[0, :, :4].mean(1, keepdim=True).repeat_interleave(2, 0)
    torch.testing.assert_close(output[0], expected.expand(4, 5, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("batch", "n_queries", "dropout_p", "masked", "training", "short"),
    [
        (1, 7, 0.0, False, True, False),
        (64, 7, 0.0, False, True, True),
        (64, 7, 0.0, False, False, False),
        (64, 7, 0.0, True, False, True),
        (128, 7, 0.0, False, False, True),
        (128, 4, 0.0, False, False, False),  # products of 4 by 4: PyTorch's are loops
        (1024, 1, 0.0, False, False, False),
        (64, 16, 0.0, False, True, False),
        (16, 7, 0.05, False, False, False),
        (32, 7, 0.05, True, True, True),
        (2, 64, 0.05, False, True, True),
    ],
)
def test_many_short_sequences_take_the_short_way(
    batch: int,
    n_queries: int,
    dropout_p: float,
    masked: bool,
    training: bool,
    short: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = []
    for way in ("short_attention", "fused_attention"):
        monkeypatch.setattr(route, way, lambda query, *_, way=way, **__: ways.append(way) or query)
    query, key = (torch.randn(batch, 4, n_queries, 16, requires_grad=training) for _ in range(2))
    mask = torch.ones(batch, 1, 1, n_queries, dtype=torch.bool) if masked else None
    route.attention(query, key, key, mask, dropout_p, False, None, False)
    assert len(ways) == 1 and (ways[0] == "short_attention") == short


def test_vmap_over_many_short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `short_attention` would take by size, and has no rule for."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    query = torch.randn(3, 256, 4, 7, 16)
    found = torch.func.vmap(lambda x: kernels.scaled_dot_product_attention(x, x, x))(query)
    torch.testing.assert_close(found[2], kernels.scaled_dot_product_attention(*[query[2]] * 3))
