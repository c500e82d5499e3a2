"""The layers of an encoder-decoder transformer.

Shapes: B batch, T tokens that ask, S tokens that are attended to, H heads, E head size, D = H * E model width.
Masks are bool and broadcast to (B, H, T, S); True = may attend. Source: Vaswani et al. 2017, section 3.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import kernels
import kernels.nn
from calcformer.model.dropout import Dropout

__all__ = ["DecoderLayer", "EncoderLayer", "FeedForward", "MultiHeadAttention"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


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

    def _split(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(B, T, parts * D) to `parts` views of shape (B, H, T, E).

        Unbinding before transposing lets the backward pass gather the gradients of all parts in a single copy.
        """
        split = x.view(x.shape[0], x.shape[1], parts, self.heads, self.head_size).unbind(2)
        return tuple(part.transpose(1, 2) for part in split)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, mask: torch.Tensor | None = None,
                is_causal: bool = False) -> torch.Tensor:
        """Attend from x (B, T, D) to `memory` (B, S, D), or to x itself where `memory` is None; returns (B, T, D)."""
        if self.cross:
            if memory is None:
                raise ValueError("cross attention needs the memory to attend to")
            query = self.query(x).view(x.shape[0], x.shape[1], self.heads, self.head_size).transpose(1, 2)
            key, value = self._split(self.key_value(memory), 2)
        else:
            query, key, value = self._split(self.query_key_value(x), 3)
        mixed = kernels.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal,
                                                     dropout_p=self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """linear(dropout(activation(linear(x)))), at each place by itself: (B, T, D) to (B, T, D)."""

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

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, S, D), mask broadcast to (B, H, S, S); returns (B, S, D)."""
        if self.pre_norm:
            x = self.dropout.add(x, self.attention(self.attention_norm(x), mask=mask))
            return self.dropout.add(x, self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(self.dropout.add(x, self.attention(x, mask=mask)))
        return self.feed_forward_norm(self.dropout.add(x, self.feed_forward(x)))


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

    def forward(self, x: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, D), memory (B, S, D), memory_mask broadcast to (B, H, T, S); returns (B, T, D)."""
        if self.pre_norm:
            x = self.dropout.add(x, self.attention(self.attention_norm(x), is_causal=True))
            x = self.dropout.add(x, self.cross_attention(self.cross_attention_norm(x), memory, memory_mask))
            return self.dropout.add(x, self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(self.dropout.add(x, self.attention(x, is_causal=True)))
        x = self.cross_attention_norm(self.dropout.add(x, self.cross_attention(x, memory, memory_mask)))
        return self.feed_forward_norm(self.dropout.add(x, self.feed_forward(x)))
