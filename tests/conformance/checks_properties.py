"""What must hold for every input: properties of attention, on random calls, run by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.conformance import formula
from tests.conformance.judge import Attention, Call, agree, exact_arguments, make, same_bits, solve
from tests.conformance.registry import check, keywords

EXAMPLES = 200
GPU_EXAMPLES = 20  # there most calls are compiled, half a second a kernel


def for_calls(examples: int, test: Callable[[Call, Random], None], device: str, dtype: torch.dtype) -> None:
    """Run `test` on random calls; those that a backend of PyTorch does not take do not count.

    The seeds are given, not drawn, so that every attention gets the same calls: what hypothesis draws depends on which
    modules are imported.
    """
    refused: list[RuntimeError] = []
    examples = min(examples, GPU_EXAMPLES) if device == "cuda" else examples

    @settings(phases=[Phase.explicit], deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers())
    def for_all(seed: int) -> None:
        draw = Random(seed)
        try:
            test(random_call(draw, device, dtype), draw)
        except RuntimeError as error:
            if not str(error).startswith("No available kernel"):
                raise
            refused.append(error)

    for seed in reversed(range(examples)):
        for_all = example(seed=seed)(for_all)
    for_all()
    if len(refused) == examples:
        raise refused[0]


def random_call(draw: Random, device: str, dtype: torch.dtype) -> Call:
    """Sizes, a mask of some kind or none, causal or not; PyTorch's arguments only."""
    hkv, group, batch = draw.randint(1, 2), draw.randint(1, 2), draw.randint(1, 2)
    n_queries, n_keys = (draw.choice([1, 2, 3, 15, 17, 33]) for _ in range(2))
    e = draw.choice([1, 2, 8, 17])
    ev = draw.choice([e, 1, 2, 8, 17])
    kind = draw.choice(["none", "causal", "bool", "float"])
    torch.manual_seed(draw.randint(0, 1000))
    shape = (batch, hkv * group, n_queries, n_keys)
    allowed = torch.rand(shape) < 0.6
    allowed[..., 0] = True
    masks = {"bool": allowed, "float": torch.randn(shape).masked_fill(~allowed, -math.inf).to(dtype)}
    sizes = (batch, hkv * group, hkv, n_queries, n_keys, e, ev)
    return make(sizes, dtype, device, attn_mask=masks.get(kind), is_causal=kind == "causal")


def on_keys(call: Call, change: Callable[[torch.Tensor, int, Any], torch.Tensor], pad: Any = 0.0) -> Call:
    """The call with keys, values and mask changed along the keys; `change(x, axis, what the mask gets for padding)`."""
    mask = call.attn_mask
    if mask is not None:
        mask = change(mask, -1, False if mask.dtype == torch.bool else -math.inf)
    return call.replace(key=change(call.key, -2, pad), value=change(call.value, -2, pad), attn_mask=mask)


def masked(call: Call) -> Call:
    """The call with its causal mask, if any, as a bool mask, so that keys may be moved."""
    if not call.is_causal:
        return call
    shape = (*call.query.shape[:-1], call.key.shape[-2])
    lower = torch.ones(shape, dtype=torch.bool, device=call.query.device).tril()
    return call.replace(is_causal=False, attn_mask=lower)


@check("permuting keys with their values and mask changes nothing", "mask")
def check_permuted_keys(attention: Attention, device: str, dtype: torch.dtype, examples: int = EXAMPLES) -> None:
    def test(call: Call, draw: Random) -> None:
        call = masked(call)
        order = torch.randperm(call.key.shape[-2], device=device)
        moved = on_keys(call, lambda x, axis, _: x.index_select(axis, order))
        before, after = solve(call, attention), solve(moved, attention)
        for name in ("key", "value"):
            before[f"gradient of {name}"] = before[f"gradient of {name}"].index_select(-2, order)
        for name, x in after.items():
            agree_within(x, before[name], before["output"], f"{describe(call)}: {name}")

    for_calls(examples, test, device, dtype)


def agree_within(a: torch.Tensor, b: torch.Tensor, output: torch.Tensor, what: str) -> None:
    """`agree`, for tensors that may be all but 0 because their terms cancel: such may differ by as many units of 1."""
    agree(torch.cat([a.flatten(), output.flatten()]), torch.cat([b.flatten(), output.flatten()]), what, slack=32.0)


def describe(call: Call) -> str:
    """The sizes of a call and its mask, for messages."""
    mask = "causal" if call.is_causal else "no mask" if call.attn_mask is None else f"{call.attn_mask.dtype} mask"
    return f"query {tuple(call.query.shape)}, value {tuple(call.value.shape)}, {mask}"


@check("adding a constant to a row of scores changes nothing", "mask")
def check_shifted_scores(attention: Attention, device: str, dtype: torch.dtype, examples: int = EXAMPLES) -> None:
    def test(call: Call, draw: Random) -> None:
        call = masked(call)
        bias = torch.randn(*call.query.shape[:-1], call.key.shape[-2]).to(call.query)
        if call.attn_mask is not None:
            mask = call.attn_mask
            bias = bias.masked_fill(~mask if mask.dtype == torch.bool else mask == -math.inf, -math.inf)
        bias = bias.round()  # whole numbers, to which a constant can be added without rounding
        constant = draw.choice([-64.0, -2.0, 1.0, 32.0])
        plain = call.replace(attn_mask=bias).run(attention)
        shifted = call.replace(attn_mask=bias + constant).run(attention)
        # Scores of 64 are rounded 64 times as coarsely as those of 1, and so is what exp makes of them.
        agree(shifted, plain, f"{describe(call)}, by {constant}", slack=16.0 + 8 * abs(constant))

    for_calls(examples, test, device, dtype)


def halves(call: Call, cut: int) -> list[Call]:
    """The call on the first `cut` keys, and on the others."""
    call = masked(call)
    n_keys = call.key.shape[-2]
    parts = [slice(0, cut), slice(cut, n_keys)]
    return [on_keys(call, lambda x, axis, _: x[(..., p, *[slice(None)] * (-1 - axis))]) for p in parts]


def lse_of(attention: Attention, call: Call) -> torch.Tensor:
    """The log-sum-exp an attention returns; the formula's, where it returns none."""
    if "return_lse" in keywords(attention):
        return call.run(attention, return_lse=True).lse
    return formula.attention(**exact_arguments(call, torch.float64)).lse


@check(
    "splitting the keys in two and merging by log-sum-exp equals the whole",
    "log-sum-exp",
    "zhuzilin/ring-flash-attention#30, NVIDIA/TransformerEngine#716, vllm-project/vllm#39148",
)
def check_split_keys(attention: Attention, device: str, dtype: torch.dtype, examples: int = EXAMPLES) -> None:
    def test(call: Call, draw: Random) -> None:
        parts = halves(call, draw.randint(0, call.key.shape[-2]))
        outputs = torch.stack([part.run(attention).double() for part in parts])
        lses = torch.stack([lse_of(attention, part).double() for part in parts])
        shares = torch.softmax(lses, 0).nan_to_num(0.0).unsqueeze(-1)  # NaN: neither half has an allowed key
        merged = (shares * outputs).sum(0).to(dtype)
        agree(merged, call.run(attention), f"{describe(call)}, {parts[0].key.shape[-2]} keys and the others")

    for_calls(examples, test, device, dtype)


@check("batch entries do not influence each other, bit for bit", "determinism", "Dao-AILab/flash-attention#47")
def check_batch_entries(attention: Attention, device: str, dtype: torch.dtype, examples: int = EXAMPLES) -> None:
    def test(call: Call, draw: Random) -> None:
        small = examples == EXAMPLES and call.query.shape[-2] * call.key.shape[-2] < 100
        more = draw.choice([1, 40] if small else [1, 3])  # 40: enough for another kernel to be chosen
        grown = {"query": torch.cat([call.query, torch.randn(more, *call.query.shape[1:]).to(call.query)])}
        for name in ("key", "value", "attn_mask", "grad"):
            x = getattr(call, name)
            if x is not None:
                grown[name] = torch.cat([x, x[:1].expand(more, *x.shape[1:])])
        among = call.replace(**grown)
        alone = among.replace(**{name: x[: call.query.shape[0]] for name, x in grown.items()})
        found = {name: x[: call.query.shape[0]] for name, x in solve(among, attention).items()}
        same_bits(solve(alone, attention), found, f"{describe(call)}, beside {more} others")

    for_calls(examples, test, device, dtype)


@check(
    "padding keys under a mask changes nothing, be they 0, NaN or Inf",
    "NaN and Inf",
    "pytorch/pytorch#101967, Dao-AILab/flash-attention#1745, Dao-AILab/flash-attention#1395",
)
def check_padded_keys(attention: Attention, device: str, dtype: torch.dtype, examples: int = EXAMPLES) -> None:
    def test(call: Call, draw: Random) -> None:
        if call.attn_mask is None and not call.is_causal:
            shape = (*call.query.shape[:-1], call.key.shape[-2])
            call = call.replace(attn_mask=torch.ones(shape, dtype=torch.bool, device=device))
        call = masked(call)
        n_keys, count = call.key.shape[-2], draw.choice([1, 5, 31])
        bad = draw.choice([0.0, math.nan, math.inf, -math.inf])

        def pad(x: torch.Tensor, axis: int, fill: Any) -> torch.Tensor:
            shape = [count if a == x.ndim + axis else n for a, n in enumerate(x.shape)]
            return torch.cat([x, x.new_full(shape, fill)], axis)

        before, after = solve(call, attention), solve(on_keys(call, pad, bad), attention)
        for name, x in after.items():
            if name in ("gradient of key", "gradient of value"):
                assert not x[:, :, n_keys:].any(), f"{describe(call)}: padding of {bad} gets a {name}"
                x = x[:, :, :n_keys]
            agree_within(x, before[name], before["output"], f"{describe(call)}, {count} keys of {bad}: {name}")

    for_calls(examples, test, device, dtype)
