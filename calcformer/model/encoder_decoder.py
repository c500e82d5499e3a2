"""The encoder-decoder transformer: tokens of a problem in, scores for the tokens of its answer out."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import kernels.nn
from calcformer.model.cache import Cache
from calcformer.model.dropout import Dropout
from calcformer.model.layers import DecoderLayer, EncoderLayer, Memory
from calcformer.model.positions import Positions, build_positions
from calcformer.model.rows import Rows

__all__ = ["EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """Embeddings, position encoding, encoder and decoder layers, and a linear map to the vocabulary.

    Args:
        vocabulary_size: V, of the target.
        source_length, target_length: the longest sequences expected (a limit only where positions are learned).
        width, heads, hidden: D, H and the width of the feed-forward layers.
        norm: "post", "pre" or "course", see Layer. Each stack ends with a layer norm, as in torch.nn.Transformer.
        positions: see build_positions.
        embeddings: "separate" source, target and output matrices, "shared" source and target, "output", target and
            output, or "tied", all three.
        pad_id: the token that fills short sequences and is never attended to; None where there is none.
        source_vocabulary_size: None for V.

    Source: Vaswani et al. 2017, section 3; initial values as torch.nn.Transformer, nn.Embedding and nn.Linear.
    """

    encoder: Sequence[EncoderLayer]
    decoder: Sequence[DecoderLayer]

    def __init__(
        self,
        vocabulary_size: int,
        source_length: int,
        target_length: int,
        *,
        width: int = 64,
        heads: int = 4,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        hidden: int = 64,
        dropout: float = 0.0,
        norm: str = "post",
        activation: str = "relu",
        positions: str = "sinusoid",
        embeddings: str = "separate",
        pad_id: int | None = None,
        source_vocabulary_size: int | None = None,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.source_embedding = nn.Embedding(source_vocabulary_size or vocabulary_size, width)
        self.target_embedding = nn.Embedding(vocabulary_size, width)
        self.prediction = nn.Linear(width, vocabulary_size)
        self.embedding_scale = 1.0
        if embeddings in ("shared", "tied"):
            self.target_embedding.weight = self.source_embedding.weight
        if embeddings in ("output", "tied"):
            # The matrix must be small where it predicts and of unit size where it embeds (section 3.4).
            nn.init.normal_(self.source_embedding.weight, std=width**-0.5)
            if embeddings == "output":
                nn.init.normal_(self.target_embedding.weight, std=width**-0.5)
            self.prediction.weight = self.target_embedding.weight
            self.embedding_scale = width**0.5
        self.source_positions = build_positions(positions, source_length, width, heads)
        self.target_positions = build_positions(positions, target_length, width, heads, is_causal=True)
        self.encoder = nn.ModuleList(  # type: ignore[assignment]
            EncoderLayer(width, heads, hidden, dropout, norm, activation) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(width, heads, hidden, dropout, norm, activation) for _ in range(decoder_layers)
        )
        self.encoder_norm = kernels.nn.LayerNorm(width)
        self.decoder_norm = kernels.nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def _embed(self, rows: Rows, embedding: nn.Embedding, positions: Positions) -> torch.Tensor:
        x = F.embedding(rows.ids, embedding.weight)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        return self.dropout(positions(x, rows))

    def encode(self, source: torch.Tensor) -> Memory:
        """source (B, S) int64 to what the decoder attends to."""
        rows = Rows(source, self.pad_id)
        x = self._embed(rows, self.source_embedding, self.source_positions)
        for layer in self.encoder:
            x = layer(x, rows, self.source_positions)
        return Memory(self.encoder_norm(x), rows)

    def decode(self, target: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Scores (B, T, V) of the token that follows each of target (B, T) int64; at padding they mean nothing."""
        rows = Rows(target, self.pad_id)
        x = self._embed(rows, self.target_embedding, self.target_positions)
        for layer in self.decoder:
            x = layer(x, rows, self.target_positions, layer.cross_attention.read(memory))
        return rows.spread(self.prediction(self.decoder_norm(x)))

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """source (B, S), target (B, T) int64, the target as the decoder reads it; returns scores (B, T, V)."""
        return self.decode(target, self.encode(source))

    @torch.no_grad()
    def start(self, memory: Memory, length: int) -> Cache:
        """What `next` needs to answer to `memory`, up to `length` tokens."""
        return Cache([layer.cross_attention.read(memory) for layer in self.decoder], length)

    @torch.no_grad()
    def next(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Feed the next token (B,) int64 of every row, which joins the cache.

        Returns:
            Scores (B, V) of the token that follows, as `decode` gives them at the end of all tokens fed so far.
        """
        rows = Rows(token[:, None], None, start=cache.length)
        x = self._embed(rows, self.target_embedding, self.target_positions)
        for layer, kept in zip(self.decoder, cache.layers):
            assert kept.memory is not None
            x = layer(x, rows, self.target_positions, kept.memory, kept)
        return self.prediction(self.decoder_norm(x))
