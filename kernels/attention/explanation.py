"""Which kernel runs a call of attention, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels.attention.api import Options, choose_backend, prepare
from kernels.attention.checks import check
from kernels.attention.cpu import route
from kernels.attention.cpu.simple import way_of
from kernels.attention.plan import needs_statistics, plan
from kernels.backend import check_tensor_types, wants_gradient
from kernels.subclasses import holds_others

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Explanation", "explain"]

NAMES = {
    "short": "the Triton kernel for short sequences",
    "hopper": "the Gluon kernel for Hopper chips",
    "general": "the Triton kernel for any shape",
}
FUSED = "PyTorch's scaled_dot_product_attention"
FORMULA = "the formula in plain PyTorch, which stores the L x S weights"


class Explanation(NamedTuple):
    """Which kernel runs a call, and why each faster one does not."""

    kernel: str
    why_not: dict[str, str]  # kernel: reason

    def __str__(self) -> str:
        """A sentence a kernel."""
        reasons = (f"{kernel[0].upper()}{kernel[1:]} does not: {reason}." for kernel, reason in self.why_not.items())
        return "\n".join([f"{self.kernel[0].upper()}{self.kernel[1:]} runs this call.", *reasons])


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    need_weights: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    **options: Unpack[Options],
) -> Explanation:
    """Say which kernel `scaled_dot_product_attention` would run for these arguments, and why not each faster one.

    Runs nothing. Arguments (`options`: the other keyword arguments) and errors as there.
    """
    check_tensor_types({"query": query, "key": key, "value": value})
    if holds_others(query, key, value):
        raise TypeError("explain takes plain tensors, found nested ones or DTensors; ask about what they hold")
    check(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    choice = choose_backend(query, value, backend)
    _, q, k, v, call = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options)
    if choice.backend == "triton":
        learned = wants_gradient(call.attn_mask, call.alibi_slopes)  # slopes that learn become a mask
        chosen = plan(q, k, v, call, "forward", needs_statistics(call, return_lse, learned))
        return Explanation(NAMES[chosen.kernel], {NAMES[name]: reason for name, reason in chosen.why_not.items()})
    reason = route.why_not_fused(q, k, v, call, return_lse, need_weights)
    if not reason:
        way = way_of(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, options, backend)
        if way == "formula":
            reason = "it would read the keys and values that heads share anew for each head"
    triton = NAMES["general"]
    if reason:
        return Explanation(FORMULA, {triton: choice.reason, FUSED: reason})
    return Explanation(FUSED, {triton: choice.reason})
