"""How far each attention is from the exact answer, at each dtype: the numbers of the second table."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch

from tests.conformance.judge import Attention, exact, make, solve
from tests.tolerances import FORWARD, GRADIENT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (2, 2, 2, 67, 71, 32, 32)
CASES = ("no mask", "causal", "float mask", "shared heads", "scores in the hundreds")
FLOOR = 0.25  # units in the last place by norm: where PyTorch is luckily nearer, it counts as this far


class Error(NamedTuple):
    """Distance from the exact answer by norm, in units in the last place: of the output, of the worst gradient."""

    forward: float
    gradient: float


def measure(attention: Attention, case: str, dtype: torch.dtype, device: str) -> Error | None:
    """The error of one case; None where the attention refuses it."""
    torch.manual_seed(CASES.index(case))
    mask = torch.randn(67, 71).masked_fill(torch.rand(67, 71) < 0.2, -math.inf).to(dtype)
    mask[:, 0] = 0.0
    call = make(
        (2, 4, 2, *SIZES[3:]) if case == "shared heads" else SIZES,
        dtype,
        device,
        is_causal=case == "causal",
        attn_mask=mask if case == "float mask" else None,
        scale=20.0 if case.startswith("scores") else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = solve(call, attention)
    except Exception:  # its reason stands in the first table
        return None
    eps = torch.finfo(dtype).eps
    far = {
        name: (torch.linalg.vector_norm(found[name].double() - x) / torch.linalg.vector_norm(x)).item() / eps
        for name, x in exact(call).items()
    }
    return Error(far.pop("output"), max(far.values()))


def ratios(ours: Error, torchs: Error) -> tuple[float, float]:
    """Our error over PyTorch's, forward and backward."""
    return ours.forward / max(torchs.forward, FLOOR), ours.gradient / max(torchs.gradient, FLOOR)


def cell(error: Error | None, torchs: Error | None, reference: bool) -> str:
    """PyTorch's errors as they are; those of others as multiples of them, with a ! past the tolerance."""
    if error is None or torchs is None:
        return "-"
    if reference:
        return f"{error.forward:.2f} / {error.gradient:.2f} ulp"
    pairs = zip(ratios(error, torchs), (FORWARD, GRADIENT))
    return " / ".join(f"{ratio:.2f}x" + ("!" if not ratio <= limit else "") for ratio, limit in pairs)
