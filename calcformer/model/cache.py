"""What a decoder keeps between two tokens, so that the next one costs a step and not a sequence.

Shapes: B rows, one a sequence in the making, H heads, S source tokens, T target tokens fed so far, E head size of keys,
Ev of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Cache", "KeyValue", "LayerCache"]


class KeyValue(NamedTuple):
    """Keys and values (B, H, S, E) of a memory, and which are of real tokens, (B, 1, 1, S) bool or None for all."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None

    def select(self, index: torch.Tensor) -> KeyValue:
        """The rows `index` (M,)."""
        return KeyValue(*(x if x is None else x.index_select(0, index) for x in self))  # type: ignore[arg-type]


class LayerCache:
    """One decoder layer's keys and values: of the memory, and of the target tokens fed so far.

    Those of the target stand in a buffer (limit, B, H, E + Ev), made with the first: a step then writes one block of
    memory, and what is in use is one block as well.

    Args:
        memory: of B sources; None where there are none.
        limit: the most tokens that will be fed.
    """

    def __init__(self, memory: KeyValue | None, limit: int) -> None:
        self.memory = memory
        self.limit = limit
        self.length = 0

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of the next N tokens, (B, H, N, E) and (B, H, N, Ev); returns all so far, likewise.

        Raises:
            ValueError: the cache is full.
        """
        sizes, end = (key.shape[3], value.shape[3]), self.length + key.shape[2]
        if end > self.limit:
            raise ValueError(f"the cache was made for {self.limit} tokens and is full; give `start` a larger length")
        if self.length == 0:
            self._buffer = key.new_empty(self.limit, *key.shape[:2], sum(sizes))
            self._spare = key.new_empty(0)
        for kept, new in zip(self._buffer[self.length : end].split(sizes, dim=3), (key, value)):
            kept.copy_(new.permute(2, 0, 1, 3))
        self.length = end
        keys, values = self._buffer[:end].permute(1, 2, 0, 3).split(sizes, dim=3)
        return keys, values

    def select(self, index: torch.Tensor, same_memory: bool) -> None:
        """Continue with the rows `index` (M,); `same_memory`: their sources are those of the rows they replace."""
        if self.length:
            _, batch, *head = self._buffer.shape
            rows = (torch.arange(self.length, device=index.device)[:, None] * batch + index).flatten()
            # Into the memory of the selection before: fresh memory takes the system longer than the copy itself.
            size = self._buffer[0, 0].numel() * self.limit * len(index)
            if self._spare.numel() < size:
                self._spare = self._buffer.new_empty(size)
            selected = self._spare.view(-1)[:size].view(self.limit, len(index), *head)
            torch.index_select(
                self._buffer[: self.length].view(-1, *head), 0, rows, out=selected[: self.length].view(-1, *head)
            )
            self._buffer, self._spare = selected, self._buffer
        if self.memory is not None and not same_memory:
            self.memory = self.memory.select(index)


class Cache:
    """What `next` of a model keeps of a batch of sequences, made by its `start`.

    Args:
        memories: of each decoder layer, of B sources; None each where there are none.
        limit: the most tokens that will be fed.
    """

    def __init__(self, memories: Sequence[KeyValue | None], limit: int) -> None:
        self.layers = [LayerCache(memory, limit) for memory in memories]
        first = memories[0]
        self._source = None if first is None else torch.arange(first.key.shape[0], device=first.key.device)

    @property
    def length(self) -> int:
        """How many tokens have been fed to each row."""
        return self.layers[0].length

    def select(self, index: torch.Tensor) -> Cache:
        """Continue with the rows `index` (M,) int64, dropped, repeated or in another order; in place, returns itself.

        Costs a copy of the keys and values fed so far, and one of the memory's where a row changes its source.
        """
        source = None if self._source is None else self._source[index]
        same_memory = source is None or torch.equal(source, self._source)  # type: ignore[arg-type]
        for layer in self.layers:
            layer.select(index, same_memory)
        self._source = source
        return self
