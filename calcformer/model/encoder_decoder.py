"""The encoder-decoder transformer: tokens of a problem in, scores for the tokens of its answer out."""

import torch
from torch import nn
from torch.nn import functional as F

import kernels.nn
from calcformer.model.dropout import Dropout
from calcformer.model.layers import DecoderLayer, EncoderLayer, Memory
from calcformer.model.positions import build_positions
from calcformer.model.rows import Rows

__all__ = ["EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """Embeddings, position encoding, encoder and decoder layers, and a linear map to the vocabulary.

    Args:
        vocabulary_size: V, shared by source and target.
        source_length, target_length: the longest sequences expected (a limit only where positions are learned).
        width, heads, hidden: D, H and the width of the feed-forward layers.
        norm: "post" or "pre", see EncoderLayer. Each stack ends with a layer norm, as in torch.nn.Transformer.
        positions: "sinusoid", "learned" or "none".
        embeddings: "separate" source, target and output matrices, "shared" source and target, or "tied", all three.
        pad_id: the token that fills short sequences and is never attended to; None where there is none.

    Source: Vaswani et al. 2017, section 3; initial values as torch.nn.Transformer, nn.Embedding and nn.Linear.
    """

    def __init__(self, vocabulary_size: int, source_length: int, target_length: int, *, width: int = 64,
                 heads: int = 4, encoder_layers: int = 2, decoder_layers: int = 2, hidden: int = 64,
                 dropout: float = 0.0, norm: str = "post", activation: str = "relu", positions: str = "sinusoid",
                 embeddings: str = "separate", pad_id: int | None = None) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.source_embedding = nn.Embedding(vocabulary_size, width)
        self.target_embedding = nn.Embedding(vocabulary_size, width)
        self.prediction = nn.Linear(width, vocabulary_size)
        self.embedding_scale = 1.0
        if embeddings != "separate":
            self.target_embedding.weight = self.source_embedding.weight
        if embeddings == "tied":
            # The matrix must be small where it predicts and of unit size where it embeds (section 3.4).
            nn.init.normal_(self.source_embedding.weight, std=width**-0.5)
            self.prediction.weight = self.source_embedding.weight
            self.embedding_scale = width**0.5
        self.source_positions = build_positions(positions, source_length, width)
        self.target_positions = build_positions(positions, target_length, width)
        self.encoder = nn.ModuleList(
            EncoderLayer(width, heads, hidden, dropout, norm, activation) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(width, heads, hidden, dropout, norm, activation) for _ in range(decoder_layers))
        self.encoder_norm = kernels.nn.LayerNorm(width)
        self.decoder_norm = kernels.nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def _embed(self, rows: Rows, embedding: nn.Embedding, positions: nn.Module) -> torch.Tensor:
        x = F.embedding(rows.ids, embedding.weight)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        return self.dropout(positions(x, rows))

    def encode(self, source: torch.Tensor) -> Memory:
        """source (B, S) int64 to what the decoder attends to."""
        rows = Rows(source, self.pad_id)
        x = self._embed(rows, self.source_embedding, self.source_positions)
        for layer in self.encoder:
            x = layer(x, rows)
        return Memory(self.encoder_norm(x), rows)

    def decode(self, target: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Scores (B, T, V) of the token that follows each of target (B, T) int64; at padding they mean nothing."""
        rows = Rows(target, self.pad_id)
        x = self._embed(rows, self.target_embedding, self.target_positions)
        for layer in self.decoder:
            x = layer(x, rows, memory)
        return rows.spread(self.prediction(self.decoder_norm(x)))

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """source (B, S), target (B, T) int64, the target as the decoder reads it; returns scores (B, T, V)."""
        return self.decode(target, self.encode(source))
