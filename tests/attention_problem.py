"""One attention problem, solved three ways: exactly (no loop, float64), by PyTorch, and by whatever is under test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from tests.tolerances import FORWARD, GRADIENT, assert_as_exact_as_torch, size_of_terms


@dataclasses.dataclass
class Problem:
    """Inputs and upstream gradient of one call. Sizes are B, Hq, Hkv, L, S, E, Ev."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    kept: torch.Tensor | None = None  # (B, Hq, L, S) bool: weights that dropout keeps
    dropout_p: float = 0.0
    grad: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Draw the upstream gradient."""
        if self.grad is None:
            shape = (*self.query.shape[:-1], self.value.shape[-1])
            self.grad = torch.randn(shape, device=self.query.device).to(self.query.dtype)

    def inputs(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Query, key, value, and a float mask: leaves that require grad, in a dtype if given, strides kept."""
        tensors = [self.query, self.key, self.value]
        if self.attn_mask is not None and self.attn_mask.is_floating_point():
            tensors.append(self.attn_mask)
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def problem(
    sizes: tuple[int, int, int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    mask: Callable[[torch.Size], torch.Tensor] | None = None,
    **rest: object,
) -> Problem:
    """Random inputs; query, key and value are transposed views of (B, T, H, D), as a transformer has them."""
    b, hq, hkv, n_queries, n_keys, e, ev = sizes
    shapes = [(b, n_queries, hq, e), (b, n_keys, hkv, e), (b, n_keys, hkv, ev)]
    tensors = [torch.randn(shape).to(dtype).to(device).transpose(1, 2) for shape in shapes]
    attn_mask = mask(torch.Size((b, hq, n_queries, n_keys))).to(device) if mask else None
    return Problem(*tensors, attn_mask=attn_mask, **rest)


def allowed(p: Problem) -> torch.Tensor:
    """Which (query, key) pairs may attend, broadcastable to (B, Hq, L, S)."""
    n_queries, n_keys = p.query.shape[-2], p.key.shape[-2]
    ok = torch.ones(n_queries, n_keys, dtype=torch.bool, device=p.query.device)
    if p.is_causal:
        ok = ok.tril()
    if p.attn_mask is not None:
        ok = ok & (p.attn_mask if p.attn_mask.dtype == torch.bool else p.attn_mask != -math.inf)
    return ok


def no_loop(
    p: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: torch.Tensor, held: bool = False
) -> torch.Tensor:
    """The formula, written out. held: gradients are those with the sums of the softmax held fixed."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (p.scale if p.scale is not None else 1 / math.sqrt(query.shape[-1]))
    ok = allowed(p)
    if mask:
        scores = scores + mask[0].masked_fill(mask[0] == -math.inf, 0.0)
    scores = scores.masked_fill(~ok, -math.inf)
    top = scores.amax(-1, keepdim=True).detach() if scores.shape[-1] else scores.sum(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    total = total.detach() if held else total
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    if p.kept is not None:
        weights = weights * p.kept / (1 - p.dropout_p)
    return weights @ value


def torch_attention(
    p: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: torch.Tensor
) -> torch.Tensor:
    """PyTorch's own at the inputs' dtype. With dropout, which it draws otherwise, the formula at that dtype."""
    if p.kept is not None:
        return no_loop(p, query, key, value, *mask)
    attn_mask = mask[0] if mask else p.attn_mask
    is_causal = p.is_causal
    if attn_mask is not None and is_causal:
        ok = allowed(p)
        attn_mask = attn_mask.masked_fill(~ok, -math.inf) if mask else ok
        is_causal = False
    if attn_mask is not None:  # PyTorch wants two axes, and a float mask of its own dtype
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        attn_mask = attn_mask.to(query.dtype) if attn_mask.is_floating_point() else attn_mask
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=p.scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def check(p: Problem, attention: Callable[..., torch.Tensor]) -> None:
    """Hold output and every gradient of `attention(query, key, value, attn_mask, ...)` to the tolerance."""
    inputs = p.inputs()
    attn_mask = inputs[3] if len(inputs) == 4 else p.attn_mask
    gqa = p.query.shape[1] != p.key.shape[1]
    output = attention(*inputs[:3], attn_mask, p.dropout_p, p.is_causal, p.scale, gqa)
    ours = [output, *torch.autograd.grad(output, inputs, p.grad)]
    inputs = p.inputs()
    output = torch_attention(p, *inputs)
    theirs = [output, *torch.autograd.grad(output, inputs, p.grad)]
    inputs = p.inputs(torch.float64)
    if len(inputs) == 4:  # every entry by itself, to see how much cancels when they are summed
        inputs[3] = inputs[3].detach().expand(*p.query.shape[:-1], p.key.shape[-2]).clone().requires_grad_()
    output = no_loop(p, *inputs)
    whole = torch.autograd.grad(output, inputs, p.grad.double())
    fixed = torch.autograd.grad(no_loop(p, *inputs, held=True), inputs, p.grad.double())
    exact, magnitudes = [output, *whole], [None, *map(size_of_terms, whole, fixed, (x.dtype for x in ours[1:]))]
    if len(inputs) == 4:
        exact[4], magnitudes[4] = (x.sum_to_size(p.attn_mask.shape) for x in (exact[4], magnitudes[4]))
    names = ["output", "grad of query", "grad of key", "grad of value", "grad of attn_mask"]
    factors = [FORWARD] + [GRADIENT] * 4
    for a, b, c, factor, name, magnitude in zip(ours, theirs, exact, factors, names, magnitudes):
        assert_as_exact_as_torch(a, b, c, factor, name, magnitude)
