"""Which keys a query may attend to by position, and what happens to its scores: one place for both backends.

Query i stands at place i + offset among the keys, where the offset is 0 ("top_left": query 0 beside key 0) or
n_keys - n_queries ("bottom_right": the last query beside the last key in use). It may attend to key j if

    j < n_keys      j <= i + offset + right      j >= i + offset - left

and its score is  cap tanh(scale q k / cap) - slope |i + offset - j| + mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FAR = 1 << 30  # a side of a window that no sequence reaches


class Rules(NamedTuple):
    """The numbers of a call.

    scale: factor of the scores. dropout_p: probability of dropping a weight. softcap: cap of the scores, 0 for none.
    left, right: how many keys before and after its own place a query sees, up to FAR, None for all. Causal attention is
        right = 0.
    bottom_right: where places are counted from.
    max_queries, max_keys: of packed sequences, the longest; 0 where batch entries stand side by side.
    deterministic: gradients must be bitwise the same in every run.
    """

    scale: float
    dropout_p: float = 0.0
    softcap: float = 0.0
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    max_queries: int = 0
    max_keys: int = 0
    deterministic: bool = False


class Extras(NamedTuple):
    """The tensors of a call beside query, key and value, in four dimensions, None where not given.

    attn_mask: (B or 1, Hq or 1, L or 1, S or 1), bool (True = may attend) or added to the scores.
    key_lengths: (B,) int32, how many keys of each batch entry are in use, None for all S.
    alibi_slopes, sinks: (B or 1, Hq) float32, or float64 beside such a query; a sink is a logit that takes weight and
    gives no value.
    query_starts, key_starts: (B + 1,) int32, where each sequence starts in query (1, Hq, all queries, E) and in key and
    value (1, Hkv, all keys, E or Ev), and where the last one ends; None where batch entries stand side by side.
    """

    attn_mask: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    query_starts: torch.Tensor | None = None
    key_starts: torch.Tensor | None = None
