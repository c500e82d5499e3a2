"""How close is close enough: relative to the error PyTorch itself makes at the same dtype.

With `exact` computed in float64, `ours` may be at most `factor` times as far from it as `theirs` (PyTorch at the dtype
of `ours`) is: 2 for results, 3 for gradients, whose chain of roundings is longer. That holds for the Euclidean norm of
the error; its largest entry, a matter of luck among few numbers, may be twice as far again. So neither a small error
everywhere nor a large one somewhere passes.

PyTorch's rounding differs from processor to processor, and no verdict may rest on its luck:

- The norms of two random errors of n numbers differ by some 1 / sqrt(n) of themselves: `factor` grows by 2 / sqrt(n).
- Where PyTorch is luckily exact, its error counts as half a unit in the last place by norm in float32, in which every
  step rounds, as a quarter in 16 bits, in which few steps do, and as one unit for the largest entry.
- The unit is relative to the result; where larger numbers cancel, to their size (`magnitude`: of attention `magnitudes`
  in tests/conformance/judge.py, of the gradients of norms `size_of_terms`).
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch

FORWARD = 2.0
GRADIENT = 3.0
margins: dict[str, list[float]] = {}  # of each test, how far its errors were from what is allowed: allowed / found


def size_of_terms(whole: torch.Tensor, held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the rounding of a gradient that passes a softmax or a norm is at least relative to, in units of its dtype.

    Both divide by a statistic of the row. The gradient is what comes out with the statistic held fixed, less what the
    statistic's own change takes off: P dP - P delta for a score of weight P, delta the row's sum of P dP. With one key
    to attend to, or one column to normalise, the two are equal, and what is left is their rounding in float32.

    Args:
        whole: the exact gradient. held: the same with the statistic held fixed.
    """
    unit_of_float32 = min(torch.finfo(torch.float32).eps / torch.finfo(dtype).eps, 1.0)
    return torch.maximum(whole.abs(), (held.abs() + (held - whole).abs()) * unit_of_float32)


def error_ratios(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor
) -> tuple[float, float]:
    """Our error over PyTorch's (or over the floor): by Euclidean norm, and by largest entry."""
    exact, ours_error, theirs_error = exact.double(), ours.double() - exact, theirs.double() - exact
    if exact.numel() == 0:
        return 0.0, 0.0
    eps = torch.finfo(ours.dtype).eps
    by_norm = 0.5 if ours.dtype.itemsize > 2 else 0.25
    ratios = []
    for measure, units in ((torch.linalg.vector_norm, by_norm), (lambda x: x.abs().max(), 1.0)):
        floor = max(measure(magnitude).item() * eps * units, torch.finfo(ours.dtype).tiny)
        ratios.append(measure(ours_error).item() / max(measure(theirs_error).item(), floor))
    return ratios[0], ratios[1]


def assert_as_exact_as_torch(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    factor: float = FORWARD,
    what: str = "result",
    magnitude: torch.Tensor | None = None,
) -> None:
    """Fail unless `ours` is within the tolerance, and NaN exactly where `exact` is."""
    __tracebackhide__ = True  # in what pytest prints
    ours, theirs, exact = ours.detach().cpu(), theirs.detach().cpu(), exact.detach().cpu()
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, PyTorch's is {theirs.dtype}"
    nowhere = torch.isnan(exact)
    assert torch.equal(torch.isnan(ours), nowhere), f"{what}: NaN in {int(torch.isnan(ours).sum())} entries"
    magnitude = exact if magnitude is None else magnitude.detach().cpu()
    ours, theirs, exact, magnitude = (x.masked_fill(nowhere, 0.0) for x in (ours, theirs, exact, magnitude))
    by_norm, by_entry = error_ratios(ours, theirs, exact, magnitude)
    factor *= 1 + 2 / max(exact.numel(), 1) ** 0.5
    used, test = max(by_norm, by_entry / 2) / factor, os.environ.get("PYTEST_CURRENT_TEST", "").split(" (")[0]
    margins.setdefault(test, []).append(1 / used if used else math.inf)
    if by_norm > factor or by_entry > 2 * factor:
        worst = np.unravel_index(int((ours.double() - exact.double()).abs().argmax()), ours.shape)
        raise AssertionError(
            f"{what}: error {by_norm:.2f} x PyTorch's by norm (allowed {factor:.2f}), "
            f"{by_entry:.2f} x by largest entry (allowed {2 * factor:.2f}); "
            f"at {[int(i) for i in worst]} {ours[worst].item():.6g}, exactly {exact[worst].item():.6g}"
        )


class Comparison(NamedTuple):
    """One tensor and what it is held to, as `assert_as_exact_as_torch` takes it."""

    name: str
    ours: torch.Tensor
    theirs: torch.Tensor
    exact: torch.Tensor
    factor: float
    magnitude: torch.Tensor | None = None

    def judge(self, what: str = "") -> None:
        """Fail unless it is within the tolerance; what: the case, for the message."""
        __tracebackhide__ = True
        title = f"{what}: {self.name}" if what else self.name
        assert_as_exact_as_torch(self.ours, self.theirs, self.exact, self.factor, title, self.magnitude)
