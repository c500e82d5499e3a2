"""The layers of an encoder-decoder transformer.

Shapes: R rows, one a token (see `Rows`), H heads, E head size, D = H * E model width. Source: Vaswani et al. 2017,
section 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import kernels
import kernels.nn
from calcformer.model.dropout import Dropout
from calcformer.model.rows import Rows

__all__ = ["DecoderLayer", "EncoderLayer", "FeedForward", "Memory", "MultiHeadAttention"]

# In place: what a linear layer gives is nobody else's.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu_, "gelu": F.gelu}


class Memory(NamedTuple):
    """What the encoder makes of a source: states (R, D), which stand in `rows`."""

    states: torch.Tensor
    rows: Rows


class MultiHeadAttention(nn.Module):
    """Attention of H heads. Self attention makes q, k and v in one product, cross attention k and v in one.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        dropout: probability with which an attention weight is dropped in training.
        cross: True attends to a second sequence, False to the sequence itself.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, cross: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and {heads} heads")
        self.heads = heads
        self.head_size = width // heads
        self.dropout = dropout
        self.cross = cross
        if cross:
            self.query = nn.Linear(width, width)
            self.key_value = nn.Linear(width, 2 * width)
        else:
            self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.MultiheadAttention does: Xavier on the joint (3D, D) matrix, zero biases.

        The bound for the joint matrix is sqrt(6 / (D + 3D)) also where it is kept in two pieces.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("output"):
                nn.init.xavier_uniform_(parameter)
            else:
                bound = (6 / (4 * parameter.shape[1])) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor, rows: Rows, memory: Memory | None = None, is_causal: bool = False
                ) -> torch.Tensor:
        """Attend from x (R, D), which stands in `rows`, to `memory`, or to x itself where that is None: (R, D)."""
        if self.cross:
            if memory is None:
                raise ValueError("cross attention needs the memory to attend to")
            query, = rows.split(self.query(x), 1, self.heads)
            key, value = memory.rows.split(self.key_value(memory.states), 2, self.heads)
            mask = memory.rows.mask
        else:
            query, key, value = rows.split(self.query_key_value(x), 3, self.heads)
            mask = None if is_causal else rows.mask  # padding ends a sequence: the causal mask keeps it from all others
        mixed = kernels.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal,
                                                     dropout_p=self.dropout if self.training else 0.0)
        return self.output(rows.join(mixed))


class FeedForward(nn.Module):
    """linear(dropout(activation(linear(x)))), each row by itself: (R, D) to (R, D)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, activation: str = "relu") -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.contract.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.contract(self.dropout(self.activation(self.expand(x))))


class EncoderLayer(nn.Module):
    """Self attention and feed-forward, each with dropout, residual and layer norm.

    Args:
        norm: "post" computes norm(x + f(x)) as the paper does, "pre" x + f(norm(x)) (Xiong et al. 2020).
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0, norm: str = "post",
                 activation: str = "relu") -> None:
        super().__init__()
        self.pre_norm = norm == "pre"
        self.attention = MultiHeadAttention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)
        self.attention_norm = kernels.nn.LayerNorm(width)
        self.feed_forward_norm = kernels.nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x (R, D), which stands in `rows`; returns (R, D)."""
        p = self.dropout.now
        if self.pre_norm:
            y = self.attention(self.attention_norm(x), rows)
            y, x = self.feed_forward_norm(y, x, dropout_p=p, prenorm=True)
            return self.dropout.add(x, self.feed_forward(y))
        x = self.attention_norm(self.attention(x, rows), x, dropout_p=p)
        return self.feed_forward_norm(self.feed_forward(x), x, dropout_p=p)


class DecoderLayer(nn.Module):
    """Causal self attention, attention to the encoder's output, and feed-forward. `norm` as in EncoderLayer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0, norm: str = "post",
                 activation: str = "relu") -> None:
        super().__init__()
        self.pre_norm = norm == "pre"
        self.attention = MultiHeadAttention(width, heads, dropout)
        self.cross_attention = MultiHeadAttention(width, heads, dropout, cross=True)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)
        self.attention_norm = kernels.nn.LayerNorm(width)
        self.cross_attention_norm = kernels.nn.LayerNorm(width)
        self.feed_forward_norm = kernels.nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, rows: Rows, memory: Memory) -> torch.Tensor:
        """x (R, D), which stands in `rows`; returns (R, D)."""
        p = self.dropout.now
        if self.pre_norm:
            y = self.attention(self.attention_norm(x), rows, is_causal=True)
            y, x = self.cross_attention_norm(y, x, dropout_p=p, prenorm=True)
            y, x = self.feed_forward_norm(self.cross_attention(y, rows, memory), x, dropout_p=p, prenorm=True)
            return self.dropout.add(x, self.feed_forward(y))
        x = self.attention_norm(self.attention(x, rows, is_causal=True), x, dropout_p=p)
        x = self.cross_attention_norm(self.cross_attention(x, rows, memory), x, dropout_p=p)
        return self.feed_forward_norm(self.feed_forward(x), x, dropout_p=p)
