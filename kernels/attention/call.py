"""What a call of attention asks for, as one value that travels from the public function into the kernels.

Query i stands at place i + offset among the keys, where the offset is 0 ("top_left": query 0 beside key 0) or
n_keys - n_queries ("bottom_right": the last query beside the last key in use). It may attend to key j if

    j < n_keys      j <= i + offset + right      j >= i + offset - left

and its score is  cap tanh(scale q k / cap) - slope |i + offset - j| + mask. formula.py says it in PyTorch, score.py in
Triton. A new rule is a field here, a line in each of the two, a check and an argument of the public function.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

FAR = 1 << 30  # a side of a window that no sequence reaches


class Call(NamedTuple):
    """What is asked for beside query, key and value. What is not asked for is None, and costs a kernel nothing.

    Tensors; where they say "B or 1", one entry may stand for all batch entries:
        attn_mask: (B or 1, Hq or 1, L or 1, S or 1), bool (True = may attend) or added to the scores.
        key_lengths: (B or 1,) int32, how many keys of each batch entry are in use.
        alibi_slopes, sinks: (B or 1, Hq) float32, or float64 beside such a query; a sink is a logit that takes weight
            and gives no value.
        query_starts, key_starts: (B + 1,) int32, where each sequence starts in query (1, Hq, all queries, E) and in key
            and value (1, Hkv, all keys, E or Ev), and where the last one ends; None where batch entries stand side by
            side.
        seed: (1,) int64, of the dropout in the Triton kernels.
    Numbers:
        scale: factor of the scores. dropout_p: probability of dropping a weight. softcap: cap of the scores.
        left, right: how many keys before and after its own place a query sees, up to FAR, None for all. Causal
            attention is right = 0.
        bottom_right: where places are counted from.
        max_queries, max_keys: of packed sequences, the longest.
        deterministic: gradients must be bitwise the same in every run.
    """

    attn_mask: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    query_starts: torch.Tensor | None = None
    key_starts: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    max_queries: int | None = None
    max_keys: int | None = None
    deterministic: bool = False

    def lengths(self, query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int]:
        """Batch entries, and the most queries and keys of one, for query (B, Hq, L, E) and key (B, Hkv, S, E)."""
        if self.query_starts is None or self.max_queries is None or self.max_keys is None:
            return query.shape[0], query.shape[2], key.shape[2]
        return self.query_starts.shape[0] - 1, self.max_queries, self.max_keys

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields of TENSORS."""
        return self[: len(TENSORS)]  # type: ignore[return-value]

    def with_tensors(self, tensors: Iterable[Any]) -> Call:
        """The same numbers beside other tensors."""
        return Call(*tensors, *self[len(TENSORS) :])

    @property
    def has_float_mask(self) -> bool:
        """Whether a mask is added to the scores."""
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool


KINDS = {name: str(kind) for name, kind in typing.get_type_hints(Call).items()}
TENSORS = tuple(name for name, kind in KINDS.items() if "Tensor" in kind)  # the fields that are tensors: the first ones
NO_TENSORS = (None,) * len(TENSORS)
LEARNED = ("attn_mask", "sinks")  # those that the kernels make gradients of
