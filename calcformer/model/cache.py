"""What a decoder keeps between two tokens, so that the next one costs a step and not a sequence.

Shapes: B rows, one a sequence in the making, H heads, S source tokens, T target tokens fed so far, E head size.
"""

from __future__ import annotations

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

    Those of the target stand in a buffer (length, 2, B, H, E): a step then writes one block of memory, and what is in
    use is one block as well.

    Args:
        memory: of B sources.
        length: the most tokens that will be fed.
    """

    def __init__(self, memory: KeyValue, length: int) -> None:
        batch, heads, _, size = memory.key.shape
        self.memory = memory
        self.length = 0
        self._buffer = memory.key.new_empty(length, 2, batch, heads, size)
        self._spare = memory.key.new_empty(0)

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of the next token, (B, H, 1, E) each; returns all so far, (B, H, T, E) each.

        Raises:
            ValueError: the cache is full.
        """
        if self.length == self._buffer.shape[0]:
            raise ValueError(f"the cache was made for {self.length} tokens and is full; give `start` a larger length")
        for kept, new in zip(self._buffer[self.length], (key, value)):
            kept.copy_(new.squeeze(2))
        self.length += 1
        keys, values = self._buffer[: self.length].permute(1, 2, 3, 0, 4).unbind(0)
        return keys, values

    def select(self, index: torch.Tensor, same_memory: bool) -> None:
        """Continue with the rows `index` (M,); `same_memory`: their sources are those of the rows they replace."""
        length, _, batch, *head = self._buffer.shape
        blocks = torch.arange(2 * self.length, device=index.device)
        rows = (blocks[:, None] * batch + index).flatten()
        # Into the memory of the selection before: fresh memory takes the system longer than the copy itself.
        size = self._buffer[0, 0, 0].numel() * 2 * length * len(index)
        if self._spare.numel() < size:
            self._spare = self._buffer.new_empty(size)
        selected = self._spare.view(-1)[:size].view(length, 2, len(index), *head)
        torch.index_select(
            self._buffer[: self.length].view(-1, *head), 0, rows, out=selected[: self.length].view(-1, *head)
        )
        self._buffer, self._spare = selected, self._buffer
        if not same_memory:
            self.memory = self.memory.select(index)


class Cache:
    """What `EncoderDecoder.next` keeps of a batch of targets, made by `EncoderDecoder.start`.

    Args:
        memories: of each decoder layer, of B sources.
        length: the most tokens that will be fed.
    """

    def __init__(self, memories: list[KeyValue], length: int) -> None:
        self.layers = [LayerCache(memory, length) for memory in memories]
        self._source = torch.arange(memories[0].key.shape[0], device=memories[0].key.device)

    @property
    def length(self) -> int:
        """How many tokens have been fed to each row."""
        return self.layers[0].length

    def select(self, index: torch.Tensor) -> Cache:
        """Continue with the rows `index` (M,) int64, dropped, repeated or in another order; in place, returns itself.

        Costs a copy of the keys and values fed so far, and one of the memory's where a row changes its source.
        """
        source = self._source[index]
        same_memory = torch.equal(source, self._source)
        for layer in self.layers:
            layer.select(index, same_memory)
        self._source = source
        return self
