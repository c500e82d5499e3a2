"""PyTorch's fused attention for CPUs, with the second derivative that PyTorch leaves out."""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels.attention.composed import composed_gradients
from kernels.attention.call import Call
from kernels.autograd import transformed
from kernels.backend import wants_gradient

ATEN = torch.ops.aten
LARGEST_ROUNDING = 2.0**-15  # of a weight, relative to it
FLASH = 1  # of torch.nn.attention.SDPBackend, as the choice is numbered


def takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    """Whether the call is one that PyTorch would run on its fused CPU kernel, and whose gradient may be asked for."""
    if not query.is_cpu or not wants_gradient(query, key, value) or torch.compiler.is_compiling() or query.ndim != 4:
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    choice = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return choice == FLASH


def drowns(lse: torch.Tensor) -> bool:
    """Whether a row's log-sum-exp is so large that its rounding shows in the weights that are computed from it."""
    return bool(lse.numel()) and lse.abs().amax().item() * torch.finfo(lse.dtype).eps > LARGEST_ROUNDING


class FusedOnCpu(torch.autograd.Function):
    """attention(query, key, value, attn_mask, is_causal, scale); arguments as in PyTorch, four dimensions each."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> torch.Tensor:
        """Output (B, Hq, L, Ev)."""
        output, lse = ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.save_for_backward(query, key, value, attn_mask, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value: by the formula where they are themselves to be differentiated or batched,
        and where PyTorch's kernel would be wrong. Under a mask of -1e9 throughout, the sum of a row drowns in the
        log-sum-exp, which is all that is kept of it, and the kernel takes each weight for 1.
        """
        query, key, value, attn_mask, output, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or transformed() or drowns(lse):
            call = Call(attn_mask, scale=ctx.scale, right=0 if ctx.is_causal else None)
            found = composed_gradients((grad, None), (query, key, value), needed, call)
        else:
            found = ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, output, lse, 0.0, ctx.is_causal, attn_mask=attn_mask, scale=ctx.scale
            )
        return (*(x if need else None for x, need in zip(found, needed)), None, None, None)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """A call that `takes` said yes to: query (B, Hq, L, E), key and value (B, Hkv, S, E); returns (B, Hq, L, E)."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return FusedOnCpu.apply(query, key, value, attn_mask, is_causal, scale)
