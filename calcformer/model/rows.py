"""Where the tokens of a batch stand among the rows of an activation, so that padding need not be computed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["Rows"]


class Gather(torch.autograd.Function):
    """x[index] for x (N, ...), where `back` (N,) says for every row of x which row of the result has its gradient.

    The gradient is then another gather instead of a sum over scattered rows. A row of x may stand in several places of
    the result if the gradient is zero in all of them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class Spread(torch.autograd.Function):
    """Rows of x (R, V) but the last one at their places among `count`, with zeros at the others: (count, V).

    `places` (R,) has some place without a row for the last one.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        is_empty = torch.ones(count, dtype=torch.bool).index_fill_(0, places[:-1], False)
        found = x.new_empty(count, x.shape[1]).index_copy_(0, places[:-1], x[:-1])
        return found.index_fill_(0, is_empty.nonzero().squeeze(1), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = grad.index_select(0, *ctx.saved_tensors)
        found[-1] = 0.0
        return found, None, None


@lru_cache(maxsize=256)
def _offsets(parts: int, heads: int, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For `Rows._move`: the place of (part, head) in a row, (parts, 1, H, 1), and in (parts, B, H, T), (parts * H,)."""
    start = torch.arange(parts)[:, None] * (batch * heads * length) + torch.arange(heads) * length
    return torch.arange(parts * heads).view(parts, 1, heads, 1), start.flatten()


class Rows:
    """The rows of activations (R, D) that belong to a batch of token ids (B, T).

    All layers but attention look at tokens one by one. On a CPU the padding is therefore left out, but for one row that
    stands for every padded place: nobody reads what is said there, its gradient is zero, and as a key it is masked. On
    a GPU R is B * T: to count the padding would be to wait for the device.

    Args:
        ids: (B, T) int64.
        pad_id: the token that fills short sequences, None where there is none.
        start: how many tokens of each sequence came before these.
        compact: False where no padding is to be left out: heads are then split and joined by views, which is faster
            unless sequences are short and many.
    """

    def __init__(self, ids: torch.Tensor, pad_id: int | None, start: int = 0, compact: bool = True) -> None:
        self.batch, self.length = ids.shape
        self.start, self.end = start, start + self.length
        real = None if pad_id is None else ids != pad_id
        # Sequences of one token, as a decoder with a cache has them, are split and joined by views.
        self.compact = compact and self.length > 1 and ids.device.type == "cpu" and not torch.compiler.is_compiling()
        self.count = ids.numel()
        if self.compact:
            places = torch.arange(self.count)
            row = places
            if real is not None and not bool(real.all()):
                flat = real.flatten()
                tokens = flat.nonzero().squeeze(1)
                self.count = len(tokens)
                places = torch.cat((tokens, flat.int().argmin(keepdim=True)))
                row = torch.where(flat, flat.cumsum(0) - 1, self.count)
            else:
                real = None
            self._places, self._row = places, row  # the place of each row, and the row of each place
            self._moves: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
            ids = ids.reshape(-1).index_select(0, places)
        self.ids = ids.reshape(-1)  # (R,)
        self.mask = None if real is None else real[:, None, None, :]  # (B, 1, 1, T), True = a real token

    def add_by_place(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """x (R, D) and, of a table (N, D), the row of as many tokens as stand before each in its sequence."""
        if self.compact:
            return x + F.embedding(self._places % self.length + self.start, table)
        return (x.view(self.batch, self.length, x.shape[1]) + table[self.start : self.end]).flatten(0, 1)

    def _move(self, parts: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices that take (R, parts, H) to (parts, B, H, T), and back; made once a batch."""
        if (parts, heads) not in self._moves:
            chunk, start = _offsets(parts, heads, self.batch, self.length)
            to = torch.add(chunk, self._row.view(-1, 1, self.length), alpha=parts * heads)
            batch = self._places // self.length
            back = torch.add(self._places, batch, alpha=(heads - 1) * self.length)[:, None] + start
            self._moves[parts, heads] = to.flatten(), back.flatten()
        return self._moves[parts, heads]

    def split(self, x: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
        """x (R, parts * H * E) as `parts` tensors (B, H, T, E)."""
        size = x.shape[1] // (parts * heads)
        if self.compact:
            x = Gather.apply(x.reshape(-1, size), *self._move(parts, heads))
            return x.view(parts, self.batch, heads, self.length, size).unbind(0)
        x = x.view(self.batch, self.length, parts, heads, size)
        return tuple(part.transpose(1, 2) for part in x.unbind(2))

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, T, E) as (R, H * E)."""
        heads, size = x.shape[1], x.shape[3]
        if self.compact:
            to, back = self._move(1, heads)
            return Gather.apply(x.reshape(-1, size), back, to).view(-1, heads * size)
        return x.transpose(1, 2).reshape(-1, heads * size)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """x (R, V) as (B, T, V), with zeros where there is padding."""
        if self.compact and self.count < self.batch * self.length:
            x = Spread.apply(x, self._places, self.batch * self.length)
        return x.view(self.batch, self.length, x.shape[1])
