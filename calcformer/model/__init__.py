"""The transformers, their layers and position encodings, and small models of the next word."""

from calcformer.model.cache import Cache
from calcformer.model.decoder_only import DecoderOnly
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import CrossAttention, DecoderLayer, EncoderLayer, FeedForward, Memory, SelfAttention
from calcformer.model.next_word import FeedForwardNextWord, RecurrentNextWord, TransformerNextWord
from calcformer.model.weights import AttentionWeights, attention_weights

__all__ = [
    "AttentionWeights",
    "Cache",
    "CrossAttention",
    "DecoderLayer",
    "DecoderOnly",
    "EncoderDecoder",
    "EncoderLayer",
    "FeedForward",
    "FeedForwardNextWord",
    "Memory",
    "RecurrentNextWord",
    "SelfAttention",
    "TransformerNextWord",
    "attention_weights",
]
