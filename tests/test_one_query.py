"""One query a head on a CPU, as in generating text, and calls in training: the short way, held to the general one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from kernels.attention import api
from kernels.attention.cpu import simple
from tests.tolerances import FORWARD, assert_as_exact_as_torch

MANY_KEYS = 2100  # heads that share so many take the formula
SIZES = {"heads": (2, 4, 4, 7, 8), "shared": (2, 6, 2, 7, 8), "many shared": (2, 8, 2, MANY_KEYS, 8)}
MASKS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "padding": lambda b, h, s: torch.arange(s) >= torch.arange(b).view(b, 1, 1, 1),
    "float": lambda b, h, s: torch.randn(b, h, 1, s).masked_fill(torch.rand(b, h, 1, s) < 0.3, -math.inf),
    "bias": lambda b, h, s: torch.randn(1, h, 1, s),
    "one head": lambda b, h, s: torch.rand(b, 1, 1, s) < 0.5,
    "nothing": lambda b, h, s: torch.zeros(b, 1, 1, s, dtype=torch.bool),
}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "static cache": lambda x: torch.cat((x, torch.full_like(x, math.nan)), 2)[:, :, : x.shape[2]],
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"sinks": True},
    {"softcap": 2.0, "sinks": True, "scale": 0.3},
    {"is_causal": True, "causal_alignment": "bottom_right"},
]


def tensors(sizes: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    batch, heads, own, n_keys, size = SIZES[sizes]
    shapes = (batch, heads, 1, size), (batch, own, n_keys, size), (batch, own, n_keys, size)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def attend(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    return kernels.scaled_dot_product_attention(*inputs, enable_gqa=True, backend="torch", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_short_way_gives_what_the_general_one_gives(
    sizes: str, mask: str | None, layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both as exact as the formula in float32 beside float64; the short way is taken by all but rows without keys."""
    torch.manual_seed(0)
    query, key, value = tensors(sizes)
    key, value = LAYOUTS[layout](key), LAYOUTS[layout](value)
    query = torch.cat((query, key[:, :1, :1].expand_as(query)), -1).chunk(2, -1)[0]  # of one product for all three
    batch, heads, _, n_keys, _ = SIZES[sizes]
    options = {**options, "attn_mask": None if mask is None else MASKS[mask](batch, heads, n_keys)}
    if "sinks" in options:
        options["sinks"] = torch.nn.Parameter(torch.randn(heads))
    taken: list[Any] = []
    short_way = simple.simple_attention
    with torch.no_grad():
        monkeypatch.setattr(api, "simple_attention", lambda *args: taken.append(short_way(*args)) or taken[-1])
        found = attend(query, key, value, **options)
        monkeypatch.setattr(api, "simple_attention", lambda *_: None)
        expected = attend(query, key, value, **options)
        wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}
        exact = attend(query.double(), key.double(), value.double(), **wide)
    assert_as_exact_as_torch(found, expected, exact, FORWARD)
    assert found.is_contiguous()
    has_extras, is_flat = "softcap" in options or "sinks" in options, layout != "heads last"
    by_formula = has_extras or (sizes == "many shared" and is_flat)
    sees_nothing = mask == "nothing" and "sinks" not in options
    assert len(taken) == 1
    assert (taken[0] is None) == (by_formula and (sees_nothing or not is_flat))
    found += torch.nn.Parameter(torch.zeros(()))  # in place, with a gradient: no view made without one


WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "dtype of the key": lambda q, k, v: attend(q, k.double(), v),
    "dtype of the value": lambda q, k, v: attend(q, k, v.double(), softcap=2.0),
    "whole numbers": lambda q, k, v: attend(q.int(), k.int(), v.int()),
    "complex numbers": lambda q, k, v: attend(q.cfloat(), k.cfloat(), v.cfloat()),
    "device of the key": lambda q, k, v: attend(q, k.to("meta"), v),
    "device of the mask": lambda q, k, v: attend(q, k, v, attn_mask=torch.ones(1, 1, 1, 7, device="meta"), softcap=2.0),
    "device of the sinks": lambda q, k, v: attend(q, k, v, sinks=torch.zeros(6, device="meta")),
    "sparse key": lambda q, k, v: attend(q, k.to_sparse(), v),
    "sparse mask": lambda q, k, v: attend(q, k, v, attn_mask=torch.ones(1, 1, 1, 7).to_sparse()),
    "nested key": lambda q, k, v: attend(q, torch.nested.nested_tensor([k[0]]), v),
    "lengths": lambda q, k, v: attend(q, k, v[:, :, :5]),
    "heads": lambda q, k, v: attend(q[:, :5], k, v),
    "size of the heads": lambda q, k, v: attend(q, k[..., :4], v[..., :4]),
    "mask of another batch": lambda q, k, v: attend(q[:1], k[:1], v[:1], attn_mask=torch.ones(2, 1, 1, 7)),
    "mask of more queries": lambda q, k, v: attend(q, k, v, attn_mask=torch.ones(1, 1, 2, 7, dtype=torch.bool)),
    "mask of whole numbers": lambda q, k, v: attend(q, k, v, attn_mask=torch.ones(1, 1, 1, 7, dtype=torch.int64)),
    "number of sinks": lambda q, k, v: attend(q, k, v, sinks=torch.zeros(2)),
    "sinks of whole numbers": lambda q, k, v: attend(q, k, v, sinks=torch.zeros(6, dtype=torch.int64)),
    "soft cap": lambda q, k, v: attend(q, k, v, softcap=-2.0),
    "scale": lambda q, k, v: attend(q, k, v, scale=math.inf),
    "alignment": lambda q, k, v: attend(q, k, v, causal_alignment="middle"),
    "sinks that are no tensor": lambda q, k, v: attend(q, k, v, sinks=[0.0] * 6),
    "complex key": lambda q, k, v: attend(q, k.cfloat(), v, attn_mask=torch.ones(1, 1, 1, 7, dtype=torch.bool)),
    "no heads": lambda q, k, v: attend(*[torch.randn(1, 8)] * 3),
    "backend": lambda q, k, v: kernels.scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="fast"),
    "heads without leave": lambda q, k, v: kernels.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_in_one_line(wrong: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        WRONG[wrong](*tensors("shared"))
    assert " found " in str(error.value) and "\n" not in str(error.value)


SHORT: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"attn_mask": torch.ones(1, 1, 1, MANY_KEYS, dtype=torch.bool)},
]
LONG: list[dict[str, Any]] = [
    {"is_causal": True},
    {"scale": -1.0},
    {"scale": 1},
    {"dropout_p": 0},
    {"deterministic": False},
    {"window": (None, 3)},
    {"is_causal": 1, "causal_alignment": "bottom_right"},
    {"attn_mask": torch.ones(1, MANY_KEYS, dtype=torch.bool)},
    {"key_lengths": torch.tensor([3, 2])},
]


@pytest.mark.parametrize("case", range(len(SHORT + LONG)))
@pytest.mark.parametrize("state", ["", "gradient", "autocast", "values of another width"])
def test_explain_knows_of_keys_that_many_heads_share(state: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (query, key, value), options = tensors("many shared"), (SHORT + LONG)[case]
    if state == "values of another width":
        value = value[..., :5]
    query.requires_grad_(state == "gradient")
    ran: list[Any] = []
    by_formula = simple._by_formula
    monkeypatch.setattr(simple, "_by_formula", lambda *args: ran.append(args) or by_formula(*args))
    with torch.autocast("cpu", enabled=state == "autocast"):
        told = kernels.explain(query, key, value, enable_gqa=True, backend="torch", **options)
        attend(query, key, value, **options)
    assert ("anew for each head" in str(told)) == told.kernel.startswith("the formula") == bool(ran)
    assert bool(ran) == (state == "" and case < len(SHORT))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:.torch.jit")
@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_trace_holds_for_other_numbers(sizes: str, n_queries: int, options: dict[str, Any]) -> None:
    query, key, value = tensors(sizes)
    query = query.expand(-1, -1, n_queries, -1).contiguous()
    heads = query.shape[1]
    given = {**options, "sinks": torch.randn(heads)} if "sinks" in options else options
    traced = torch.jit.trace(lambda *x: attend(*x, **given), (query, key, value), check_trace=False)
    others = query * 3, key.flip(2), value + 1
    torch.testing.assert_close(traced(*others), attend(*others, **given))


def in_training(
    monkeypatch: pytest.MonkeyPatch, joint: torch.Tensor, short: bool, is_causal: bool, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of self-attention over joint (B, T, 3, H, E), or (3, B, H, T, E), by that way."""
    runs: list[Any] = []
    apply = simple._in_training
    with monkeypatch.context() as patch:
        patch.setattr(simple, "_in_training", lambda *args: runs.append(apply(*args) if short else None) or runs[-1])
        joint = joint.detach().requires_grad_()
        parts = joint.unbind(0) if joint.shape[0] == 3 else [x.transpose(1, 2) for x in joint.unbind(2)]
        output = kernels.scaled_dot_product_attention(*parts, is_causal=is_causal, backend="torch", **options)
        (grad,) = torch.autograd.grad(output, joint, torch.linspace(-1, 1, output.numel()).view_as(output).to(output))
    assert len(runs) == 1
    return output, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 19, 3, 5, 12), (3, 2, 5, 19, 12), (1, 3, 3, 2, 4), (3, 40, 5, 7, 8)], ids=str)
def test_a_call_in_training_gives_bit_for_bit_what_the_general_way_gives(
    shape: tuple[int, ...], is_causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of one product, and tensors of their own; the last goes the way of many short sequences."""
    joint = torch.randn(shape).to(dtype)
    short, general = (in_training(monkeypatch, joint, short, is_causal, scale=0.3) for short in (True, False))
    assert all(map(torch.equal, short, general)) and short[0].stride() == general[0].stride()
    other = in_training(monkeypatch, joint, True, not is_causal, scale=0.3)
    assert not torch.equal(other[0], short[0])


def test_a_call_in_training_with_nan_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = torch.randn(2, 19, 3, 5, 12)
    joint[0, 11, 1, 2, 3] = math.nan  # a key that queries before it may not see
    short, general = (in_training(monkeypatch, joint, short, True) for short in (True, False))
    torch.testing.assert_close(short, general, rtol=0, atol=0, equal_nan=True)
    assert short[0][0, 2, :11].isfinite().all() and short[0][0, 2, 11:].isnan().all()


def test_what_is_no_plain_call_in_training_does_not_go_its_way() -> None:
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    plain = (query, query, query, None, 0.0, True, None, False, {}, "torch")
    assert simple.way_of(*plain) == "training"
    for place, value in ((3, torch.ones(5, dtype=torch.bool)), (4, 0.1), (0, query.detach()[:, :, :4])):
        assert simple.way_of(*plain[:place], value, *plain[place + 1 :]) != "training", place
    for options in ({"softcap": 2.0}, {"window": (1, 1)}, {"causal_alignment": "bottom_right"}):
        assert simple.way_of(*plain[:8], options, "torch") != "training"
    with torch.no_grad():
        assert simple.way_of(*plain) != "training"
