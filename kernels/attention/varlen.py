"""Attention over sequences of different lengths that stand behind each other, without padding."""

from __future__ import annotations

from typing import Any

import torch

from kernels.attention.api import AttentionResult, Options, choose_backend, make_call, triton_attention
from kernels.attention.call import Call
from kernels.attention.checks import INTEGERS, as_flag, check, check_options
from kernels.attention.cpu import route
from kernels.attention.layout import ordered_as
from kernels.autograd import in_forward_mode, transformed
from kernels.backend import as_autocast, as_number, check_tensor_types, shown, wants_gradient
from kernels.subclasses import overridden

__all__ = ["varlen_attention"]


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attend within each of N packed sequences: `scaled_dot_product_attention` of each by itself, in one launch.

    The first seven arguments are those of `torch.nn.attention.varlen.varlen_attn`.

    Args:
        query: (Tq, Hq, E), the queries of all sequences one after another; key: (Tk, Hkv, E); value: (Tk, Hkv, Ev).
        cu_seq_q: (N + 1,) int32 or int64, where each sequence's queries start, from 0, and at last Tq.
        cu_seq_k: likewise for keys and values; None where it is the same.
        max_q, max_k: the longest sequence of queries and of keys, also as tensors of no dimensions; only a GPU's grid
            depends on them.
        dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, sinks, return_lse, backend: as in
            `kernels.scaled_dot_product_attention`, for each sequence by its own lengths.
        alibi_slopes: (Hq,) or (N, Hq), without a gradient.

    Returns:
        (Tq, Hq, Ev), dtype of the query. With `return_lse` an `AttentionResult` whose lse is (Tq, Hq).

    Raises:
        TypeError, ValueError: as `kernels.scaled_dot_product_attention`, and for starts that do not fit. On a GPU their
            values are not looked at: it would have to be waited for.
    """
    tensors = query, key, value, cu_seq_q, cu_seq_k, alibi_slopes, sinks
    if torch.overrides.has_torch_function(tensors):
        return overridden(
            varlen_attention,
            tensors,
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            causal_alignment=causal_alignment,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
            backend=backend,
        )
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    check_tensor_types({"query": query, "key": key, "value": value, "cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k})
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(
            f"query, key and value must be packed (T, H, E), found {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}; for padded batches call kernels.scaled_dot_product_attention"
        )
    is_causal, enable_gqa = as_flag("is_causal", is_causal), as_flag("enable_gqa", enable_gqa)
    max_q, max_k = _longest(max_q, query), _longest(max_k, key)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # (1, H, T, E)
    check(q, k, v, None, dropout_p, scale, enable_gqa)
    n_sequences = _check_starts(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    lead = torch.Size((n_sequences, query.shape[1]))
    options: Options = {
        "causal_alignment": causal_alignment,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    check_options(query, lead, max_k, **options)
    q, k, v = as_autocast(q, k, v)
    call = make_call(lead, q, None, dropout_p, is_causal, scale, **options)
    call = call._replace(query_starts=cu_seq_q.int(), key_starts=cu_seq_k.int(), max_queries=max_q, max_keys=max_k)
    lse: torch.Tensor | None
    if choose_backend(q, v, backend).backend == "triton" and not in_forward_mode():
        if wants_gradient(alibi_slopes):
            raise ValueError("alibi_slopes of packed sequences have no gradient; detach them, or pad the sequences")
        output, lse = triton_attention(q, k, v, call, return_lse)
    else:
        lengths = _lengths(cu_seq_q), _lengths(cu_seq_k)
        if lengths[0] and lengths[1] and not transformed():
            output, lse = _one_by_one(q, k, v, lengths[0], lengths[1], call, return_lse)
        else:
            output, lse, _ = route.extended_attention(q, k, v, call, need_lse=return_lse, need_weights=False)
    output = output[0].transpose(0, 1)
    return AttentionResult(output, lse[0].transpose(0, 1), None) if lse is not None else output


def _longest(longest: Any, x: torch.Tensor) -> int:
    """`max_q` or `max_k` as a number; where compiled code was given a tensor, which it cannot look at, all rows."""
    if isinstance(longest, torch.Tensor) and torch.compiler.is_compiling():
        return x.shape[0]
    return as_number(longest)


def _lengths(starts: torch.Tensor) -> list[int]:
    """The sequences' lengths; empty where there are none, or none that can be looked at."""
    if torch.compiler.is_compiling() or starts.is_meta:
        return []
    try:
        return starts.diff().tolist()
    except RuntimeError:  # fake tensors
        return []


def _check_starts(
    query: torch.Tensor, key: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int
) -> int:
    """Raise for starts that do not fit; returns N."""
    for name, longest in (("q", max_q), ("k", max_k)):
        if isinstance(longest, bool) or not isinstance(longest, INTEGERS) or longest < 0:
            raise TypeError(f"max_{name} must be an integer from 0, found {shown(longest)}; pass the longest sequence")
    for name, starts, rows, longest in (("q", cu_seq_q, query.shape[0], max_q), ("k", cu_seq_k, key.shape[0], max_k)):
        if starts.dtype not in (torch.int32, torch.int64) or starts.ndim != 1 or starts.shape[0] < 1:
            raise TypeError(
                f"cu_seq_{name} must be (N + 1,) int32 or int64, found {tuple(starts.shape)} {starts.dtype}"
            )
        if starts.device != query.device:
            raise ValueError(f"cu_seq_{name} must be on {query.device}, found {starts.device}; move it with .to()")
        if not starts.is_cpu or torch.compiler.is_compiling():
            continue
        steps = _lengths(starts)
        if not steps and starts.shape[0] > 1:  # nothing can be looked at
            continue
        steps = steps or [0]
        if starts[0] != 0 or starts[-1] != rows or not 0 <= min(steps) <= max(steps) <= longest:
            raise ValueError(
                f"cu_seq_{name} must go from 0 to the {rows} rows in steps of at most max_{name} = {longest}, "
                f"found {starts.tolist()}"
            )
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(f"cu_seq_q and cu_seq_k must be equally long, found {len(cu_seq_q)} and {len(cu_seq_k)}")
    return cu_seq_q.shape[0] - 1


def _one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: list[int], keys: list[int], call: Call, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sequences, of lengths `queries` and `keys`, through PyTorch, a call each: its kernels know no packed ones."""
    outputs, lses = [], []
    slopes, own = call.alibi_slopes, call._replace(query_starts=None, key_starts=None, max_queries=None, max_keys=None)
    for i, (one_q, one_k, one_v) in enumerate(zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2))):
        if slopes is not None and slopes.shape[0] > 1:
            own = own._replace(alibi_slopes=slopes[i : i + 1])
        output, lse, _ = route.extended_attention(one_q, one_k, one_v, own, need_lse=return_lse, need_weights=False)
        outputs.append(output)
        if lse is not None:
            lses.append(lse)
    output = torch.cat([x.transpose(1, 2) for x in outputs], 1).transpose(1, 2)  # as its parts lie in memory
    return ordered_as(q, output), torch.cat(lses, 2) if return_lse else None
