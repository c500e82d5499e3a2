"""How close is close enough: relative to the error PyTorch itself makes at the same dtype.

With `exact` computed in float64, `ours` may be at most `factor` times as far from it as `theirs` (PyTorch at the dtype
of `ours`) is: 2 for results, 3 for gradients, whose chain of roundings is longer. That holds for the Euclidean norm of
the error; its largest entry, a matter of luck among few numbers, may be twice as far again. So neither a small error
everywhere nor a large one somewhere passes.

Where PyTorch is luckily exact, its error counts as a quarter of a unit in the last place by norm, and as one unit for
the largest entry. The unit is relative to the result; for a sum whose terms cancel, to the sum of their sizes
(`magnitude`).
"""

import torch

FORWARD = 2.0
GRADIENT = 3.0


def error_ratios(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor | None = None
) -> tuple[float, float]:
    """Our error over PyTorch's (or over the floor): by Euclidean norm, and by largest entry."""
    exact, ours_error, theirs_error = exact.double(), ours.double() - exact, theirs.double() - exact
    if exact.numel() == 0:
        return 0.0, 0.0
    magnitude = exact if magnitude is None else magnitude.cpu()
    eps = torch.finfo(ours.dtype).eps
    ratios = []
    for measure, units in ((torch.linalg.vector_norm, 0.25), (lambda x: x.abs().max(), 1.0)):
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
    ours, theirs, exact = ours.detach().cpu(), theirs.detach().cpu(), exact.detach().cpu()
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, PyTorch's is {theirs.dtype}"
    nowhere = torch.isnan(exact)
    assert torch.equal(torch.isnan(ours), nowhere), f"{what}: NaN in {int(torch.isnan(ours).sum())} entries"
    ours, theirs, exact = (x.masked_fill(nowhere, 0.0) for x in (ours, theirs, exact))
    by_norm, by_entry = error_ratios(ours, theirs, exact, magnitude)
    assert by_norm <= factor and by_entry <= 2 * factor, (
        f"{what}: error {by_norm:.2f} x PyTorch's by norm (allowed {factor}), "
        f"{by_entry:.2f} x by largest entry (allowed {2 * factor})"
    )
