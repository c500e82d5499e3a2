"""The transformer, its layers and its position encodings."""

from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention

__all__ = ["DecoderLayer", "EncoderDecoder", "EncoderLayer", "FeedForward", "MultiHeadAttention"]
