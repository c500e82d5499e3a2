"""The public attention: choice of backend, any number of dimensions to four, and the call."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch

from kernels import backend as backends
from kernels.again import Known, is_plain, layouts, remember
from kernels.attention.call import FAR, NO_TENSORS, TENSORS, Call
from kernels.attention.checks import as_flag, check, check_options, leads_of
from kernels.attention.cpu import route
from kernels.attention.cpu.simple import simple_attention
from kernels.attention.formula import alibi, composed_attention
from kernels.attention.ops import Attention, known_forward, settings
from kernels.attention.plan import needs_statistics
from kernels.attention.subclasses import on_heads, on_values
from kernels.attention.tiles import MAX_HEAD_SIZE
from kernels.autograd import differentiable, in_forward_mode
from kernels.backend import (
    Choice,
    as_autocast,
    as_number,
    autocast_dtype,
    check_tensor_types,
    choose,
    shown,
    wants_gradient,
)
from kernels.subclasses import holds_others, overridden

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AttentionResult", "Options", "scaled_dot_product_attention"]


class AttentionResult(NamedTuple):
    """What `scaled_dot_product_attention` returns when it is asked for more than the output.

    output: (..., Hq, L, Ev).
    lse: (..., Hq, L), the natural logarithm of the sum of exp(score) over the keys a query may attend to, its sink
        included; -inf where there are none. float32 (or float64), differentiable. None unless `return_lse`.
    weights: (..., Hq, L, S), the softmax before dropout, dtype of the output. None unless `need_weights`.
    """

    output: torch.Tensor
    lse: torch.Tensor | None
    weights: torch.Tensor | None


class Options(TypedDict, total=False):
    """What `scaled_dot_product_attention` can be asked for that PyTorch's has not; explained there."""

    causal_alignment: str
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    key_lengths: torch.Tensor | None
    deterministic: bool | None


@overload
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    need_weights: Literal[False] = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    **options: Unpack[Options],
) -> torch.Tensor: ...


@overload
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    need_weights: Literal[True],
    return_lse: bool = ...,
    backend: str = ...,
    **options: Unpack[Options],
) -> AttentionResult: ...


@overload
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    need_weights: bool = ...,
    return_lse: Literal[True],
    backend: str = ...,
    **options: Unpack[Options],
) -> AttentionResult: ...


@overload
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    need_weights: bool = ...,
    return_lse: bool = ...,
    backend: str = ...,
    **options: Unpack[Options],
) -> torch.Tensor | AttentionResult: ...


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    need_weights: bool = False,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Any:
    """Attend: mix the values by how well each query fits each key.

        output = dropout(softmax(scale * query key^T + attn_mask)) value

    Takes the place of `torch.nn.functional.scaled_dot_product_attention`: the positional arguments are the same. On a
    GPU no L x S matrix is stored, forward or backward, unless slopes learn or weights are asked for. A query that may
    attend to no key gets output 0 and sends back gradient 0. NaN and Inf in keys and values that a query may not attend
    to never reach it; one that it may attend to makes its whole output row NaN under a mask. Dropout draws from torch's
    generator, so `torch.manual_seed` repeats it.

    Args:
        query: (..., Hq, L, E), float16, bfloat16, float32, or float64 on the CPU; any strides. Also (L, E), (N, L, E).
            Also a jagged nested tensor (N, Hq, L*, E), as keys and values then are (without mask, lengths and weights),
            or a DTensor sharded along batch or heads, as all tensors then are (without dropout).
        key: (..., Hkv, S, E), dtype and device of the query.
        value: (..., Hkv, S, Ev). Leading dimensions of the three broadcast.
        attn_mask: broadcastable to (..., Hq, L, S). bool: True = may attend. Floating point: added to the scores
            (natural units; -inf forbids), and differentiable. With `is_causal` both apply.
        dropout_p: probability, 0 to 1, of dropping each weight; the others are divided by 1 - dropout_p.
        is_causal: a query may attend to the keys up to its own place only.
        scale: factor of the scores; None for 1 / sqrt(E).
        enable_gqa: query heads share key and value heads, Hq / Hkv of them each (grouped-query attention).
        causal_alignment: where query i has its place when L != S, for `is_causal`, `window` and `alibi_slopes`:
            "top_left" beside key i; "bottom_right" beside key i + S - L, so that the last query stands beside the last
            key (of those in use, with `key_lengths`).
        window: (left, right), how many keys before and after its own place a query may attend to, None for all. Keys
            outside are not read.
        softcap: scores become softcap * tanh(score / softcap), before mask and slopes.
        alibi_slopes: (Hq,) or (..., Hq); each score is lowered by slope * |place of the query - key|. Differentiable:
            then a float mask is made of them, L x S a head.
        sinks: (Hq,), a logit a head that takes part in the softmax and has no value: weight that goes nowhere.
            Differentiable.
        key_lengths: (...) without the heads, usually (B,), int32 or int64: how many keys of each batch entry are in
            use. Later ones are not read. On a GPU, lengths outside 0 to S are clamped.
        need_weights: return the weights too, an L x S matrix a head. They are computed anew.
        return_lse: return the log-sum-exp of each row too.
        deterministic: True wants bitwise equal results from run to run, None what
            `torch.are_deterministic_algorithms_enabled` says. All kernels give them but the backward for Hopper chips.
        backend: "triton" for this package's kernels, "torch" for PyTorch's own, "auto" for the former where they can
            run; `kernels.explain` tells which.

    Returns:
        (..., Hq, L, Ev), dtype of the query (under autocast: of autocast), heads and rows ordered in memory as its are.
        With `need_weights` or `return_lse`, an `AttentionResult`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices, a number or backend do not fit, or backend="triton" cannot run.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1; online softmax and backward as in Dao 2023,
    "FlashAttention-2", section 3.1; shared heads: Ainslie et al. 2023, "GQA", section 2.2; slopes: Press et al. 2022,
    "Train Short, Test Long", section 3; window: Beltagy et al. 2020, "Longformer", section 3.1; softcap: Gemma Team
    2024, "Gemma 2", section 2; sinks: Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks",
    section 3, and Miller 2023, "Attention Is Off By One".
    """
    tensors = query, key, value, attn_mask, alibi_slopes, sinks, key_lengths
    options: Options = {
        "causal_alignment": causal_alignment,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "key_lengths": key_lengths,
        "deterministic": deterministic,
    }
    if torch.overrides.has_torch_function(tensors):
        return overridden(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            **options,
            need_weights=need_weights,
            return_lse=return_lse,
            backend=backend,
        )
    asked = None
    if not (need_weights or return_lse):
        found = simple_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, options, backend
        )
        if found is not None:
            return found
        asked = _what_is_looked_at(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, options, backend
        )
        if asked is not None and asked in CHECKED and not backends.why_not_triton(query.device, query.dtype):
            call, known = CHECKED[asked]
            if known is not None and not wants_gradient(query, key, value, attn_mask):
                return known.run((query, key, value, attn_mask, *NO_TENSORS[1:]), query.device)[0]
            if attn_mask is not None:
                call = call._replace(attn_mask=attn_mask[(None,) * (4 - attn_mask.ndim)])
            return triton_attention(query, key, value, call, False, known)[0]
    if (
        not type(query) is type(key) is type(value) is torch.Tensor
        or query.is_nested
        or key.is_nested
        or value.is_nested
    ):
        check_tensor_types({"query": query, "key": key, "value": value})
        if holds_others(query, key, value):
            return _on_what_they_hold(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                **options,
                need_weights=need_weights,
                return_lse=return_lse,
                backend=backend,
            )
    plain = not (need_weights or return_lse) and _are_defaults(options)
    is_causal, enable_gqa = as_flag("is_causal", is_causal), as_flag("enable_gqa", enable_gqa)
    check(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    backend = choose_backend(query, value, backend).backend
    if plain and attn_mask is not None:  # PyTorch adds the mask to scores of the query's and key's dimensions alone
        end = -3 if enable_gqa else -2
        plain = query.shape[:end] == key.shape[:end] == value.shape[:end]
    if plain and backend == "torch" and not route.why_formula(query, key, value, attn_mask):
        dropout_p, scale = as_number(dropout_p), as_number(scale)
        return route.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if backend == "triton":
        query, key, value = as_autocast(query, key, value)
    lead, q, k, v, call = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options)
    if backend == "torch" or in_forward_mode():
        results: tuple[Any, ...] = route.extended_attention(
            q, k, v, call, need_lse=return_lse, need_weights=need_weights
        )
    else:
        output, lse = triton_attention(q, k, v, call, return_lse)
        if asked is not None and q is query and k is key and v is value:
            known = None if call.dropout_p else known_forward(q, k, v, call)
            if known is not None or call.dropout_p:
                remember(CHECKED, asked, (call._replace(attn_mask=None), known))
        results = output, lse, None
        if need_weights:
            _, _, weights = composed_attention(q, k, v, call._replace(dropout_p=0.0), need_lse=False)
            results = output, lse, weights
    if len(lead) == 2:
        result = AttentionResult(*results)
    else:
        result = AttentionResult(*(x if x is None else x.reshape(*lead, *x.shape[2:]) for x in results))  # type: ignore
    return result if need_weights or return_lse else result.output


# What plain calls ask that were found right and go to the Triton kernels, and what is known of those without dropout.
CHECKED: dict[Hashable, tuple[Call, Known | None]] = {}


def _what_is_looked_at(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    options: Options,
    backend: str,
) -> Hashable:
    """All that checks and `prepare` look at in a plain call on (B, H, L, E); None for other calls, right or wrong."""
    if query is None or key is None or value is None or (getattr(query, "is_cpu", False) and not backends.INTERPRETED):
        return None
    if not is_plain(query, key, value, attn_mask):
        return None
    if torch._C._is_any_autocast_enabled() or not (
        type(dropout_p) is float
        and type(is_causal) is type(enable_gqa) is bool
        and (scale is None or type(scale) is float)
        and type(backend) is str
        and _are_defaults(options)
    ):
        return None
    if attn_mask is not None and (attn_mask.ndim > 4 or attn_mask.device != query.device or attn_mask.requires_grad):
        return None
    if not query.device == key.device == value.device:
        return None
    numbers = dropout_p, is_causal, scale, enable_gqa, backend, torch.are_deterministic_algorithms_enabled()
    return (layouts((query, key, value, attn_mask)), query.device, numbers, *settings(query))


def _are_defaults(options: Options) -> bool:
    """Whether nothing of it is asked for."""
    alignment = options["causal_alignment"]
    if not (type(alignment) is str and alignment == "top_left"):
        return False
    for x in options.values():
        if x is not None and x is not alignment:
            return False
    return True


def _on_what_they_hold(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """The call on nested tensors or DTensors, one of the three at least."""
    if query.is_nested or key.is_nested or value.is_nested:
        from kernels.attention.varlen import varlen_attention

        del options["deterministic"]
        known = varlen_attention.__kwdefaults__ or {}
        missing = {name: options.pop(name) not in (None, False) for name in list(options) if name not in known}
        return on_values(functools.partial(varlen_attention, **options), query, key, value, missing)
    if options["dropout_p"]:
        raise ValueError(f"dropout_p must be 0 on DTensors, found {shown(options['dropout_p'])}; drop from the output")
    tensors = {name: options.pop(name) for name in list(options) if name in TENSORS}
    attend = functools.partial(scaled_dot_product_attention, **options)
    return on_heads(attend, {"query": query, "key": key, "value": value, **tensors})


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    **options: Unpack[Options],
) -> tuple[torch.Size, torch.Tensor, torch.Tensor, torch.Tensor, Call]:
    """The arguments of a call as the kernels take them, checked: lead (..., Hq), query, key, value, call."""
    lead, q, k, v, mask = _four_dimensional(query, key, value, attn_mask, enable_gqa)
    check_options(query, lead, k.shape[2], **options)
    return lead, q, k, v, make_call(lead, q, mask, dropout_p, is_causal, scale, **options)


def make_call(
    lead: torch.Size,
    q: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    deterministic: bool | None = None,
) -> Call:
    """The call that checked arguments make: lengths int32 (B,), slopes and sinks (B or 1, Hq), float32 or, beside such
    queries, float64.
    """
    left, right = (side if side is None else min(as_number(side), FAR) for side in window or (None, None))
    if key_lengths is not None or alibi_slopes is not None or sinks is not None:
        batch, heads = lead[:-1], math.prod(lead[-1:])
        dtype = torch.promote_types(q.dtype, torch.float32)
        if key_lengths is not None:
            key_lengths = key_lengths.to(torch.int32).expand(batch).reshape(-1)
        if alibi_slopes is not None:
            if any(size != 1 for size in alibi_slopes.shape[:-1]):
                alibi_slopes = alibi_slopes.expand(*batch, heads)
            own = math.prod(alibi_slopes.shape[:-1])
            alibi_slopes = alibi_slopes.to(dtype).expand(*alibi_slopes.shape[:-1], heads).reshape(own, heads)
        if sinks is not None:
            sinks = sinks.to(dtype).reshape(1, heads)
    return Call(
        attn_mask=attn_mask,
        key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=float(1.0 / math.sqrt(q.shape[-1]) if scale is None else scale),
        dropout_p=float(dropout_p),
        softcap=softcap if softcap is None else float(softcap),
        left=left,
        right=0 if is_causal else right,
        bottom_right=causal_alignment == "bottom_right",
        deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic),
    )


def triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, return_lse: bool, known: Known | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, Hq, L, Ev) and log-sum-exp (B, Hq, L) by the Triton kernels.

    known: what `known_forward` has of a plain call.
    """
    slopes, mask = call.alibi_slopes, call.attn_mask
    if wants_gradient(slopes):
        # The kernels have no gradient for slopes, but one for a float mask, which the slopes can be made into.
        bias = alibi(call, q.shape[2], k.shape[2])
        if mask is not None:
            bias = torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask
        call = call._replace(alibi_slopes=None, attn_mask=bias)
    if call.dropout_p > 0.0:
        call = call._replace(seed=torch.randint(2**63 - 1, (1,), device=q.device))
    if torch.compiler.is_compiling():  # Dynamo refuses an autograd.Function that is given one tensor twice
        k, v = k.view_as(k), v.view_as(v)
    # A program that is exported serves all lengths, so the kernel for any shape, which keeps statistics, must run it.
    keep_statistics = torch.compiler.is_exporting() or bool(
        needs_statistics(call, return_lse, wants_gradient(call.attn_mask))
    )
    numbers = call.with_tensors(NO_TENSORS)
    output, lse, *_ = differentiable(Attention, q, k, v, *call.tensors, numbers, keep_statistics, return_lse, known)
    return output, lse


def choose_backend(query: torch.Tensor, value: torch.Tensor, backend: str) -> Choice:
    """The backend for a checked call."""
    head_size = max(query.shape[-1], value.shape[-1])
    unsupported = ""
    if head_size > MAX_HEAD_SIZE:
        unsupported = f"heads wider than {MAX_HEAD_SIZE} are not covered, found {head_size}"
    return choose(backend, query.device, autocast_dtype(query), unsupported)


def _four_dimensional(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, enable_gqa: bool
) -> tuple[torch.Size, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The lead (..., Hq); views (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev); mask (B or 1, Hq or 1, L or 1, S or 1).

    Copies only where more than two leading dimensions cannot be merged by strides.
    """
    leads = leads_of(query, key, value, enable_gqa)
    lead = leads[0]
    q, k, v = (
        _merge_batch(x if x.shape[:-2] == to else x.expand(*to, *x.shape[-2:]))
        for x, to in zip((query, key, value), leads)
    )
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (len(lead) + 2 - attn_mask.ndim) + tuple(attn_mask.shape))
        if attn_mask.ndim > 4 and any(size != 1 for size in attn_mask.shape[:-3]):
            attn_mask = attn_mask.expand(*lead[:-1], *attn_mask.shape[-3:])
        attn_mask = _merge_batch(attn_mask)
    return lead, q, k, v, attn_mask


def _merge_batch(x: torch.Tensor) -> torch.Tensor:
    """View x (..., H, L, E) as (B, H, L, E); a (L, E) has one head, an (N, L, E) has N."""
    if x.ndim == 4:
        return x
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
