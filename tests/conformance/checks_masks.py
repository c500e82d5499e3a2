"""Masks: every broadcast, masks that learn, masks of the least number, rows that may see nothing, NaN behind a mask."""

from __future__ import annotations

import math

import torch

from tests.conformance.judge import Attention, Call, agree, judge, make, same_bits, solve
from tests.conformance.registry import check

SIZES = (2, 2, 2, 17, 19, 8, 8)
SHAPES = [(17, 19), (1, 19), (17, 1), (2, 1, 1, 19), (2, 1, 17, 1), (1, 2, 17, 19), (2, 2, 17, 19), (2, 2, 1, 1)]
LEAST = "pytorch/pytorch#110213, pytorch/pytorch#109517"
EMPTY_FORWARD = "pytorch/pytorch#103963, pytorch/pytorch#103749, pytorch/pytorch#110213, ml-explore/mlx#2608"
EMPTY_BACKWARD = "pytorch/pytorch#41508, pytorch/pytorch#178251, Xilinx/brevitas#1591"


def float_mask(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, a fifth of them -inf; the first key is allowed, so that no row is empty."""
    mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -math.inf)
    mask[..., 0] = 0.5
    return mask.to(dtype)


@check("a bool mask of any shape that broadcasts", "mask", "pytorch/pytorch#120810")
def check_bool_masks(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True
        judge(attention, make(SIZES, dtype, device, attn_mask=mask), f"mask {shape}")


@check("a float mask of any shape that broadcasts", "mask", "pytorch/pytorch#120810, pytorch/pytorch#130209")
def check_float_masks(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        judge(attention, make(SIZES, dtype, device, attn_mask=float_mask(shape, dtype)), f"mask {shape}")


@check("a mask of one axis (S,)", "mask", "pytorch/pytorch#120810")
def check_mask_of_one_axis(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for mask in (torch.rand(19) < 0.6, float_mask((19,), dtype)):
        judge(attention, make(SIZES, dtype, device, attn_mask=mask), str(mask.dtype))


@check("a float mask gets its gradient, for every broadcast", "mask", "facebookresearch/xformers#636")
def check_mask_gradient(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        call = make(SIZES, dtype, device, attn_mask=float_mask(shape, dtype))
        judge(attention, call.replace(learned=("query", "key", "value", "attn_mask")), f"mask {shape}")


@check("a float mask gets its gradient when nothing else wants one", "mask", "pytorch/pytorch#188302")
def check_mask_gradient_alone(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device, attn_mask=float_mask((1, 2, 17, 19), dtype), learned=("attn_mask",))
    judge(attention, call)


@check("a float32 mask with 16-bit inputs", "mask", "pytorch/pytorch#99012, pytorch/pytorch#161489")
def check_wider_mask(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for each in (torch.float16, torch.bfloat16):
        judge(attention, make(SIZES, each, device, attn_mask=float_mask((17, 19), torch.float32)), str(each))


@check("a mask together with is_causal: both apply", "mask", "pytorch/pytorch#118972, nari-labs/dia#170")
def check_mask_and_causal(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 17, 19) < 0.6
    mask[..., 0] = True
    for each in (mask, float_mask((17, 19), dtype)):
        judge(attention, make(SIZES, dtype, device, attn_mask=each, is_causal=True), str(each.dtype))


@check("causal is the lower triangle from the top left, whatever L and S", "mask", "pytorch/executorch#22426")
def check_causal(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for n_queries, n_keys in ((17, 19), (19, 5), (1, 19)):
        call = make((1, 2, 2, n_queries, n_keys, 8, 8), dtype, device, is_causal=True)
        lower = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril()
        judge(attention, call, f"L {n_queries}, S {n_keys}")
        masked = call.replace(is_causal=False, attn_mask=lower).run(attention)
        agree(call.run(attention), masked, f"L {n_queries}, S {n_keys}, flag against mask")


@check("a mask of finfo.min means least of all, not never", "mask", LEAST)
def check_least_mask(attention: Attention, device: str, dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).min
    mask = torch.zeros(17, 19, dtype=dtype).masked_fill(torch.rand(17, 19) < 0.5, least)
    mask[:, 0] = 0.0
    judge(attention, make(SIZES, dtype, device, attn_mask=mask))


@check("a whole row of finfo.min is a row of equals, forward and backward", "mask", LEAST)
def check_rows_of_least(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.zeros(17, 19, dtype=dtype)
    mask[[0, 7]] = torch.finfo(dtype).min  # so low that adding a score changes nothing, but in float16
    judge(attention, make(SIZES, dtype, device, attn_mask=mask))


@check("a mask of blocks equals its blocks, one by one", "mask", "pytorch/pytorch#108503")
def check_blocks(attention: Attention, device: str, dtype: torch.dtype) -> None:
    starts = (0, 7, 20, 40)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    for a, b in zip(starts, starts[1:]):
        mask[a:b, a:b] = True
    call = make((1, 2, 2, 40, 40, 8, 8), dtype, device, attn_mask=mask)
    whole = call.run(attention)
    for a, b in zip(starts, starts[1:]):
        part = attention(*(x[:, :, a:b] for x in (call.query, call.key, call.value)))
        agree(whole[:, :, a:b], part, f"block {a} to {b}")


@check("keys masked out for whole tiles before the first allowed one", "mask", "pytorch/pytorch#127055")
def check_band_mask(attention: Attention, device: str, dtype: torch.dtype) -> None:
    band = torch.full((150, 150), -math.inf)
    band = torch.triu(band, 1) + torch.tril(band, -10)
    judge(attention, make((1, 1, 1, 150, 150, 8, 8), dtype, device, attn_mask=band.to(dtype)))


def with_empty_rows(kind: str, dtype: torch.dtype, device: str) -> tuple[Call, torch.Tensor]:
    """A call in which some queries may attend to no key, and which they are (B, H, L)."""
    allowed = torch.rand(2, 1, 17, 19) < 0.5
    allowed[..., 0] = True
    allowed[0, :, [0, 5, 16]] = False
    allowed[1] = False
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -math.inf)
    empty = ~allowed.any(-1).expand(2, 2, 17)
    return make(SIZES, dtype, device, attn_mask=mask), empty.to(device)


@check("output 0 in rows with no allowed key", "rows with no allowed key", EMPTY_FORWARD)
def check_empty_rows_forward(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for kind in ("bool", "float"):
        call, empty = with_empty_rows(kind, dtype, device)
        output = call.run(attention)
        assert not output[empty].isnan().any(), f"{kind} mask: NaN"
        assert not output[empty].any(), f"{kind} mask: not 0"
        assert output[~empty].isfinite().all(), f"{kind} mask: other rows are not finite"


@check("gradient 0 for rows with no allowed key, the right one for others", "rows with no allowed key", EMPTY_BACKWARD)
def check_empty_rows_backward(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for kind in ("bool", "float"):
        call, empty = with_empty_rows(kind, dtype, device)
        judge(attention, call, f"{kind} mask")
        grad = solve(call, attention)["gradient of query"]
        assert not grad[empty].any(), f"{kind} mask: gradient of such queries is not 0"


@check("a mask that forbids everything, with its own gradient", "rows with no allowed key", EMPTY_BACKWARD)
def check_everything_masked(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.full((17, 19), -math.inf, dtype=dtype)
    call = make(SIZES, dtype, device, attn_mask=mask, learned=("query", "key", "value", "attn_mask"))
    for name, x in solve(call, attention).items():
        assert torch.equal(x, torch.zeros_like(x)), f"{name} is not 0"


def dirtied(call: Call, keys: list[int], bad: float) -> Call:
    """The call with some keys and their values replaced by a bad number."""
    key, value = call.key.clone(), call.value.clone()
    key[:, :, keys], value[:, :, keys] = bad, bad
    return call.replace(key=key, value=value)


@check(
    "NaN and Inf in keys and values that are masked out change nothing",
    "NaN and Inf",
    "pytorch/pytorch#101967, Dao-AILab/flash-attention#2374, Dao-AILab/flash-attention#1745",
)
def check_bad_keys_behind_a_mask(attention: Attention, device: str, dtype: torch.dtype) -> None:
    keys = [0, 7, 18]
    mask = torch.rand(2, 1, 17, 19) < 0.7
    mask[..., 1], mask[..., keys] = True, False
    for kind in ("bool", "float"):
        each = mask if kind == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
        call = make(SIZES, dtype, device, attn_mask=each)
        clean = solve(call, attention)
        for bad in (math.nan, math.inf, -math.inf):
            dirty = solve(dirtied(call, keys, bad), attention)
            for name, x in dirty.items():
                assert not x.isnan().any(), f"{kind} mask: {bad} reaches the {name}"
                agree(x, clean[name], f"{kind} mask, {bad}: {name}")


@check("NaN in a later key never reaches an earlier query when causal", "NaN and Inf", "pytorch/pytorch#101967")
def check_bad_keys_later(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((1, 2, 2, 40, 40, 8, 8), dtype, device, is_causal=True)
    clean, dirty = (each.run(attention) for each in (call, dirtied(call, [20], math.nan)))
    assert not dirty[:, :, :20].isnan().any(), "it does"
    agree(dirty[:, :, :20], clean[:, :, :20], "queries before it")


@check("NaN that a query may see makes its output NaN", "NaN and Inf", "pytorch/pytorch#141128")
def check_visible_nan(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device)
    query = call.query.clone()
    query[0, 1, 3] = math.nan
    output = call.replace(query=query).run(attention)
    expected = torch.zeros(output.shape, dtype=torch.bool, device=device)
    expected[0, 1, 3] = True
    assert torch.equal(output.isnan(), expected), "a query of NaN: not NaN in exactly its row"
    output = dirtied(call, [4], math.nan).run(attention)
    assert output.isnan().all(), "a key and value of NaN that all may see: output without NaN"


@check("NaN in one head stays in that head", "NaN and Inf")
def check_nan_stays_in_its_head(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device)
    value, grad = call.value.clone(), call.grad.clone()
    value[1, 1], grad[1, 1] = math.nan, math.nan
    clean, dirty = (solve(each, attention) for each in (call, call.replace(value=value, grad=grad)))
    kept = torch.tensor([[True, True], [True, False]], device=device)
    same_bits({k: x[kept] for k, x in dirty.items()}, {k: x[kept] for k, x in clean.items()}, "the other heads")
