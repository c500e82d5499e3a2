"""The layers of an encoder-decoder transformer.

Shapes: R rows, one a token (see `Rows`), B sequences, H heads, T tokens of a sequence, S those of the memory, E head
size, D model width, H * E unless a head size is given. Source: Vaswani et al. 2017, section 3.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import kernels
import kernels.nn
from calcformer.model.cache import KeyValue, LayerCache
from calcformer.model.dropout import Dropout
from calcformer.model.positions import Positions
from calcformer.model.rows import Rows

__all__ = [
    "CrossAttention",
    "DecoderLayer",
    "EncoderLayer",
    "FeedForward",
    "Memory",
    "ScaledDotProductAttention",
    "SelfAttention",
]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x (R, 2 F), a gate and what it lets through, to (R, F): silu(gate) * rest (Shazeer 2020, "GLU Variants")."""
    gate, rest = x.chunk(2, dim=1)
    return F.silu(gate) * rest


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu_,  # in place: what a linear layer gives is nobody else's
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": swiglu,
}


class Memory(NamedTuple):
    """What the encoder makes of a source: states (R, D), which stand in `rows`."""

    states: torch.Tensor
    rows: Rows


class ScaledDotProductAttention(nn.Module):
    """`kernels.scaled_dot_product_attention` as a module: its hooks see all that becomes attention weights.

    Args:
        dropout: probability with which a weight is dropped in training.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        """query (B, H, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev), mask for (B, H, L, S): (B, H, L, Ev)."""
        return kernels.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class MultiHeadAttention(nn.Module):
    """What self and cross attention share.

    Args:
        width: D, a multiple of `heads` where no head size is given.
        heads: H.
        dropout: probability with which an attention weight is dropped in training.
        head_size: E, of queries and keys; None for D / H.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, head_size: int | None = None) -> None:
        super().__init__()
        if head_size is None and width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and {heads} heads")
        self.heads = heads
        self.head_size = head_size or width // heads
        self.scaled_dot_product = ScaledDotProductAttention(dropout)

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


class SelfAttention(MultiHeadAttention):
    """Attention of a sequence to itself; q, k and v in one product.

    Args:
        width, heads, dropout: as for MultiHeadAttention.
        is_causal: whether a token attends to none after it.
        key_heads: Hkv, heads of keys and values, which H / Hkv query heads share each; None for H.
        head_size: E, of queries and keys; None for D / H. value_size: Ev; None for E.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        is_causal: bool = False,
        key_heads: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
    ) -> None:
        super().__init__(width, heads, dropout, head_size)
        self.is_causal = is_causal
        self.key_heads, value_size = key_heads or heads, value_size or self.head_size
        if heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key heads, got {heads} heads and {self.key_heads} of keys")
        self.sizes = [heads * self.head_size, self.key_heads * self.head_size, self.key_heads * value_size]
        self.query_key_value = nn.Linear(width, sum(self.sizes))
        self.output = nn.Linear(heads * value_size, width)
        self.reset_parameters()

    def _split(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, ...]:
        """x (R, sum(sizes)) as query (B, H, T, E), key (B, Hkv, T, E) and value (B, Hkv, T, Ev)."""
        if self.sizes[0] == self.sizes[1] == self.sizes[2]:
            return rows.split(x, 3, self.heads)
        parts = zip(x.split(self.sizes, dim=1), (self.heads, self.key_heads, self.key_heads))
        return tuple(rows.split(part, 1, heads)[0] for part, heads in parts)

    def forward(
        self, x: torch.Tensor, rows: Rows, positions: Positions, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """x (R, D), which stands in `rows`, after the tokens that are in the cache, if any; returns (R, D)."""
        query, key, value = self._split(self.query_key_value(x), rows)
        query, key = positions.turn(query, rows), positions.turn(key, rows)
        if cache is not None:
            key, value = cache.extend(key, value)
        mask = None if self.is_causal else rows.mask  # padding ends a sequence: a causal mask keeps it from all others
        bias = positions.bias(rows)
        if bias is not None:
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
        is_causal = self.is_causal and rows.length > 1  # no key stands after the one query that a cache is read with
        mixed = self.scaled_dot_product(query, key, value, mask, is_causal)
        return self.output(rows.join(mixed))


class CrossAttention(MultiHeadAttention):
    """Attention to a memory; k and v in one product. Arguments as for MultiHeadAttention."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(width, heads, dropout)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.reset_parameters()

    def read(self, memory: Memory) -> KeyValue:
        """The keys and values of a memory."""
        key, value = memory.rows.split(self.key_value(memory.states), 2, self.heads)
        return KeyValue(key, value, memory.rows.mask)

    def forward(self, x: torch.Tensor, rows: Rows, memory: KeyValue) -> torch.Tensor:
        """x (R, D), which stands in `rows`; returns (R, D)."""
        (query,) = rows.split(self.query(x), 1, self.heads)
        return self.output(rows.join(self.scaled_dot_product(query, *memory, False)))


class FeedForward(nn.Module):
    """linear(dropout(activation(linear(x)))), each row by itself: (R, D) to (R, D)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, activation: str = "relu") -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation = ACTIVATIONS[activation]
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.contract.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.expand(x))
        return self.contract(self.dropout(x) if self.dropout.now else x)


class Layer(nn.Module):
    """What encoder and decoder layers share: each sublayer f has dropout, residual and layer norm.

    Args:
        norm: "post" computes norm(x + dropout(f(x))) as the paper does, "pre" x + dropout(f(norm(x))) (Xiong et al.
            2020), "course" dropout(norm(x + f(x))) as the expression report does.
        dropout: the probability, in training.
    """

    def __init__(self, norm: str, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.dropout = Dropout(dropout)

    def add(self, x: torch.Tensor, branch: torch.Tensor, norm: kernels.nn.LayerNorm) -> torch.Tensor:
        """x and what a sublayer makes of it, (R, D) each, as the next sublayer takes it; not for "pre"."""
        if self.norm == "course":
            return self.dropout(norm(branch, x))
        return norm(branch, x, dropout_p=self.dropout.now)


class EncoderLayer(Layer):
    """Self attention and feed-forward. `norm` as in Layer."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float = 0.0, norm: str = "post", activation: str = "relu"
    ) -> None:
        super().__init__(norm, dropout)
        self.attention = SelfAttention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)
        self.attention_norm = kernels.nn.LayerNorm(width)
        self.feed_forward_norm = kernels.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, rows: Rows, positions: Positions) -> torch.Tensor:
        """x (R, D), which stands in `rows`; returns (R, D)."""
        if self.norm == "pre":
            y = self.attention(self.attention_norm(x), rows, positions)
            y, x = self.feed_forward_norm(y, x, dropout_p=self.dropout.now, prenorm=True)
            return self.dropout.add(x, self.feed_forward(y))
        x = self.add(x, self.attention(x, rows, positions), self.attention_norm)
        return self.add(x, self.feed_forward(x), self.feed_forward_norm)


class DecoderLayer(Layer):
    """Causal self attention, attention to the encoder's output, and feed-forward. `norm` as in Layer."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float = 0.0, norm: str = "post", activation: str = "relu"
    ) -> None:
        super().__init__(norm, dropout)
        self.attention = SelfAttention(width, heads, dropout, is_causal=True)
        self.cross_attention = CrossAttention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)
        self.attention_norm = kernels.nn.LayerNorm(width)
        self.cross_attention_norm = kernels.nn.LayerNorm(width)
        self.feed_forward_norm = kernels.nn.LayerNorm(width)

    def forward(
        self, x: torch.Tensor, rows: Rows, positions: Positions, memory: KeyValue, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """x (R, D), which stands in `rows`, after the tokens in the cache, if any; `memory` as read; returns (R, D)."""
        if self.norm == "pre":
            p = self.dropout.now
            y = self.attention(self.attention_norm(x), rows, positions, cache)
            y, x = self.cross_attention_norm(y, x, dropout_p=p, prenorm=True)
            y, x = self.feed_forward_norm(self.cross_attention(y, rows, memory), x, dropout_p=p, prenorm=True)
            return self.dropout.add(x, self.feed_forward(y))
        x = self.add(x, self.attention(x, rows, positions, cache), self.attention_norm)
        x = self.add(x, self.cross_attention(x, rows, memory), self.cross_attention_norm)
        return self.add(x, self.feed_forward(x), self.feed_forward_norm)
