"""Position encodings: what tells a token where it stands."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from calcformer.model.rows import Rows

__all__ = ["LearnedPositions", "SinusoidPositions", "build_positions", "sinusoid"]


def sinusoid(length: int, width: int) -> torch.Tensor:
    """The fixed encoding, (length, width) float32.

    Column 2i of row t is sin(t / 10000^(2i / width)), column 2i + 1 the cosine of the same angle.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angle = torch.arange(length)[:, None] * frequency  # (length, ceil(width / 2))
    return torch.stack((angle.sin(), angle.cos()), dim=2).reshape(length, -1)[:, :width].contiguous()


class SinusoidPositions(nn.Module):
    """Adds the sinusoid to embeddings; longer sequences than `length` are computed when they come."""

    table: torch.Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoid(length, width), persistent=False)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x (R, D), the embeddings of `rows`; the same shape back."""
        if rows.length > self.table.shape[0]:
            self.table = sinusoid(rows.length, x.shape[1]).to(self.table)
        return x + self.table.index_select(0, rows.positions)


class LearnedPositions(nn.Module):
    """Adds a trained vector for each place up to `length`."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x (R, D), the embeddings of `rows`; the same shape back.

        Raises:
            ValueError: the sequence is longer than the places that were trained.
        """
        if rows.length > self.table.shape[0]:
            raise ValueError(f"learned positions reach {self.table.shape[0]} tokens, got a sequence of {rows.length}; "
                             "use positions='sinusoid' for longer ones")
        return x + F.embedding(rows.positions, self.table)


class NoPositions(nn.Module):
    """Adds nothing: the model then sees a source as a bag of tokens."""

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x


def build_positions(kind: str, length: int, width: int) -> nn.Module:
    """The position encoding called `kind`: sinusoid, learned or none."""
    if kind == "sinusoid":
        return SinusoidPositions(length, width)
    if kind == "learned":
        return LearnedPositions(length, width)
    if kind == "none":
        return NoPositions()
    raise ValueError(f"positions must be sinusoid, learned or none, got {kind!r}")
