"""What attends to what: the attention weights of a model, layer by layer."""

from typing import Any, NamedTuple

import torch
from torch import nn

import kernels
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import ScaledDotProductAttention

__all__ = ["AttentionWeights", "attention_weights"]


class AttentionWeights(NamedTuple):
    """The weights of each layer, (B, H, L, S) float32: row l says how query l mixes the S values, and sums to 1.

    Padding has weight 0 in the rows of all tokens; its own rows mean nothing. A source of padding alone has rows of 0.
    """

    encoder: list[torch.Tensor]
    decoder: list[torch.Tensor]
    cross: list[torch.Tensor]


@torch.no_grad()
def attention_weights(model: EncoderDecoder, source: torch.Tensor, target: torch.Tensor) -> AttentionWeights:
    """The weights with which `model`, in evaluation mode, attends when it reads source and target.

    Args:
        source: (B, S) int64.
        target: (B, T) int64, as the decoder reads it.
    """
    found: dict[nn.Module, torch.Tensor] = {}

    def keep(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        query, key, value, mask, is_causal = inputs
        weights = kernels.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, need_weights=True
        ).weights
        assert weights is not None
        found[attention] = weights.float()

    hooks = [
        module.register_forward_pre_hook(keep)
        for module in model.modules()
        if isinstance(module, ScaledDotProductAttention)
    ]
    try:
        model(source, target)
    finally:
        for hook in hooks:
            hook.remove()
    return AttentionWeights(
        encoder=[found[layer.attention.scaled_dot_product] for layer in model.encoder],
        decoder=[found[layer.attention.scaled_dot_product] for layer in model.decoder],
        cross=[found[layer.cross_attention.scaled_dot_product] for layer in model.decoder],
    )
