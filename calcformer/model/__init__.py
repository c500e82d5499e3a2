"""The transformer, its layers and its position encodings."""

from calcformer.model.cache import Cache
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import CrossAttention, DecoderLayer, EncoderLayer, FeedForward, Memory, SelfAttention
from calcformer.model.weights import AttentionWeights, attention_weights

__all__ = [
    "AttentionWeights",
    "Cache",
    "CrossAttention",
    "DecoderLayer",
    "EncoderDecoder",
    "EncoderLayer",
    "FeedForward",
    "Memory",
    "SelfAttention",
    "attention_weights",
]
