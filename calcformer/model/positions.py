"""Position encodings: what tells a token where it stands."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from calcformer.model.rows import Rows

__all__ = [
    "AddedPositions",
    "LearnedPositions",
    "Positions",
    "RelativePositions",
    "RotaryPositions",
    "build_positions",
    "course",
    "simple",
    "sinusoid",
]

FARTHEST = 32  # tokens apart, beyond which relative positions are one


def sinusoid(length: int, width: int) -> torch.Tensor:
    """The fixed encoding, (length, width) float32.

    Column 2i of row t is sin(t / 10000^(2i / width)), column 2i + 1 the cosine of the same angle.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angle = torch.arange(length)[:, None] * frequency  # (length, ceil(width / 2))
    return torch.stack((angle.sin(), angle.cos()), dim=2).reshape(length, -1)[:, :width].contiguous()


def course(length: int, width: int) -> torch.Tensor:
    """The expression report's sinusoid, (length, width) float32: sin(t) in even columns of row t, cos(t) in odd ones.

    One frequency for all columns, where Vaswani et al. give each pair its own.
    """
    angle = torch.arange(length, dtype=torch.float32)
    return torch.stack((angle.sin(), angle.cos()), dim=1).repeat(1, (width + 1) // 2)[:, :width].contiguous()


def simple(length: int, width: int, whole: int) -> torch.Tensor:
    """The expression report's simplest encoding, (length, width) float32: t / whole in all columns of row t."""
    return (torch.arange(length) / whole)[:, None].repeat(1, width)


class Positions(nn.Module):
    """No position encoding: a model then sees a source as a bag of tokens. Each encoding changes one of the methods."""

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x (R, D), the embeddings of `rows`; the same shape back."""
        return x

    def turn(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x (B, H, T, E), the queries or keys of self attention in `rows`; the same shape back."""
        return x

    def bias(self, rows: Rows) -> torch.Tensor | None:
        """What is added to the scores of self attention, (1, H, T, S): the T tokens of `rows` by all S up to them."""
        return None


class Table(nn.Module):
    """Fixed rows that are computed once, and again when a sequence is longer.

    Args:
        encode: from a length to as many rows.
        length: the longest sequence expected.
    """

    table: torch.Tensor

    def __init__(self, encode: Callable[[int], torch.Tensor], length: int) -> None:
        super().__init__()
        self.encode = encode
        self.register_buffer("table", encode(length), persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        """At least `length` rows."""
        if length > self.table.shape[0]:
            self.table = self.encode(length).to(self.table)
        return self.table


class AddedPositions(Positions):
    """Adds a fixed vector for each place to embeddings; arguments as for `Table`."""

    def __init__(self, encode: Callable[[int], torch.Tensor], length: int) -> None:
        super().__init__()
        self.table = Table(encode, length)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return rows.add_by_place(x, self.table(rows.end))


class LearnedPositions(Positions):
    """Adds a trained vector for each place up to `length`."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """As in `Positions`.

        Raises:
            ValueError: the sequence is longer than the places that were trained.
        """
        if rows.end > self.table.shape[0]:
            raise ValueError(
                f"learned positions reach {self.table.shape[0]} tokens, got a sequence of {rows.end}; "
                "use positions='sinusoid' for longer ones"
            )
        return rows.add_by_place(x, self.table)


class RelativePositions(Positions):
    """Adds to each score a trained number for the distance from query to key: one table for all layers of a stack.

    Keys farther than the table reaches share its ends, so that sequences may be of any length.

    Args:
        heads: H; each has its own numbers.
        before, after: the farthest distance to a key before the query, and to one after it.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 2.1; the clipped distance:
    Shaw et al. 2018, "Self-Attention with Relative Position Representations", section 3.2.
    """

    def __init__(self, heads: int, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.table = nn.Parameter(torch.empty(before + 1 + after, heads))
        nn.init.normal_(self.table, std=0.02)

    def bias(self, rows: Rows) -> torch.Tensor:
        place = torch.arange(rows.end, device=self.table.device)
        distance = place - place[rows.start :, None]  # (T, S)
        index = distance.clamp(-self.before, self.after) + self.before
        return F.embedding(index, self.table).permute(2, 0, 1).unsqueeze(0)


class RotaryPositions(Positions):
    """Turns columns 2i and 2i + 1 of the query or key at place t by the angle t / 10000^(2i / E).

    Their product then depends on the distance of the two places alone.

    Args:
        length: the longest sequence expected.
        head_size: E, even.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.2.
    """

    def __init__(self, length: int, head_size: int) -> None:
        super().__init__()
        if head_size % 2:
            raise ValueError(f"rotary positions turn pairs of columns: the head size must be even, got {head_size}")
        self.table = Table(partial(sinusoid, width=head_size), length)

    def turn(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(3, (-1, 2))
        if any(step % 2 for step in pairs.stride()[:-1]):  # beside values of an odd size; complex ones have whole pairs
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        turns = self.table(rows.end)[rows.start : rows.end].to(pairs.dtype).view(rows.length, -1, 2).flip(2)  # cos, sin
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(turns)
        return torch.view_as_real(turned).flatten(3).type_as(x)


def build_positions(
    kind: str, length: int, width: int, heads: int, is_causal: bool = False, head_size: int | None = None
) -> Positions:
    """The position encoding called `kind` for a stack of layers.

    Args:
        kind: sinusoid, learned, simple or course, which change the embeddings; relative or rotary, which change self
            attention; none.
        length: the longest sequence expected.
        width: D; heads: H.
        is_causal: whether tokens attend to none after them.
        head_size: E, of queries and keys; None for width / heads.
    """
    fixed: dict[str, Callable[..., torch.Tensor]] = {
        "sinusoid": sinusoid,
        "course": course,
        "simple": partial(simple, whole=length),
    }
    if kind in fixed:
        return AddedPositions(partial(fixed[kind], width=width), length)
    if kind == "learned":
        return LearnedPositions(length, width)
    if kind == "relative":
        reach = min(length - 1, FARTHEST)
        return RelativePositions(heads, reach, 0 if is_causal else reach)
    if kind == "rotary":
        return RotaryPositions(length, head_size or width // heads)
    if kind == "none":
        return Positions()
    raise ValueError(f"positions must be {', '.join(fixed)}, learned, relative, rotary or none, got {kind!r}")
