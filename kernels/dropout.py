"""Dropout that is cheap on a CPU: there most of its time goes into random numbers, so few are drawn."""

import math

import torch

from kernels.subclasses import is_traced

# Above this probability 8 random bits for every element are drawn faster than the places of dropped elements.
SPARSE_LIMIT = 0.25
LEVELS = 1 << 8
LEAST = 4096  # elements, below which a number for each is as cheap


def dropped_places(count: int, p: float) -> torch.Tensor:
    """Which of `count` elements are dropped, each with probability p by itself: int64 places on the CPU, some twice.

    Throw a Poisson number of balls, -log(1 - p) an element on average, each at any element: then each element's number
    of balls is Poisson distributed by itself (Kingman 1993, "Poisson Processes", section 1.2), and 0 with probability
    1 - p. That takes about count * p random numbers.
    """
    balls = torch.poisson(torch.full((), -count * math.log1p(-p), dtype=torch.float64, device="cpu"))
    return torch.randint(count, (int(balls),), dtype=torch.int64, device="cpu")


def keep_factors(shape: tuple[int, ...], p: float) -> torch.Tensor:
    """A float32 tensor of `shape` on the CPU: 0 with probability p, else 1 / (1 - p)."""
    if p >= 1.0:
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    count, scale = math.prod(shape), 1.0 / (1.0 - p)
    if p > SPARSE_LIMIT:  # 8 bits are below a threshold; what that lacks of p is dropped by places
        below = math.floor(p * LEVELS)
        bits = torch.empty((count + 7) // 8, dtype=torch.int64, device="cpu").random_(-(2**63), None)
        # Compared as floats: PyTorch makes those of integers in a fifth of the time that it makes them of bools.
        factors = bits.view(torch.int8)[:count].float().ge_(below - LEVELS // 2).mul_(scale)
        p = 1.0 - (1.0 - p) / (1.0 - below / LEVELS)
    else:
        factors = torch.full((count,), scale, dtype=torch.float32, device="cpu")
    if count and p > 0.0:
        factors.index_fill_(0, dropped_places(count, p), 0.0)
    return factors.view(shape)


def _draws_factors(x: torch.Tensor, p: float) -> bool:
    return p > 0.0 and x.is_cpu and x.dtype == torch.float32 and not is_traced(x) and x.numel() >= LEAST


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """x of any shape, each element dropped with probability p, the others divided by 1 - p."""
    return x * keep_factors(x.shape, p) if _draws_factors(x, p) else torch.nn.functional.dropout(x, p)


def add_dropped(x: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    """residual + dropout(x, p), both of one shape, in one pass where the factors are at hand; rounded once."""
    if p == 0.0:
        return residual + x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual.dtype == wide.dtype and _draws_factors(wide, p):
        return torch.addcmul(residual, wide, keep_factors(wide.shape, p))
    return (residual + dropout(wide, p)).to(torch.promote_types(x.dtype, residual.dtype))
