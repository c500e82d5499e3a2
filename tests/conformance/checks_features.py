"""What PyTorch's attention does not have: log-sum-exp, weights, alignment, windows, caps, slopes, sinks, lengths."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.conformance.judge import Attention, Call, agree, compare, exact, judge, make, solve
from tests.conformance.registry import check

SIZES = (2, 2, 1, 17, 23, 8, 8)
LSE = "pytorch/pytorch#181645, flashinfer-ai/flashinfer#2113"


def judge_lse(attention: Attention, call: Call, what: str = "") -> torch.Tensor:
    """Hold output and log-sum-exp, without gradients, to the formula; return the log-sum-exp."""
    call = call.replace(results=("output", "lse"), learned=())
    found = solve(call, attention)
    for one in compare(found, call):
        one.judge(what)
    return found["lse"]


@check("the log-sum-exp is natural", "log-sum-exp", LSE, needs=("return_lse",))
def check_lse(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for is_causal in (False, True):
        judge_lse(attention, make(SIZES, dtype, device, is_causal=is_causal), f"causal {is_causal}")


@check(
    "the log-sum-exp is -inf in rows with no allowed key, and for no keys",
    "log-sum-exp",
    "Dao-AILab/flash-attention#978, deepseek-ai/FlashMLA#77",
    needs=("return_lse",),
)
def check_lse_of_empty_rows(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 17, 23) < 0.5
    mask[:, :, [0, 4]] = False
    judge_lse(attention, make(SIZES, dtype, device, attn_mask=mask), "mask")
    judge_lse(attention, make((2, 2, 2, 5, 0, 8, 8), dtype, device), "no keys")


@check(
    "the log-sum-exp is right far below -88",
    "log-sum-exp",
    "flashinfer-ai/flashinfer#4267, zhuzilin/ring-flash-attention#30",
    needs=("return_lse",),
)
def check_low_lse(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for size in (-100.0, -60_000.0):
        call = make((1, 2, 2, 17, 23, 16, 16), dtype, device)
        call.query[..., 0], call.key[..., 0] = 64.0, size / 16  # adds `size` to every score
        lse = judge_lse(attention, call, f"scores near {size:,.0f}")
        assert (lse < -88).all(), "the check itself is wrong"


@check(
    "the log-sum-exp is differentiable",
    "log-sum-exp",
    "Dao-AILab/flash-attention#889, pytorch/pytorch#136232",
    needs=("return_lse",),
)
def check_lse_gradient(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 17, 23) < 0.5
    mask[..., 0] = True
    judge(attention, make(SIZES, dtype, device, attn_mask=mask, results=("output", "lse")))


@check(
    "the weights are the softmax, and 0 in rows with no allowed key",
    "weights",
    "pytorch/pytorch#160064, pytorch/pytorch#152028",
    needs=("need_weights",),
)
def check_weights(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 17, 23) < 0.5
    mask[:, :, [0, 4]] = False
    for case in ({"attn_mask": mask}, {"is_causal": True}):
        call = make(SIZES, dtype, device, **case, results=("output", "weights"), learned=())
        found = solve(call, attention)
        for one in compare(found, call):
            one.judge()
        assert not found["weights"][exact(call)["weights"] == 0].any(), "a forbidden key has weight"
        agree(found["output"], call.run(attention), "the output beside the weights")


def judge_options(attention: Attention, device: str, dtype: torch.dtype, cases: list[dict[str, Any]]) -> None:
    """Judge a call for each set of arguments, "sizes" among them."""
    for case in cases:
        call = make(**{"sizes": SIZES, "dtype": dtype, "device": device, **case})
        judge(attention, call, ", ".join(f"{k} {describe(x)}" for k, x in case.items()))


def describe(x: Any) -> str:
    """A tensor by its numbers, rounded; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return str(x)
    return f"of shape {tuple(x.shape)}" if x.numel() > 8 else str([round(y, 2) for y in x.flatten().tolist()])


SHORT, LONG = (2, 2, 2, 5, 23, 8, 8), (2, 2, 2, 23, 5, 8, 8)  # fewer queries than keys, and more


@check(
    "causal from the bottom right, for any L and S",
    "alignment",
    "pytorch/pytorch#108108, pytorch/pytorch#115111, Dao-AILab/flash-attention#282, Dao-AILab/flash-attention#1778, "
    "Dao-AILab/flash-attention#443",
    needs=("causal_alignment",),
)
def check_bottom_right(attention: Attention, device: str, dtype: torch.dtype) -> None:
    cases = [{"sizes": sizes, "is_causal": True, "causal_alignment": "bottom_right"} for sizes in (SHORT, LONG, SIZES)]
    judge_options(attention, device, dtype, [*cases, {**cases[0], "sizes": (1, 2, 2, 1, 23, 8, 8)}])


@check(
    "a window of keys on both sides, or one",
    "window",
    "Dao-AILab/flash-attention#1133, huggingface/transformers#39408",
    needs=("window",),
)
def check_windows(attention: Attention, device: str, dtype: torch.dtype) -> None:
    windows = [(3, 2), (0, 0), (None, 1), (4, None), (16, 0)]
    judge_options(attention, device, dtype, [{"window": window} for window in windows])
    judge_options(attention, device, dtype, [{"window": (3, 2), "is_causal": True}])


@check(
    "a window of S - 1 keys to the left and none to the right is causal",
    "window",
    "Dao-AILab/flash-attention#1133",
    needs=("window",),
)
def check_widest_window(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((1, 2, 2, 40, 40, 8, 8), dtype, device, is_causal=True)
    for window in ((39, 0), (None, 0), (1000, 0)):
        agree(call.replace(is_causal=False).run(attention, window=window), call.run(attention), f"window {window}")


@check("queries whose window holds no key give 0", "window", "Dao-AILab/flash-attention#2199", needs=("window",))
def check_empty_windows(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge_options(attention, device, dtype, [{"sizes": LONG, "window": (2, 1)}])
    call = make(LONG, dtype, device)
    assert not call.run(attention, window=(2, 1))[:, :, 7:].any(), "not 0"


@check(
    "a window from the bottom right", "window", "Dao-AILab/flash-attention#1778", needs=("window", "causal_alignment")
)
def check_window_bottom_right(attention: Attention, device: str, dtype: torch.dtype) -> None:
    cases = [{"sizes": each, "window": (3, 2), "causal_alignment": "bottom_right"} for each in (SHORT, LONG)]
    judge_options(attention, device, dtype, cases)


@check("a window over several tiles", "window", "flagos-ai/FlagAttention#25", needs=("window",))
def check_long_window(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge_options(attention, device, dtype, [{"sizes": (1, 1, 1, 150, 150, 8, 8), "window": (9, 0)}])


@check(
    "scores are capped, forward and backward",
    "softcap",
    "Dao-AILab/flash-attention#2402, Dao-AILab/flash-attention#2544",
    needs=("softcap",),
)
def check_softcap(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.randn(17, 23).masked_fill(torch.rand(17, 23) < 0.2, -math.inf)
    mask[:, 0] = 0.0
    cases: list[dict[str, Any]] = [{"softcap": 0.7}, {"softcap": 30.0, "is_causal": True}]
    judge_options(attention, device, dtype, [*cases, {"softcap": 2.0, "attn_mask": mask.to(dtype)}])


@check("scores far above the cap stay finite", "softcap", "vllm-project/vllm#56578", needs=("softcap",))
def check_softcap_of_large_scores(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge_options(attention, device, dtype, [{"softcap": 5.0, "scale": 300.0}, {"softcap": 5.0, "scale": -300.0}])


SLOPES = torch.tensor([0.5, -0.3])


@check(
    "slopes by distance, per head or per batch entry and head",
    "slopes",
    "Dao-AILab/flash-attention#540, Dao-AILab/flash-attention#1585",
    needs=("alibi_slopes",),
)
def check_slopes(attention: Attention, device: str, dtype: torch.dtype) -> None:
    both = torch.stack([SLOPES, SLOPES * 0.7])
    judge_options(attention, device, dtype, [{"alibi_slopes": SLOPES}, {"alibi_slopes": both, "is_causal": True}])


@check(
    "slopes from the bottom right when L and S differ",
    "slopes",
    "Dao-AILab/flash-attention#907",
    needs=("alibi_slopes", "causal_alignment"),
)
def check_slopes_bottom_right(attention: Attention, device: str, dtype: torch.dtype) -> None:
    options = {"alibi_slopes": SLOPES, "causal_alignment": "bottom_right"}
    judge_options(attention, device, dtype, [{"sizes": each, "is_causal": True, **options} for each in (SHORT, LONG)])


SINKS = torch.tensor([0.5, 3.0])


@check("a sink takes weight and gives no value", "sinks", "Dao-AILab/flash-attention#1797", needs=("sinks",))
def check_sinks(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge_options(attention, device, dtype, [{"sinks": SINKS}, {"sinks": SINKS, "is_causal": True}])
    judge_options(attention, device, dtype, [{"sinks": torch.tensor(x)} for x in ([200.0, -200.0], [-math.inf, 0.0])])


@check(
    "a sink gets its gradient",
    "sinks",
    "Dao-AILab/flash-attention#1973, Dao-AILab/flash-attention#2102, Dao-AILab/flash-attention#1895",
    needs=("sinks",),
)
def check_sink_gradient(attention: Attention, device: str, dtype: torch.dtype) -> None:
    learned = ("query", "key", "value", "sinks")
    judge_options(attention, device, dtype, [{"sinks": SINKS, "learned": learned, "is_causal": True}])


@check(
    "a row with no allowed key has the sink for its log-sum-exp",
    "sinks",
    "ROCm/rocm-libraries#12229",
    needs=("sinks", "return_lse"),
)
def check_sink_of_empty_rows(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 17, 23) < 0.5
    mask[:, :, [0, 4]] = False
    call = make(SIZES, dtype, device, attn_mask=mask, sinks=SINKS)
    judge_lse(attention, call)
    assert not call.run(attention)[:, :, [0, 4]].any(), "output of such rows is not 0"


@check(
    "keys past the length of their batch entry do not exist",
    "key lengths",
    "pytorch/pytorch#81077",
    needs=("key_lengths",),
)
def check_key_lengths(attention: Attention, device: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([23, 6])
    judge_options(attention, device, dtype, [{"key_lengths": lengths}, {"key_lengths": lengths, "is_causal": True}])


@check(
    "a batch entry of length 0 gives 0 and gets gradient 0",
    "key lengths",
    "facebookresearch/xformers#1042, pytorch/pytorch#81077",
    needs=("key_lengths",),
)
def check_key_length_of_0(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge_options(attention, device, dtype, [{"key_lengths": torch.tensor([0, 1])}])


@check(
    "NaN past the length of a batch entry changes nothing, bit for bit",
    "key lengths",
    "Dao-AILab/flash-attention#2374, Dao-AILab/flash-attention#1745, sgl-project/sglang#18685",
    needs=("key_lengths",),
)
def check_nan_past_key_lengths(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device, key_lengths=torch.tensor([20, 6]))
    key, value = call.key.clone(), call.value.clone()
    for x in (key, value):
        x[0, :, 20:], x[1, :, 6:] = math.nan, math.inf
    clean, dirty = call.run(attention), call.replace(key=key, value=value).run(attention)
    assert torch.equal(clean, dirty), f"{int((clean != dirty).sum())} numbers differ"


@check(
    "key lengths with causal, window and slopes from the bottom right",
    "key lengths",
    "Dao-AILab/flash-attention#1417",
    needs=("key_lengths", "causal_alignment", "window", "alibi_slopes"),
)
def check_key_lengths_bottom_right(attention: Attention, device: str, dtype: torch.dtype) -> None:
    base = {"key_lengths": torch.tensor([21, 3]), "causal_alignment": "bottom_right"}
    cases = [{"is_causal": True}, {"window": (4, 1)}, {"alibi_slopes": SLOPES}]
    judge_options(attention, device, dtype, [{**base, **case} for case in cases])


EVERYTHING = ("causal_alignment", "window", "softcap", "alibi_slopes", "sinks", "key_lengths")


@check("all of them at once, forward and backward", "alignment", needs=EVERYTHING)
def check_everything_at_once(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.randn(2, 1, 17, 23).masked_fill(torch.rand(2, 1, 17, 23) < 0.2, -math.inf)
    case = {
        "attn_mask": mask.to(dtype),
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "window": (9, 2),
        "softcap": 3.0,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "key_lengths": torch.tensor([22, 19]),
    }
    judge_options(attention, device, dtype, [case])
