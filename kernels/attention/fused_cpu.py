"""PyTorch's fused attention for CPUs, with the second derivative that PyTorch leaves out."""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels.attention.composed import composed_gradients
from kernels.attention.rules import Extras, Rules
from kernels.backend import wants_gradient

ATEN = torch.ops.aten
FLASH = 1  # of torch.nn.attention.SDPBackend, as the choice is numbered


def takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> bool:
    """Whether the call is one that PyTorch would run on its fused CPU kernel, and whose gradient may be asked for."""
    if not wants_gradient(query, key, value):
        return False
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if query.ndim != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dtype not in (torch.bool, query.dtype)):
        return False
    return torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale) == FLASH


class FusedOnCpu(torch.autograd.Function):
    """attention(query, key, value, attn_mask, is_causal, scale); arguments as in PyTorch, four dimensions each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (B, H, L, Ev) and the kernel's log-sum-exp."""
        return ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep what PyTorch would."""
        *tensors, ctx.is_causal, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value; recomputed with a graph behind them where one is wanted."""
        if grad is None:
            return (None,) * 6
        query, key, value, attn_mask, output, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            found = ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, output, lse, 0.0, ctx.is_causal, attn_mask=attn_mask, scale=ctx.scale
            )
            return (*(x if need else None for x, need in zip(found, needed)), None, None, None)
        rules = Rules(ctx.scale, right=0 if ctx.is_causal else None)
        found = composed_gradients((grad, None), (query, key, value), needed, rules, Extras(attn_mask))
        return (*found, None, None, None)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """A call that `takes` said yes to: query (B, H, L, E), key (B, H, S, E), value (B, H, S, Ev) to (B, H, L, Ev)."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return FusedOnCpu.apply(query, key, value, attn_mask, is_causal, scale)[0]
