"""Attention to compare: inputs, providers by name, and the exact result of a part."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kernels
from bench.accounting import SEED, AttentionCase, Direction
from bench.check import WrongResult, require_right
from bench.record import Job, Refused, attempt, compile_peer
from bench.timing import Call, input_sets
from kernels.attention import call, plan
from kernels.attention.explanation import NAMES, Explanation

BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch math": SDPBackend.MATH,
}
GENERAL = "the general kernel"  # ours for any shape, where a special one would run
FLASH = {"FlashAttention-3": "flash_attn_interface", "FlashAttention-4": "flash_attn.cute"}  # their modules
FLEX = "FlexAttention compiled"
PROVIDERS = ["kernels", GENERAL, *BACKENDS, *FLASH, FLEX]
MATH_LENGTH = 2_048  # the longest sequence whose scores the math backend is asked to store: 70 GB at 4,096


class Inputs(NamedTuple):
    """query (B, H, S, D), key and value (B, Hkv, S, D), mask or None; the output's gradient (B, H, S, D)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    grad_output: torch.Tensor

    def differentiable(self) -> list[torch.Tensor]:
        return [x for x in self[:4] if x is not None and x.dtype != torch.bool]


Attention = Callable[[Inputs], torch.Tensor]


def make_inputs(case: AttentionCase, device: torch.device, requires_grad: bool = False) -> Inputs:
    """Random inputs. Heads are cut from (B, S, H, D), as a projection leaves them."""

    def heads(count: int) -> torch.Tensor:
        drawn = torch.randn(case.batch, case.length, count, case.head_size, device=device)
        return drawn.to(case.dtype).transpose(1, 2)

    query, grad_output = heads(case.heads), heads(case.heads)
    key, value = (heads(case.kv_heads or case.heads) for _ in range(2))
    mask = None
    if case.mask == "padding":  # at least half of each sequence is there
        lengths = torch.randint((case.length + 1) // 2, case.length + 1, (case.batch, 1, 1, 1), device=device)
        mask = torch.arange(case.length, device=device) < lengths
    elif case.mask == "bias":
        mask = torch.randn(1, case.heads, case.length, case.length, device=device).to(case.dtype)
    inputs = Inputs(query, key, value, mask, grad_output)
    for tensor in inputs.differentiable():
        tensor.requires_grad_(requires_grad)
    return inputs


def label(provider: str, case: AttentionCase, inputs: Inputs, direction: Direction = "forward") -> str:
    """The provider, and for ours what it runs on here: Triton's kernels or, on a CPU, PyTorch's own."""
    if provider == GENERAL:
        return "kernels (general)"
    if provider != "kernels":
        return provider
    x = inputs
    forward = name_of(
        kernels.explain(x.query, x.key, x.value, x.mask, case.dropout, case.is_causal, enable_gqa=case.groups > 1)
    )
    if direction == "forward" or forward not in ("kernels (general)", "kernels (hopper)"):
        return forward
    asked = call.Call(x.mask, dropout_p=case.dropout, right=0 if case.is_causal else None)
    return f"kernels ({plan.plan(x.query, x.key, x.value, asked, 'backward', 'the forward').kernel})"


def name_of(explanation: Explanation) -> str:
    """Ours, by the kernel that runs."""
    kernel = next((kernel for kernel, name in NAMES.items() if name == explanation.kernel), "torch path")
    return f"kernels ({kernel})"


@functools.lru_cache(maxsize=2)  # the check and the timing share what is compiled
def build(provider: str, case: AttentionCase) -> Attention:
    """The provider as a function of the inputs; ValueError where the case is not for it."""
    if provider == "kernels":
        return lambda x: kernels.scaled_dot_product_attention(
            x.query, x.key, x.value, x.mask, case.dropout, case.is_causal, enable_gqa=case.groups > 1
        )
    if provider == GENERAL:
        return functools.partial(_general, case)
    if provider in BACKENDS:
        if provider == "torch math" and case.length > MATH_LENGTH:
            raise ValueError(f"stores the scores; not asked for more than {MATH_LENGTH} keys")
        return functools.partial(_torch, case, BACKENDS[provider])
    return _flash(case, FLASH[provider]) if provider in FLASH else _flex(case)


def _general(case: AttentionCase, x: Inputs) -> torch.Tensor:
    """Ours by the kernel for any shape."""
    with running(GENERAL):
        return build("kernels", case)(x)


def running(provider: str) -> AbstractContextManager[None]:
    """Around a call of the provider, or its backward pass: GENERAL leaves the kernels for special shapes out."""
    return plan.forced(kernel="general") if provider == GENERAL else nullcontext()


def _torch(case: AttentionCase, backend: SDPBackend, x: Inputs) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            x.query, x.key, x.value, x.mask, case.dropout, case.is_causal, enable_gqa=case.groups > 1
        )


def _flash(case: AttentionCase, module: str) -> Attention:
    """FlashAttention's own package (Dao et al.), on (B, S, H, D); ImportError where it is not installed."""
    if case.mask or case.dropout:
        raise ValueError("has no masks and no dropout")
    function = importlib.import_module(module).flash_attn_func

    def run(x: Inputs) -> torch.Tensor:
        result = function(*(tensor.transpose(1, 2) for tensor in x[:3]), causal=case.is_causal)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result  # some give statistics too
        return output.transpose(1, 2)

    return run


def _flex(case: AttentionCase) -> Attention:
    """FlexAttention (Dong et al. 2024), compiled for this shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.dropout:
        raise ValueError("has no dropout")
    if not torch.cuda.is_available():
        raise ValueError("is compiled on a GPU only")
    if not case.mask and case.length not in (512, 4_096, 16_384):
        raise ValueError("compiles for seconds a shape: asked for 512, 4096 and 16384 keys, masks and biases")
    compiled = compile_peer(flex_attention)
    blocks = functools.cache(lambda mask: create_block_mask(mask, None, None, case.length, case.length, "cuda"))

    def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q >= k

    def score_of(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
        def padded(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.where(mask[b, 0, 0, k], s, -math.inf)

        def biased(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return s + mask[0, h, q, k]

        return padded if case.mask == "padding" else biased

    def run(x: Inputs) -> torch.Tensor:
        score = None if x.mask is None else score_of(x.mask)
        block_mask = blocks(causal) if case.is_causal else None
        return compiled(x.query, x.key, x.value, score, block_mask, enable_gqa=case.groups > 1)

    return run


def part(case: AttentionCase, inputs: Inputs) -> tuple[slice, slice, slice]:
    """Batches, query heads and key heads of the part that is checked: one key head, and one batch unless a bias, whose
    gradient sums over batches, is there."""
    batches = slice(None) if case.mask == "bias" else slice(case.batch - 1, case.batch)
    last = inputs.key.shape[1] - 1
    return batches, slice(last * case.groups, (last + 1) * case.groups), slice(last, last + 1)


def take(case: AttentionCase, inputs: Inputs, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """That part of an output, or of the gradients of query, key, value and bias."""
    batches, heads, kv_heads = part(case, inputs)
    index = [(batches, heads), (batches, kv_heads), (batches, kv_heads), (slice(None), heads)]
    return [x[i].detach() for x, i in zip(found, index)]


def exact(case: AttentionCase, inputs: Inputs, backward: bool) -> list[torch.Tensor]:
    """The output's part in float64 by the formula, or the parts of the gradients."""
    batches, heads, kv_heads = part(case, inputs)
    query, grad_output = (x[batches, heads].detach().double() for x in (inputs.query, inputs.grad_output))
    key, value = (x[batches, kv_heads].detach().double() for x in (inputs.key, inputs.value))
    mask = inputs.mask
    if mask is not None:
        mask = mask[batches].detach() if mask.dtype == torch.bool else mask[:, heads].detach().double()
    leaves = [x for x in (query, key, value, mask) if x is not None and x.dtype != torch.bool]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    scores = query @ key.transpose(-2, -1) / math.sqrt(case.head_size)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if case.is_causal:
        later = torch.ones(case.length, case.length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    output = torch.softmax(scores, dim=-1) @ value
    return list(torch.autograd.grad(output, leaves, grad_output)) if backward else [output]


@functools.lru_cache(maxsize=1)  # shared by the providers of a case, which come one after the other
def problem(case: AttentionCase, device: torch.device, backward: bool) -> tuple[Inputs, list[torch.Tensor]]:
    """Inputs of a case, the same in every run, and what `exact` says of them."""
    torch.manual_seed(SEED)
    inputs = make_inputs(case, device, requires_grad=backward)
    return inputs, exact(case, inputs, backward)


def check(
    provider: str, case: AttentionCase, inputs: Inputs, backward: bool, right: list[torch.Tensor] | None = None
) -> None:
    """Raise WrongResult where the provider's result or gradients are wrong; right: the exact ones, where known.

    With dropout no two providers drop the same weights: then the check is made without, and beside it the mean of what
    weights are left, which must be 1, and their spread, which must not be 0.
    """
    function = build(provider, case.without_dropout())
    output = function(inputs)
    found = [output]
    if backward:
        with running(provider):
            found = list(torch.autograd.grad(output, inputs.differentiable(), inputs.grad_output))
    right = exact(case, inputs, backward) if right is None else right
    require_right(provider, take(case, inputs, found), right, backward)
    if case.dropout:
        rows = build(provider, case)(inputs._replace(value=torch.ones_like(inputs.value))).detach()[..., 0].float()
        if not (abs(rows.mean().item() - 1) < 1e-2 and rows.std().item() > 1e-3):
            raise WrongResult(f"{provider}: dropout leaves weights of mean {rows.mean():.4f}, spread {rows.std():.4f}")


def prepare(provider: str, case: AttentionCase, direction: Direction, device: torch.device) -> Job:
    """The calls of a provider whose result was found right: forward without gradients, as in inference, or
    `torch.autograd.grad` alone, on a graph that was made before and is kept; a learned bias gets its gradient too.

    Raises:
        Refused: a peer does not take the case. WrongResult: the provider is wrong.
    """
    backward, work = direction == "backward", case.work(direction)
    first, right = problem(case, device, backward)
    name = label(provider, case, first, direction)
    if provider == GENERAL and label("kernels", case, first, direction) not in ("kernels (short)", "kernels (hopper)"):
        raise Refused(f"{provider} runs the same as ours")
    attempt(provider, lambda: check(provider, case, first, backward, right))
    function = build(provider, case)
    others = (make_inputs(case, device, requires_grad=backward) for _ in range(input_sets(work.bytes, device) - 1))

    def call(x: Inputs) -> Call:
        if not backward:
            return lambda: function(x)
        output = function(x)

        def gradients() -> object:
            with running(provider):
                return torch.autograd.grad(output, x.differentiable(), x.grad_output, retain_graph=True)

        return gradients

    calls = [call(x) for x in (first, *others)]
    # PyTorch keeps a dropout seed that was drawn outside a graph where a backward pass inside one cannot read it.
    graph = not (backward and case.dropout)
    return Job(f"attention {direction} {case}", name, calls, work, graph)
