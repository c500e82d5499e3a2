"""The weights that a page is worked out with: drawn from a seed, or those of a trained run.

Shapes: D model width, H heads, E head size of queries and keys, Ev of values, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import kernels.nn
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import CrossAttention, DecoderLayer, EncoderLayer, SelfAttention
from calcformer.model.positions import Positions, build_positions
from calcformer.model.settings import ModelConfig

__all__ = ["Activation", "Attention", "Layer", "Linear", "Weights", "draw_weights", "weights_of"]

Activation = tuple[str, Callable[[torch.Tensor], torch.Tensor]]  # its name, and what it does


class Linear(NamedTuple):
    """x weight + bias: weight (in, out), bias (out,) or None for 0."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def pick(self, columns: Sequence[int]) -> Linear:
        """Of what comes out only those columns."""
        index = list(columns)
        return Linear(self.weight[:, index], None if self.bias is None else self.bias[index])


class Attention(NamedTuple):
    """query and key (D, H * E), value (D, H * Ev), output (H * Ev, D)."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    heads: int


class Layer(NamedTuple):
    """A layer of the encoder, or with cross attention of the decoder; a norm for each of its sublayers, in order."""

    attention: Attention
    cross_attention: Attention | None
    expand: Linear
    contract: Linear
    norms: Sequence[kernels.nn.LayerNorm]


@dataclass(frozen=True)
class Weights:
    """All of an encoder-decoder transformer.

    Args:
        words: the V words, by number.
        source_embedding, target_embedding: (V, D).
        source_positions, target_positions: what tells where a word stands; `positions` is the name of it.
        final_norms: after the last layer of encoder and decoder, or None.
        prediction: (D, V).
        is_pre_norm: whether a norm stands before its sublayer, and not after the sum.
    """

    words: Sequence[str]
    source_embedding: torch.Tensor
    target_embedding: torch.Tensor
    source_positions: Positions
    target_positions: Positions
    encoder: Sequence[Layer]
    decoder: Sequence[Layer]
    final_norms: tuple[kernels.nn.LayerNorm, kernels.nn.LayerNorm] | None
    prediction: Linear
    positions: str = "sinusoid"
    is_pre_norm: bool = False
    activation: Activation = ("relu", torch.relu)


def draw_weights(
    words: Sequence[str], width: int, heads: int, hidden: int, key_size: int, value_size: int, seed: int
) -> Weights:
    """Weights of one layer each, float64, without biases.

    Uniform in -1..1, narrower where many are added up, and rounded to one digit for people who calculate (two where
    more than 8 are added up).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, added: int) -> torch.Tensor:
        limit = min(1.0, 2 / math.sqrt(added))
        x = (2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 1) * limit
        return x.round(decimals=1 if added <= 8 else 2)

    def linear(rows: int, columns: int) -> Linear:
        return Linear(draw(rows, columns, rows))

    def attention() -> Attention:
        keys, values = heads * key_size, heads * value_size
        return Attention(linear(width, keys), linear(width, keys), linear(width, values), linear(values, width), heads)

    def layer(is_decoder: bool) -> Layer:
        norms = [kernels.nn.LayerNorm(width, dtype=torch.float64) for _ in range(2 + is_decoder)]
        first, second = attention(), attention() if is_decoder else None
        return Layer(first, second, linear(width, hidden), linear(hidden, width), norms)

    embedding = draw(len(words), width, 1)
    places = build_positions("sinusoid", 1, width, heads)
    return Weights(
        words,
        embedding,
        embedding,
        places,
        places,
        encoder=[layer(False)],
        decoder=[layer(True)],
        final_norms=None,
        prediction=linear(width, len(words)),
    )


def weights_of(model: EncoderDecoder, words: Sequence[str], config: ModelConfig) -> Weights:
    """Those of a model, in its own dtype. Its dropout is left out, as in evaluation."""

    def linear(layer: nn.Linear) -> Linear:
        return Linear(layer.weight.mT, layer.bias)

    def parts(layer: nn.Linear, count: int) -> list[Linear]:
        return [Linear(w.mT, b) for w, b in zip(layer.weight.chunk(count), layer.bias.chunk(count))]

    def attention(layer: SelfAttention | CrossAttention) -> Attention:
        if isinstance(layer, SelfAttention):
            query, key, value = parts(layer.query_key_value, 3)
        else:
            query, (key, value) = linear(layer.query), parts(layer.key_value, 2)
        return Attention(query, key, value, linear(layer.output), layer.heads)

    def layer_of(layer: EncoderLayer | DecoderLayer) -> Layer:
        cross, norms = None, [layer.attention_norm, layer.feed_forward_norm]
        if isinstance(layer, DecoderLayer):
            cross = attention(layer.cross_attention)
            norms.insert(1, layer.cross_attention_norm)
        expand, contract = layer.feed_forward.expand, layer.feed_forward.contract
        return Layer(attention(layer.attention), cross, linear(expand), linear(contract), norms)

    return Weights(
        words,
        model.source_embedding.weight * model.embedding_scale,
        model.target_embedding.weight * model.embedding_scale,
        model.source_positions,
        model.target_positions,
        encoder=[layer_of(layer) for layer in model.encoder],
        decoder=[layer_of(layer) for layer in model.decoder],
        final_norms=(model.encoder_norm, model.decoder_norm),
        prediction=linear(model.prediction),
        positions=config.positions,
        is_pre_norm=config.norm == "pre",
        activation=(config.activation, {"relu": torch.relu, "gelu": F.gelu}[config.activation]),
    )
