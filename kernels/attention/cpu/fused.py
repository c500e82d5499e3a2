"""PyTorch's own function, on a CPU with the derivatives that its fused kernel there lacks or has wrong.

That kernel has no second derivative, and under a mask of -1e9 throughout a wrong first one. Whether a graph of the
gradient will be asked for, nobody knows before the backward; so each call with gradients goes through a function of our
own around PyTorch's two operations, which takes the formula where they will not do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention.call import Call
from kernels.attention.formula import composed_gradients
from kernels.autograd import transformed
from kernels.backend import wants_gradient

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
LARGEST_ROUNDING = 2.0**-15  # of a weight, relative to it
FLASH = 1  # of torch.nn.attention.SDPBackend, as the choice is numbered


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Arguments and result as PyTorch's own function has them."""
    if not _is_fused_with_gradients(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Fused.apply(query, key, value, attn_mask, is_causal, scale)


def _is_fused_with_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    """Whether PyTorch would run the call on its fused CPU kernel, and its gradient may be asked for."""
    if not query.is_cpu or not wants_gradient(query, key, value) or torch.compiler.is_compiling():
        return False
    choice = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return choice == FLASH


class Fused(torch.autograd.Function):
    """attention(query, key, value, attn_mask, is_causal, scale): query (B, Hq, L, E), key and value (B, Hkv, S, E), the
    mask None or of numbers, (B, Hq, L, S).
    """

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
        """Output (B, Hq, L, E)."""
        output, lse = FORWARD(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.save_for_backward(query, key, value, attn_mask, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value: by the formula where they are themselves to be differentiated or batched,
        and where a row's sum drowns in its log-sum-exp. That is all that PyTorch keeps of it: its kernel would take
        each weight for 1.
        """
        query, key, value, attn_mask, output, lse = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed() or drowns(lse):
            call = Call(attn_mask, scale=ctx.scale, right=0 if ctx.is_causal else None)
            inputs, needed = (query, key, value), ctx.needs_input_grad[:3]
            found = composed_gradients((grad, None), inputs, needed, call)
        else:
            found = BACKWARD(
                grad, query, key, value, output, lse, 0.0, ctx.is_causal, attn_mask=attn_mask, scale=ctx.scale
            )
        return (*found, None, None, None)


def drowns(lse: torch.Tensor) -> bool:
    """Whether a row's log-sum-exp is so large that its rounding shows in the weights that are computed from it."""
    return torch.linalg.vector_norm(lse, math.inf).item() * torch.finfo(lse.dtype).eps > LARGEST_ROUNDING
