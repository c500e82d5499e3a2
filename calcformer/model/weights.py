"""What attends to what: the attention weights of a model, layer by layer."""

from typing import Any, NamedTuple

import torch
from torch import nn

import kernels
from calcformer.model.layers import CrossAttention, ScaledDotProductAttention, SelfAttention

__all__ = ["AttentionWeights", "attention_weights"]


class AttentionWeights(NamedTuple):
    """The weights of each layer, (B, H, L, S) float32: row l says how query l mixes the S values, and sums to 1.

    Padding has weight 0 in the rows of all tokens; its own rows mean nothing. A source of padding alone has rows of 0.
    """

    encoder: list[torch.Tensor]
    decoder: list[torch.Tensor]
    cross: list[torch.Tensor]


@torch.no_grad()
def attention_weights(model: nn.Module, *inputs: torch.Tensor) -> AttentionWeights:
    """The weights with which `model`, in evaluation mode, attends when it reads its inputs.

    Args:
        inputs: of an encoder-decoder the source (B, S) int64, and the target (B, T) int64 as the decoder reads it; of
            another model the tokens (B, T) int64. One that has no attention has no weights.
    """
    found: dict[nn.Module, torch.Tensor] = {}

    def keep(attention: nn.Module, arguments: tuple[Any, ...]) -> None:
        query, key, value, mask, is_causal = arguments
        weights = kernels.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=query.shape[1] != key.shape[1],
            need_weights=True,
        ).weights
        assert weights is not None
        found[attention] = weights.float()

    hooks = [
        module.register_forward_pre_hook(keep)
        for module in model.modules()
        if isinstance(module, ScaledDotProductAttention)
    ]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    weights = AttentionWeights([], [], [])
    for module in model.modules():
        if isinstance(module, CrossAttention):
            weights.cross.append(found[module.scaled_dot_product])
        elif isinstance(module, SelfAttention):
            (weights.decoder if module.is_causal else weights.encoder).append(found[module.scaled_dot_product])
    return weights
