"""Memory: what is read and written beyond the tensors themselves, and what is stored."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from tests.conformance.judge import Attention, Call, agree, make, same_bits, solve
from tests.conformance.registry import NotApplicable, check

BAND = 4096  # numbers before and after each buffer: more than a tile that ends in the wrong place would reach
SENTINEL = 1234.5
SIZES = (1, 4, 2, 37, 53, 24, 19)


class Bands:
    """Hands out memory from inside larger buffers, and remembers them.

    A buffer's bands hold SENTINEL, which nobody may overwrite; its inside holds NaN, which everybody must.
    """

    def __init__(self) -> None:
        """No buffer yet."""
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def lend(self, like: torch.Tensor, fill: float | None) -> torch.Tensor:
        """A tensor with the shape, strides, dtype and device of `like`; `fill` None: it comes uninitialised."""
        if like.numel() == 0 or not like.is_floating_point() or not like.is_contiguous() and not dense(like):
            return like
        buffer = like.new_full((like.numel() + 2 * BAND,), SENTINEL)
        inside = buffer[BAND:-BAND].as_strided(like.shape, like.stride(), BAND)
        inside.fill_(math.nan if fill is None else fill)
        self.buffers.append((buffer, like.numel()))
        return inside

    def owns(self, x: torch.Tensor) -> bool:
        """Whether x lies in one of the buffers."""
        return any(x.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b, _ in self.buffers)

    def check(self) -> None:
        """Every band is as it was."""
        for buffer, size in self.buffers:
            for name, band in (("before", buffer[:BAND]), ("after", buffer[-BAND:])):
                touched = int((band != SENTINEL).sum())
                assert not touched, f"{touched} numbers {name} a buffer of {size} were overwritten"


def dense(x: torch.Tensor) -> bool:
    """Whether x fills its memory without gaps, in whatever order."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) == x.numel()


# Where Python code gets new memory from, and what it finds there.
ALLOCATORS: dict[tuple[object, str], float | None] = {
    (torch, "empty"): None,
    (torch, "empty_like"): None,
    (torch, "empty_strided"): None,
    (torch, "zeros"): 0.0,
    (torch, "zeros_like"): 0.0,
    (torch.Tensor, "new_empty"): None,
    (torch.Tensor, "new_empty_strided"): None,
    (torch.Tensor, "new_zeros"): 0.0,
}


@contextlib.contextmanager
def guarded() -> Iterator[Bands]:
    """While this lasts, memory that Python code asks PyTorch for lies between bands."""
    bands = Bands()

    def lending(real: Callable[..., torch.Tensor], fill: float | None) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: bands.lend(real(*args, **kwargs), fill)

    with contextlib.ExitStack() as stack:
        reals = {place: getattr(*place) for place in ALLOCATORS}
        for (owner, name), fill in ALLOCATORS.items():
            stack.enter_context(mock.patch.object(owner, name, lending(reals[owner, name], fill)))
        yield bands


CASES: dict[str, Callable[[torch.dtype, str], Call]] = {
    "plain": lambda dtype, device: make(SIZES, dtype, device),
    "causal": lambda dtype, device: make(SIZES, dtype, device, is_causal=True),
    "a mask that learns": lambda dtype, device: make(
        SIZES,
        dtype,
        device,
        attn_mask=torch.randn(1, 4, 37, 1).to(dtype),
        learned=("query", "key", "value", "attn_mask"),
    ),
    "a single query": lambda dtype, device: make((1, 2, 2, 1, 53, 8, 8), dtype, device),
}


@check("nothing is written outside output and gradients", "memory", "Dao-AILab/flash-attention#1830")
def check_bands_of_outputs(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for what, case in CASES.items():
        call = case(dtype, device)
        right = solve(call, attention)
        with guarded() as bands:
            found = solve(call, attention)
        if device == "cuda":
            torch.cuda.synchronize()
        outside = [name for name, x in found.items() if not bands.owns(x)]
        if outside:
            raise NotApplicable(f"{', '.join(outside)}: allocated where Python cannot reach")
        bands.check()
        same_bits(right, found, f"{what}, in memory full of NaN and in any memory")


def banded(x: torch.Tensor, fill: float) -> torch.Tensor:
    """x inside a larger buffer: rows and columns around its last two axes, and entries around its first, of `fill`."""
    wide = x.new_full([n + 2 for n in x.shape], fill)
    inside = wide[tuple(slice(1, -1) for _ in x.shape)]
    inside.copy_(x)
    return inside


@check(
    "nothing outside the inputs is read",
    "memory",
    "flagos-ai/FlagAttention#45, pytorch/pytorch#193728, Dao-AILab/flash-attention#1395",
)
def check_bands_of_inputs(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for what, case in CASES.items():
        call = case(dtype, device)
        names = ["query", "key", "value", "grad", *(["attn_mask"] if call.attn_mask is not None else [])]
        surrounded = call.replace(**{name: banded(getattr(call, name), math.nan) for name in names})
        right, found = solve(call, attention), solve(surrounded, attention)
        for name, x in found.items():
            assert not x.isnan().any(), f"{what}: NaN from outside reached the {name}"
            agree(x, right[name], f"{what}: {name}")


@check("inputs and the upstream gradient are left as they were", "memory")
def check_inputs_are_left_alone(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for what, case in CASES.items():
        call = case(dtype, device)
        names = ["query", "key", "value", "grad", *(["attn_mask"] if call.attn_mask is not None else [])]
        before = {name: getattr(call, name).clone() for name in names}
        solve(call, attention)
        same_bits(before, {name: getattr(call, name) for name in names}, what)


@check("no L x S matrix is kept for the backward", "memory")
def check_what_is_saved(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((1, 2, 2, 129, 131, 8, 8), dtype, device)
    sizes: list[int] = []

    def remember(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        call.run(attention)
    assert max(sizes, default=0) < 2 * 129 * 131, f"a tensor of {max(sizes)} numbers is kept"
