"""Attention on tensors that hold others: jagged nested tensors run as packed sequences, DTensors shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.subclasses import offsets_of, on_shards, wrapped

# How many dimensions of the query, from its last, these tensors do not have at their end.
MISSING = {"alibi_slopes": 2, "sinks": 2, "key_lengths": 3}


def on_heads(attend: Callable[..., Any], tensors: dict[str, Any]) -> Any:
    """`attend(**tensors)` on DTensors, divided along batch or heads.

    Args:
        tensors: arguments of attention by name, the query first. It is replicated, or sharded along dimensions before
            the last two; the others as what they share with it.
    """
    query, names = tensors["query"], list(tensors)

    def matching(name: str, x: torch.Tensor, dim: int) -> int:
        own = x.ndim - (query.ndim - dim - MISSING.get(name, 0))
        is_there = 0 <= own < x.ndim and (x.shape[own] != 1 or query.shape[dim] == 1)
        return own if is_there else -1

    return on_shards(lambda *held: attend(**dict(zip(names, held))), tensors, matching, range(query.ndim - 2))


def on_values(attend: Callable[..., Any], query: Any, key: Any, value: Any, unsupported: dict[str, bool]) -> Any:
    """Attention of jagged nested tensors: queries (N, Hq, L*, E), keys (N, Hkv, S*, E) and values (N, Hkv, S*, Ev).

    Args:
        attend: `varlen_attention` with all but its first seven arguments.
        unsupported: names of arguments that packed sequences do not take, and whether they were given.
    """
    offsets = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_nested:
            raise ValueError(
                f"{name} must be a jagged nested tensor like the others, found {tuple(x.shape)}; make it "
                "one with torch.nested.nested_tensor_from_jagged"
            )
        offsets.append(offsets_of(name, x))
        if x.dim() != 4 or not isinstance(x.shape[2], torch.SymInt):
            raise ValueError(
                f"{name} must be (N, H, T*, E) if it is nested, found another form; a nested "
                "(N, T*, H, E) becomes one by .transpose(1, 2)"
            )
    for name, is_given in unsupported.items():
        if is_given:
            raise ValueError(f"nested tensors take no {name}; leave it out, or pad the sequences")
    if offsets[1] is not offsets[2] and not torch.equal(offsets[1], offsets[2]):
        raise ValueError(
            "key and value must have sequences of the same lengths, found others; make both from one offsets tensor"
        )
    packed = (x.values().transpose(0, 1) for x in (query, key, value))  # (T, H, E)
    longest = (x.diff().max() if x.shape[0] > 1 else 0 for x in offsets[:2])
    found = attend(*packed, *offsets[:2], *longest)

    def wrap(x: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(x.transpose(0, 1), offsets[0], jagged_dim=2)

    return wrapped(wrap, found)
