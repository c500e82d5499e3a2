"""Wrong attentions, each with one mistake, and the checks that must find it out. Only tests use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from tests.conformance.judge import Attention
from tests.conformance.stand_in import (
    ScaledGradient,
    SquaredGradient,
    changed,
    in_python,
    output_of,
    right,
    with_arguments,
    with_gradient,
    with_output,
)


def grid_of_65535(f: Attention, **a: Any) -> torch.Tensor:
    """Heads past the 65,535th are left out, as by a grid that cannot hold them."""
    lead = a["query"].shape[:2]
    reached = torch.arange(math.prod(lead)).view(lead) < 65_535
    return f(**a) * reached[..., None, None]


def reads_its_neighbours(f: Attention, **a: Any) -> Any:
    """Zero times the number that lies before the keys is added to them, as by a tile that is off by one."""
    key = a["key"]
    before = key.as_strided((1,), (1,), max(key.storage_offset() - 1, 0))
    return f(**{**a, "key": key + 0.0 * before})


def as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The numbers of x read in the order in which they lie in memory, as by a kernel that does not look at strides."""
    if x.ndim != 4 or x.stride(-1) == 1 and 0 not in x.stride():
        return x
    numbers = torch.as_strided(x, (x.untyped_storage().size() // x.itemsize,), (1,), 0)
    return numbers.repeat(-(-x.numel() // len(numbers)))[: x.numel()].view(x.shape)


class FixedOrder(torch.autograd.Function):
    """The identity, whose gradient is right only if it comes in contiguous memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Read the gradient without its strides."""
        if grad.is_contiguous() or grad.transpose(1, 2).is_contiguous():
            return grad
        return grad.contiguous().flip(2)


counter = itertools.count()


def noisy(x: torch.Tensor) -> torch.Tensor:
    """x, one unit in the last place larger every second time."""
    return x * (1 + next(counter) % 2 * torch.finfo(x.dtype).eps)


def noisy_gradient(f: Attention, **a: Any) -> Any:
    """Gradients of queries and mask differ from run to run."""
    factor = 1 + next(counter) % 2 * 2e-7
    for name in ("query", "attn_mask"):
        if a[name] is not None and a[name].is_floating_point():
            a[name] = ScaledGradient.apply(a[name], factor)
    return f(**a)


def infinite_lse(f: Attention, **a: Any) -> Any:
    """+inf for rows with no allowed key."""
    result = f(**a)
    if isinstance(result, torch.Tensor):
        return result
    return result._replace(lse=result.lse.nan_to_num(0.0, neginf=math.inf))


def lse(change: Callable[[torch.Tensor], torch.Tensor]) -> Attention:
    """The right attention with its log-sum-exp changed."""

    def change_result(f: Attention, **a: Any) -> Any:
        result = f(**a)
        return result if isinstance(result, torch.Tensor) else result._replace(lse=change(result.lse))

    return changed(change_result)


def least_is_never(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask in which finfo.min has become -inf."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.masked_fill(mask < torch.finfo(mask.dtype).min / 2, -math.inf)


def no_mean(f: Attention, **a: Any) -> Any:
    """NaN where no key is allowed, as softmax has it."""
    result = f(**{**a, "return_lse": True})
    output = result.output.masked_fill(result.weights.sum(-1, keepdim=True) == 0, math.nan)
    return result._replace(output=output) if a["return_lse"] or a["need_weights"] else output


def leaky(f: Attention, **a: Any) -> Any:
    """NaN and Inf in any key or value reach everybody: zero times NaN is NaN."""
    bad = ~(torch.isfinite(a["key"]).all(-1) & torch.isfinite(a["value"]).all(-1))
    if a["key"].ndim != 4:
        return f(**a)
    return output_of(f(**a), lambda x: x.masked_fill(bad.any().view(1, 1, 1, 1), math.nan))


def swallows_nan(f: Attention, **a: Any) -> Any:
    """NaN becomes 0."""
    return output_of(f(**a), torch.nan_to_num)


def same_dropout_for_all(f: Attention, **a: Any) -> Any:
    """Every head and batch entry drops the same weights."""
    if not a["dropout_p"] or a["query"].ndim != 4:
        return f(**a)
    state = torch.get_rng_state()
    heads = []
    for b, h in itertools.product(*(range(n) for n in a["query"].shape[:2])):
        torch.set_rng_state(state)
        one = {name: a[name][b : b + 1, h : h + 1] for name in ("query", "key", "value")}
        heads.append(f(**{**a, **one}))
    return torch.cat(heads).view(*a["query"].shape[:-1], -1)


def forgets_dropout(f: Attention, **a: Any) -> Any:
    """The backward is that of no dropout."""
    plain = f(**{**a, "dropout_p": 0.0})
    return plain + (f(**a) - plain).detach() if a["dropout_p"] else plain


def not_enlarged(f: Attention, **a: Any) -> Any:
    """Dropout drops, and does not divide by 1 - p."""
    return output_of(f(**a), lambda x: x * (1 - a["dropout_p"]))


def unseeded(f: Attention, **a: Any) -> Any:
    """Dropout draws from nowhere known."""
    state = torch.get_rng_state()
    if a["dropout_p"]:
        torch.seed()
    result = f(**a)
    torch.set_rng_state(state)
    return result


def scale_of(a: dict[str, Any]) -> float:
    """The scale of a call."""
    return a["query"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]


def one_key_more(f: Attention, **a: Any) -> Any:
    """Causal, and one key too many."""
    if not a["is_causal"] or a["window"] is not None:
        return f(**a)
    return f(**{**a, "is_causal": False, "window": (None, 1)})


def blocks_of(size: int) -> Attention:
    """Keys that do not fill the last block of this size are left out."""

    def change(f: Attention, **a: Any) -> Any:
        n = a["key"].shape[-2]
        rest = n % size if n > size else 0
        if a["attn_mask"] is not None or a["key_lengths"] is not None or not rest or a["dropout_p"]:
            return f(**a)
        return f(**{**a, "key": a["key"][..., : n - rest, :], "value": a["value"][..., : n - rest, :]})

    return changed(change)


def only(condition: Callable[[dict[str, Any]], bool], change: Callable[..., Any] | None = None) -> Attention:
    """Wrong (zero, or as `change` has it) only for calls of some kind; right otherwise."""
    wrong = change or (lambda f, **a: output_of(f(**a), lambda x: x * 0.5))
    return changed(lambda f, **a: wrong(f, **a) if condition(a) else f(**a))


def ones_with_gradient(f: Attention, **a: Any) -> Any:
    """1 where there is no key to attend to."""
    return output_of(f(**a), lambda x: x + 1.0) if 0 in (a["key"].shape[-2], a["query"].shape[-2]) else f(**a)


def quick_exp(f: Attention, **a: Any) -> Any:
    """exp without subtracting the largest score: nothing is left below -88, and above 88 it is inf over inf."""
    result = f(**{**a, "return_lse": True, "need_weights": True})
    lost = (result.lse < -88).unsqueeze(-1) & (result.lse != -math.inf).unsqueeze(-1)
    output = result.output.masked_fill(lost, 0.0).masked_fill((result.lse > 88).unsqueeze(-1), math.nan)
    return result._replace(output=output, lse=result.lse.clamp(min=-88.0)) if a["return_lse"] else output


def casts(dtype: torch.dtype) -> Attention:
    """Computes in another dtype."""

    def change(f: Attention, **a: Any) -> Any:
        if a["query"].dtype == dtype:
            return f(**a)
        inner = {k: a[k].to(dtype) for k in ("query", "key", "value")}
        return output_of(f(**{**a, **inner}), lambda x: x.to(a["query"].dtype))

    return changed(change)


def one_by_one(f: Attention, **a: Any) -> Any:
    """Batch entries one by one, so that none can influence another."""
    names = [name for name in ("query", "key", "value", "attn_mask") if a[name] is not None]
    return torch.cat([f(**{**a, **{name: a[name][b : b + 1] for name in names}}) for b in range(len(a["query"]))])


def by_batch(f: Attention, **a: Any) -> Any:
    """The same, with another order of sums for a large batch: one unit in the last place."""
    output = one_by_one(f, **a)
    return output * (1 + torch.finfo(output.dtype).eps) if len(output) > 8 else output


def wrong_when_compiled(f: Attention, **a: Any) -> Any:
    """Half the output in a graph."""
    return f(**a) * (0.5 if torch.compiler.is_compiling() else 1.0)


class HalfUnderVmap(torch.autograd.Function):
    """The identity; half of it under vmap, of values and of gradients."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient, by way of the same mistake."""
        return HalfUnderVmap.apply(grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return half of it."""
        return 0.5 * x, in_dims[0]


def accepts_anything(f: Attention, **a: Any) -> Any:
    """Any error becomes a result."""
    try:
        return f(**a)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return torch.zeros_like(a["query"])


def second_gradient(f: Attention, **a: Any) -> Any:
    """A right gradient with half a graph behind it."""
    return f(**{**a, "query": SquaredGradient.apply(a["query"])})


class NoTangent(torch.autograd.Function):
    """The identity, whose forward derivative is silently 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros_like(tangent)


LEARNED = {name: with_gradient(name, 1.05) for name in ("query", "key", "value", "attn_mask", "sinks")}
# Each wrong attention, and the checks that must find it out. Every check but those of a GPU must be here.
WRONG: dict[str, tuple[Attention, list[str]]] = {
    "scale off by 2 %": (
        changed(lambda f, **a: f(**{**a, "scale": 1.02 * scale_of(a)})),
        [
            "own_samples",
            "shared_heads",
            "value_width",
            "shared_heads_and_value_width",
            "head_sizes",
            "wide_heads",
            "single_query",
            "ranks",
            "dtypes",
            "float64",
            "scales",
            "check_lse",
        ],
    ),
    "scale of another sign below 0": (with_arguments(scale=lambda x: abs(x) if x else x), ["scales"]),
    "gradient of the queries off by 5 %": (
        LEARNED["query"],
        ["own_samples", "strides", "zero_strides", "float64", "large_scores"],
    ),
    "gradient of the keys off by 5 %": (LEARNED["key"], ["own_samples", "lengths_beside_a_tile", "lse_gradient"]),
    "gradient of the values off by 5 %": (LEARNED["value"], ["single_key", "upstream_gradient_strides"]),
    "gradient of the mask off by 5 %": (LEARNED["attn_mask"], ["mask_gradient", "mask_gradient_alone"]),
    "gradient of the sinks off by 5 %": (LEARNED["sinks"], ["sink_gradient"]),
    "keys past a multiple of 16 left out": (blocks_of(16), ["lengths_beside_a_tile"]),
    "heads past the 65,535th left out": (changed(grid_of_65535), ["65536_heads", "80000_batch_entries"]),
    "1 where there is no key": (changed(ones_with_gradient), ["no_keys_and_no_queries"]),
    "refuses an empty batch": (only(lambda a: a["query"].shape[0] == 0, lambda f, **a: 1 / 0), ["empty_batch"]),
    "wrong for a query of lower rank": (only(lambda a: a["query"].ndim < a["key"].ndim), ["own_samples_of_two_ranks"]),
    "strides not looked at": (
        with_arguments(key=as_if_contiguous, value=as_if_contiguous, query=as_if_contiguous),
        ["strides", "zero_strides"],
    ),
    "strides of the upstream gradient not looked at": (with_output(FixedOrder.apply), ["upstream_gradient_strides"]),
    "contiguous output": (with_output(torch.Tensor.contiguous), ["output_strides"]),
    "nothing left of scores below -88 and above 88": (
        changed(quick_exp),
        ["very_negative_scores", "large_scores", "low_lse"],
    ),
    "mask dropped": (
        with_arguments(attn_mask=None),
        [
            "bool_masks",
            "float_masks",
            "mask_of_one_axis",
            "wider_mask",
            "mask_and_causal",
            "blocks",
            "band_mask",
            "least_mask",
        ],
    ),
    "causality dropped": (with_arguments(is_causal=False), ["causal", "bad_keys_later", "mask_and_causal"]),
    "causal, one key too many": (changed(one_key_more), ["causal", "bottom_right", "widest_window"]),
    "finfo.min taken for -inf": (with_arguments(attn_mask=least_is_never), ["rows_of_least"]),
    "NaN where no key is allowed": (
        changed(no_mean),
        [
            "empty_rows_forward",
            "empty_rows_backward",
            "everything_masked",
            "empty_windows",
            "sink_of_empty_rows",
            "key_length_of_0",
            "no_keys_and_no_queries",
        ],
    ),
    "NaN leaks from behind a mask": (
        changed(leaky),
        ["bad_keys_behind_a_mask", "bad_keys_later", "padded_keys", "nan_stays_in_its_head", "nan_past_key_lengths"],
    ),
    "NaN swallowed": (changed(swallows_nan), ["visible_nan"]),
    "weights by position": (
        changed(lambda f, **a: f(**{**a, "alibi_slopes": torch.full(a["query"].shape[1:2], 0.1)})),
        ["permuted_keys"],
    ),
    "scores above 20 cut off": (
        changed(
            lambda f, **a: (
                f(**{**a, "attn_mask": a["attn_mask"].clamp(max=20.0)})
                if a["attn_mask"] is not None and a["attn_mask"].is_floating_point()
                else f(**a)
            )
        ),
        ["shifted_scores"],
    ),
    "dropout of its own": (changed(unseeded), ["dropout_follows_the_seed", "own_samples_with_dropout"]),
    "no dropout": (with_arguments(dropout_p=0.0), ["dropout_keeps_the_mean", "dropping_everything"]),
    "dropout without enlarging the rest": (changed(not_enlarged), ["dropout_keeps_the_mean"]),
    "all heads drop the same": (changed(same_dropout_for_all), ["dropout_is_independent"]),
    "dropout not replayed in the backward": (changed(forgets_dropout), ["dropout_is_replayed"]),
    "dropout that a checkpoint does not replay": (
        only(lambda a: a["dropout_p"], lambda f, **a: f(**{**a, "dropout_p": 0.3 + next(counter) % 2 * 0.01})),
        ["checkpoint"],
    ),
    "an output that wavers": (with_output(noisy), ["repeated_runs", "deterministic_argument"]),
    "gradients that waver": (changed(noisy_gradient), ["repeated_runs", "repeated_mask_gradients"]),
    "an output that depends on the batch": (changed(by_batch), ["batch_entries", "batch_of_one"]),
    "log-sum-exp to the base 2": (lse(lambda x: x / math.log(2)), ["check_lse", "low_lse", "split_keys"]),
    "log-sum-exp of +inf for no key": (changed(infinite_lse), ["lse_of_empty_rows"]),
    "log-sum-exp without a graph": (lse(torch.Tensor.detach), ["lse_gradient"]),
    "weights of the scores": (
        changed(lambda f, **a: r._replace(weights=r.weights + 1e-3) if a["need_weights"] and (r := f(**a)) else f(**a)),
        ["weights"],
    ),
    "alignment ignored": (
        with_arguments(causal_alignment="top_left"),
        ["bottom_right", "window_bottom_right", "slopes_bottom_right", "key_lengths_bottom_right"],
    ),
    "a window one key too narrow": (
        with_arguments(window=lambda w: w and (w[0] and w[0] - 1, w[1])),
        ["windows", "long_window", "widest_window", "window_bottom_right"],
    ),
    "softcap after tanh left out": (
        changed(lambda f, **a: f(**{**a, "softcap": None, "scale": scale_of(a)})),
        ["softcap", "softcap_of_large_scores", "everything_at_once"],
    ),
    "slopes of another sign": (with_arguments(alibi_slopes=lambda x: x if x is None else -x), ["check_slopes"]),
    "sinks ignored": (with_arguments(sinks=None), ["check_sinks", "sink_gradient", "sink_of_empty_rows"]),
    "key lengths ignored": (with_arguments(key_lengths=None), ["check_key_lengths", "key_length_of_0"]),
    "a second gradient off by half": (changed(second_gradient), ["double_backward"]),
    "tangents of 0": (
        changed(lambda f, **a: f(**{**a, **{k: NoTangent.apply(a[k]) for k in ("query", "key", "value")}})),
        ["forward_mode"],
    ),
    "half the output under vmap": (with_output(HalfUnderVmap.apply), ["check_vmap", "vmap_of_gradients"]),
    "half the output when compiled": (changed(wrong_when_compiled), ["compiled"]),
    "float32 under autocast": (
        only(lambda a: torch.is_autocast_enabled("cpu"), lambda f, **a: f(**a).float()),
        ["autocast"],
    ),
    "16 bits inside": (casts(torch.bfloat16), ["own_samples", "dtypes", "float64"]),
    "writes past its output": (in_python("output"), ["bands_of_outputs"]),
    "writes past its gradients": (in_python("gradient"), ["bands_of_outputs"]),
    "writes into the upstream gradient": (in_python("upstream gradient"), ["inputs_are_left_alone"]),
    "reads past its keys": (changed(reads_its_neighbours), ["bands_of_inputs"]),
    "keeps L x S weights": (right, ["what_is_saved"]),
    "refuses nothing": (
        changed(accepts_anything),
        ["lengths_differ", "heads_differ", "masks_that_do_not_fit", "dropout_out_of_range", "bad_options"],
    ),
}
