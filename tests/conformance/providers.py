"""The attentions to be judged: ours, ours on Triton, PyTorch's backends one by one, FlexAttention."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conformance.judge import Attention


class Provider(NamedTuple):
    """title: head of its column. load: gives the attention. devices: where it runs.

    interpreted: whether its kernels run in Triton's interpreter when the device is the CPU.
    """

    title: str
    load: Callable[[str], Attention]
    devices: tuple[str, ...] = ("cpu", "cuda")
    interpreted: bool = False


def ours(device: str) -> Attention:
    """What a user of the package gets: Triton on a GPU, PyTorch by our rules on a CPU."""
    import kernels

    backend = "torch" if device == "cpu" else "auto"
    return functools.partial(kernels.scaled_dot_product_attention, backend=backend)


def our_triton(device: str) -> Attention:
    """Our kernels, and nothing else; on a CPU in the interpreter."""
    if device == "cpu":
        interpret()
    import kernels

    return functools.partial(kernels.scaled_dot_product_attention, backend="triton")


def interpret() -> None:
    """Switch Triton's interpreter on, before any kernel is imported, as tests/conftest.py does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        from tests import interpreter

        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.prepare()


def of_torch(backend: SDPBackend) -> Callable[[str], Attention]:
    """One backend of PyTorch's attention, and none other."""

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

    return lambda _: attention


def flex(_: str) -> Attention:
    """FlexAttention, compiled, with mask and causality as its score modification."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if dropout_p:
            raise NotImplementedError("FlexAttention has no dropout")
        never = torch.finfo(torch.float32).min if attn_mask is None else -torch.inf
        mask = attn_mask
        if mask is not None:
            mask = mask.expand(*query.shape[:-1], key.shape[-2])

        def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if is_causal:
                score = torch.where(i >= j, score, never)
            if mask is not None and mask.dtype == torch.bool:
                score = torch.where(mask[b, h, i, j], score, -torch.inf)
            elif mask is not None:
                score = score + mask[b, h, i, j]
            return score

        return compiled(query, key, value, score_mod=score_mod, scale=scale, enable_gqa=enable_gqa)

    return attention


PROVIDERS: dict[str, Provider] = {
    "ours": Provider("ours", ours),
    "triton": Provider("our Triton kernels", our_triton, interpreted=True),
    "torch": Provider("torch", lambda _: torch.nn.functional.scaled_dot_product_attention),
    "torch-math": Provider("torch math", of_torch(SDPBackend.MATH)),
    "torch-flash": Provider("torch flash", of_torch(SDPBackend.FLASH_ATTENTION)),
    "torch-efficient": Provider("torch efficient", of_torch(SDPBackend.EFFICIENT_ATTENTION), ("cuda",)),
    "torch-cudnn": Provider("torch cuDNN", of_torch(SDPBackend.CUDNN_ATTENTION), ("cuda",)),
    "flex": Provider("FlexAttention", flex, ("cuda",)),
}
