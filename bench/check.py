"""A provider whose numbers are wrong is not timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Allowed ||found - exact|| / ||exact||, forward and backward. Operands of 8, 11 and 24 significant bits round to 2e-3,
# 2.4e-4 and 3e-8 of themselves; sums and the softmax between the products make some ten times of that.
BOUNDS = {
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (2e-3, 4e-3),
    torch.float32: (1e-5, 3e-5),
    torch.float64: (1e-12, 1e-12),
}


class WrongResult(AssertionError):
    """A provider's result is too far from the exact one."""


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """||found - exact|| / ||exact||, in float64."""
    exact = exact.double()
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


def require_right(
    provider: str, found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], backward: bool = False
) -> None:
    """Raise WrongResult unless every tensor is of the right shape and near the exact one; NaN is never near."""
    if len(found) != len(exact):
        raise WrongResult(f"{provider}: {len(found)} tensors, expected {len(exact)}")
    for place, (one, right) in enumerate(zip(found, exact)):
        if one.shape != right.shape:
            raise WrongResult(f"{provider}: tensor {place} is {tuple(one.shape)}, expected {tuple(right.shape)}")
        error, bound = relative_error(one, right), BOUNDS[one.dtype][backward]
        if not error <= bound:
            raise WrongResult(f"{provider}: tensor {place} is {error:.1e} from the exact one, allowed {bound:.0e}")
