"""`kernels.nn.MultiheadAttention` beside PyTorch's: every combination of its arguments, and where it means to differ."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import kernels.nn

B, H, L, S, E = 2, 3, 5, 7, 12
KINDS = {"self": (E, E), "key is value": (E, E), "cross": (E, E), "kdim, vdim": (11, 13)}
WEIGHTS = ({"need_weights": False}, {"need_weights": True}, {"need_weights": True, "average_attn_weights": False})
MASKS = (None, "bool 2-D", "bool 3-D", "float 2-D", "float 3-D")
PADDINGS = (None, "bool", "float")
EXACT = 1e-12  # of float64, relative to the largest number of a tensor; a wrong rule is off by 1e-3 and more


def both(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Ours, and PyTorch's with the same parameters, none of them 0."""
    options = {"embed_dim": E, "num_heads": H, "dtype": torch.float64, **options}
    ours = kernels.nn.MultiheadAttention(**options)
    theirs = nn.MultiheadAttention(**{name: x for name, x in options.items() if name not in ("window", "softcap")})
    for x in theirs.parameters():
        nn.init.normal_(x, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs_of(kind: str, batch_first: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value, of which some are the same tensor."""

    def rows(n: int, width: int) -> torch.Tensor:
        return torch.randn(*((B, n) if batch_first else (n, B)), width, dtype=dtype, requires_grad=True)

    if kind == "self":
        return [rows(S, E)] * 3
    if kind == "key is value":
        return [rows(L, E), *[rows(S, E)] * 2]
    return [rows(n, width) for n, width in zip((L, S, S), (E, *KINDS[kind]))]


def mask_of(kind: str | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
    """A mask that leaves each row its first key, the float ones with a few -inf."""
    if kind is None:
        return None
    forbidden = torch.rand(shape) < 0.4
    forbidden[..., 0] = False
    if "bool" in kind:
        return forbidden
    return torch.randn(shape, dtype=dtype).masked_fill(forbidden, -math.inf).requires_grad_()


def results(module: nn.Module, inputs: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Output, weights, and the gradients of parameters, inputs and masks, under random gradients of both results."""
    output, weights = module(*inputs, **options)
    found = {"output": output} | ({} if weights is None else {"weights": weights})
    leaves = dict(module.named_parameters())
    leaves |= {name: x for name, x in zip(("query", "key", "value"), inputs)}
    leaves |= {name: x for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), upstream, allow_unused=True)
    return found | {f"gradient of {name}": x for name, x in zip(leaves, grads) if x is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    """The same tensors, by name, shape and dtype, within a tolerance relative to the largest number."""
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        x = ours[name]
        assert (x.shape, x.dtype) == (exact.shape, exact.dtype), name
        error = (x - exact).abs().max().item() / max(exact.abs().max().item(), 1e-3)
        assert error <= tolerance, f"{name}: off by {error:.2g} of its largest number"


def cases(kind: str, **options: Any) -> Any:
    """Each combination of batch_first, weights, mask and padding: both modules, the inputs, the options of the call."""
    kdim, vdim = KINDS[kind]
    for batch_first in (False, True):
        ours, theirs = both(kdim=kdim, vdim=vdim, batch_first=batch_first, **options)
        for weights, mask, padding in itertools.product(WEIGHTS, MASKS, PADDINGS):
            inputs = inputs_of(kind, batch_first)
            n_queries = inputs[0].shape[int(batch_first)]
            asked = {
                "attn_mask": mask_of(mask, (n_queries, S) if mask and "2-D" in mask else (B * H, n_queries, S)),
                "key_padding_mask": mask_of(padding, (B, S)),
                **weights,
            }
            yield ours, theirs, inputs, asked


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_is_as_pytorch_has_it(kind: str, bias: bool, add_bias_kv: bool, add_zero_attn: bool) -> None:
    """90 of the 2,880 cases each."""
    for ours, theirs, *call in cases(kind, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn):
        assert_same(results(ours, call[0], **call[1]), results(theirs, call[0], **call[1]))
