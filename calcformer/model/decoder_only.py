"""The decoder-only transformer, a language model: tokens in, scores for the token that follows each out."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import kernels.nn
from calcformer.model.cache import Cache, LayerCache
from calcformer.model.dropout import Dropout
from calcformer.model.layers import FeedForward, SelfAttention
from calcformer.model.positions import AddedPositions, Positions, build_positions
from calcformer.model.rows import Rows

__all__ = ["Block", "DecoderOnly"]

NORMS = {"layer": kernels.nn.LayerNorm, "rms": kernels.nn.RMSNorm}
EPS = 1e-5
STD = 0.02  # of initial weights


class Block(nn.Module):
    """Causal self attention and feed-forward, each with a norm before it. Arguments as for `DecoderOnly`."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        norm: str,
        activation: str,
        key_heads: int | None,
        head_size: int | None,
        value_size: int | None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be {' or '.join(NORMS)}, got {norm!r}")
        self.attention_norm = NORMS[norm](width, eps=EPS)
        self.attention = SelfAttention(width, heads, dropout, True, key_heads, head_size, value_size)
        self.feed_forward_norm = NORMS[norm](width, eps=EPS)
        self.feed_forward = FeedForward(width, hidden, activation=activation)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        rows: Rows,
        positions: Positions,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer: x + f(norm(x)) with attention for f, then with the feed-forward, whose sum is left to who is next.

        So that each sum is one pass with the norm that reads it.

        Args:
            x: (R, D), which stands in `rows`, after the tokens in the cache, if any.
            branch: (R, D), what the layer before leaves to be added to x; None before the first.

        Returns:
            x and branch for the next.
        """
        p = self.dropout.now
        if branch is None:
            y = self.attention_norm(x)
        else:
            y, x = self.attention_norm(branch, x, dropout_p=p, prenorm=True)
        y, x = self.feed_forward_norm(self.attention(y, rows, positions, cache), x, dropout_p=p, prenorm=True)
        return x, self.feed_forward(y)


class DecoderOnly(nn.Module):
    """Embedding, position encoding, pre-norm layers of causal self attention and feed-forward, norm, and the head.

    Padding needs no mask where it stands behind a sequence: no token before it attends to it.

    Args:
        vocabulary_size: V.
        context: the longest sequence expected (a limit only where positions are learned).
        width, heads, layers, hidden: D, H, number of layers, width of the feed-forward layers.
        dropout: the probability, in training: of embeddings, attention weights and what each sublayer adds.
        norm: "layer" or "rms".
        activation: "gelu", "gelu-tanh" (GPT-2's own approximation), "relu", or "swiglu", whose first product has
            2 * hidden columns.
        positions: see build_positions. Where they are a fixed encoding, embeddings are multiplied by 50 before.
        tied: the head's matrix is the embedding's. The head has no bias.
        key_heads: heads of keys and values, which heads / key_heads query heads share each; None for as many.
        head_size, value_size: of a head's queries and keys, and of its values; None for width / heads, and as the keys.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3; its initial
    values: normal of deviation 0.02, products that end in a residual sum divided by sqrt(2 * layers), biases 0.
    """

    layers: Sequence[Block]

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        *,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        hidden: int = 256,
        dropout: float = 0.0,
        norm: str = "layer",
        activation: str = "gelu",
        positions: str = "learned",
        tied: bool = True,
        key_heads: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary_size, self.context = vocabulary_size, context
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions = build_positions(positions, context, width, heads, is_causal=True, head_size=head_size)
        # A fixed encoding, of about unit size, would drown embeddings of deviation 0.02.
        self.embedding_scale = 1 / STD if isinstance(self.positions, AddedPositions) else 1.0
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            Block(width, heads, hidden, dropout, norm, activation, key_heads, head_size, value_size)
            for _ in range(layers)
        )
        self.norm = NORMS[norm](width, eps=EPS)
        self.prediction = nn.Linear(width, vocabulary_size, bias=False)
        if tied:
            self.prediction.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as GPT-2; norms are 1 and 0 already, and learned positions of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            for last in layer.attention.output, layer.feed_forward.contract:
                nn.init.normal_(last.weight, std=STD / (2 * len(self.layers)) ** 0.5)

    def _read(self, rows: Rows, cache: Cache | None = None) -> torch.Tensor:
        """What the head makes scores of, (R, D)."""
        x = F.embedding(rows.ids, self.embedding.weight)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        x = self.dropout(self.positions(x, rows))
        branch = None
        for layer, kept in zip(self.layers, [None] * len(self.layers) if cache is None else cache.layers):
            x, branch = layer(x, branch, rows, self.positions, kept)
        return self.norm(branch, x, dropout_p=self.dropout.now)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) int64; returns scores (B, T, V) of the token that follows each."""
        rows = Rows(ids, None, compact=False)
        return rows.spread(self.prediction(self._read(rows)))

    @torch.no_grad()
    def start(self, ids: torch.Tensor, limit: int) -> tuple[Cache, torch.Tensor]:
        """Read sequences, of one length, that `next` goes on with.

        Args:
            ids: (B, T) int64.
            limit: the most tokens of a sequence, these included.

        Returns:
            What `next` needs, and scores (B, V) of the token that follows.
        """
        cache = Cache([None] * len(self.layers), limit)
        x = self._read(Rows(ids, None, compact=False), cache)
        return cache, self.prediction(x.view(*ids.shape, -1)[:, -1])

    @torch.no_grad()
    def next(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Feed the next token (B,) int64 of every row, which joins the cache.

        Returns:
            Scores (B, V) of the token that follows, as `forward` gives them at the end of all tokens so far.
        """
        return self.prediction(self._read(Rows(token[:, None], None, start=cache.length), cache))
