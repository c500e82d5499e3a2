"""The Triton kernels behind `torch.nn.functional.scaled_dot_product_attention`, by PyTorch's own registry.

    import torch.nn.attention as attention
    from kernels.integrations import pytorch

    attention.activate_flash_attention_impl(pytorch.register())
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        ...  # calls that PyTorch would give to its FlashAttention go to the Triton kernels
    attention.restore_flash_attention_impl()

PyTorch chooses its backend before it asks who implements it, so its conditions for FlashAttention stay. It refuses, and
gives to another of its backends, or raises for where no other may be taken:

- every `attn_mask`, also one of all True;
- float32 and float64: float16 and bfloat16 only;
- values of another width than keys, heads wider than 256; of head sizes that 8 does not divide it pads copies;
- `is_causal` with L != S, L or S of 0, rows whose last stride is not 1;
- tensors that have not four dimensions, or of different batch sizes; chips before compute capability 8.0;
- on 8.6 to 8.9 and 12.x with gradients, heads of 193 to 224, and with dropout of 193 to 256.

Without `sdpa_kernel` cuDNN comes first on chips of compute capability 9.0 and 10.x, whatever is registered. What
PyTorch has no argument for (windows, soft cap, sinks), packed sequences and nested tensors do not come this way. So
`kernels.scaled_dot_product_attention` itself takes more calls: this door is for code that cannot be changed. It always
runs the kernel for any shape, or a Hopper one, since PyTorch wants the log-sum-exp.

No GPU has run it yet. What is registered is tested on a CPU, called by PyTorch's autograd.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.attention import register_flash_attention_impl

from kernels.attention.call import Call
from kernels.attention.ops import GRADIENTS
from kernels.backend import HAS_TRITON

__all__ = ["register"]


def register(name: str = "calcformer") -> str:
    """Make the kernels known to PyTorch under a name, for `torch.nn.attention.activate_flash_attention_impl(name)`.

    Nothing changes until it is activated. Activate and restore it between training steps: a backward with dropout that
    another implementation runs than the forward is wrong, since each draws random numbers of its own.

    Args:
        name: any but those of PyTorch, FA3 and FA4.

    Returns:
        The name.

    Raises:
        ValueError: the name is PyTorch's. ImportError: Triton is not installed.
    """
    if name in ("FA3", "FA4"):
        raise ValueError(f"name must not be one of PyTorch's own, found {name!r}; leave it out for 'calcformer'")
    if not HAS_TRITON:
        raise ImportError("the Triton kernels need the triton package, which is not installed; pip install triton")
    register_flash_attention_impl(name, register_fn=Registration)
    return name


class Registration:
    """The kernels in place of PyTorch's FlashAttention, until `remove`."""

    def __init__(self, key: str = "CUDA") -> None:
        """key: of PyTorch's dispatcher; tests put in the interpreter's, CPU."""
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL", key)
        with warnings.catch_warnings():  # that kernels are replaced, which is what was asked for
            warnings.filterwarnings("ignore", ".*only once for all operators", UserWarning)
            self.library.impl("_scaled_dot_product_flash_attention", forward, key)
            self.library.impl("_scaled_dot_product_flash_attention_backward", backward, key)

    def remove(self) -> None:
        """Put PyTorch's own back, as the last reference to the library goes."""
        self.library = None


def call_of(
    query: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None, seed: torch.Tensor | None
) -> Call:
    """What PyTorch asks of FlashAttention, whose causal rule puts the last query beside the last key."""
    return Call(
        seed=seed if dropout_p > 0.0 else None,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        dropout_p=dropout_p,
        right=0 if is_causal else None,
        bottom_right=is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def ordered_as(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x with the strides that compiled code counts on, those of a new tensor like the other."""
    steps = zip(like.shape, x.stride(), torch.empty_like(like, device="meta").stride())
    is_right = all(step == wanted for size, step, wanted in steps if size > 1)
    return x if is_right else torch.empty_like(like).copy_(x)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten::_scaled_dot_product_flash_attention`: query (B, Hq, L, E), key and value (B, Hkv, S, E).

    Returns:
        output (B, Hq, L, E); its log-sum-exp (B, Hq, L), natural, float32; two tensors of packed sequences, None; L; S;
        dropout's seed, (2,) uint64 as PyTorch expects it; a tensor for its offset, which there is none of, and an empty
        one for the mask.
    """
    if return_debug_mask:
        raise ValueError("return_debug_mask must be False: the Triton kernels never store which weights were dropped")
    seed = query.new_empty(2, dtype=torch.int64)  # the kernels take one number
    if dropout_p > 0.0:
        seed = torch.randint(2**63 - 1, (2,), device=query.device)
    call = call_of(query, dropout_p, is_causal, scale, seed[:1])
    output, row_max, row_sum = torch.ops.kernels.attention_forward.default(query, key, value, *call, True)
    lse = row_max + torch.log(row_sum)  # -inf in a row with no key
    output, offset, mask = ordered_as(query, output), query.new_empty((), dtype=torch.uint64), query.new_empty(0)
    return output, lse, None, None, query.shape[2], key.shape[2], seed.view(torch.uint64), offset, mask


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`aten::_scaled_dot_product_flash_attention_backward`: the gradients of query, key and value."""
    seed = philox_seed[:1].view(torch.int64) if dropout_p > 0.0 else None
    call = call_of(query, dropout_p, is_causal, scale, seed)
    # The kernels take a row's maximum and sum; with the log-sum-exp for the maximum the sum is 1, or 0 without keys.
    row_sum = torch.where(logsumexp == -torch.inf, 0.0, 1.0)
    wanted = [name in ("query", "key", "value") for name in GRADIENTS]
    grads = torch.ops.kernels.attention_backward.default(
        grad_out, None, out, logsumexp, row_sum, query, key, value, *call, wanted
    )
    return tuple(ordered_as(x, grad) for x, grad in zip((query, key, value), grads))  # type: ignore[return-value]
