"""What a page worked by hand consists of: named steps with matrices, numbers worked out, and checks.

Shapes: H heads, L queries, S keys, E head size of queries and keys, Ev of values, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import kernels
import kernels.nn
from kernels import reference

__all__ = [
    "KEPT",
    "MORE",
    "Attended",
    "Check",
    "Matrix",
    "Normed",
    "Page",
    "Step",
    "allowed",
    "apart",
    "attend",
    "dot",
    "normalise",
    "number",
    "numbers",
    "products",
    "term",
]

KEPT, MORE = 3, "…"  # rows and columns before what is left out, and what stands for that
MOST_TERMS = 8  # of a sum that is written out
ALLOWED = {torch.float64: 1e-12, torch.float32: 2e-5}  # apart, of numbers up to 1; larger ones by their size


def number(value: float | torch.Tensor, digits: int = 2) -> str:
    """A number as every page writes it; digits -1 for the size of a difference. NaN is what there is none of."""
    value = float(value)
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    text = f"{value:.1e}" if digits < 0 and value else f"{value:.{max(digits, 0)}f}"
    return text.lstrip("-") if not text.strip("-0.") else text  # no -0.00


@dataclass(frozen=True)
class Matrix:
    """A matrix (M, N) with what stands at its rows and columns."""

    name: str
    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    digits: int = 2

    @classmethod
    def of(cls, name: str, values: torch.Tensor, rows: Sequence[str], columns: Sequence[str] = ()) -> Matrix:
        """Of a tensor; columns that are not named are numbered from 0. Where one digit is exact, one is shown."""
        digits = 1 if torch.equal(values, values.round(decimals=1)) else 2
        return cls(name, values.tolist(), rows, columns or numbers(values.shape[1]), digits)

    def cells(self) -> list[list[str]]:
        """The numbers as they are printed."""
        return [[number(value, self.digits) for value in row] for row in self.values]

    def cut(self, most_columns: int, most_rows: int) -> tuple[list[str], list[list[str]]]:
        """Column names, and rows that begin with theirs; of more than so many the first three, "…" and the last."""
        table = [["", *self.columns], *([name, *cells] for name, cells in zip(self.rows, self.cells()))]
        if len(self.columns) > most_columns:
            table = [[*row[: KEPT + 1], MORE, row[-1]] for row in table]
        if len(self.rows) > most_rows:
            table = [*table[: KEPT + 1], [MORE] * len(table[0]), table[-1]]
        return table[0][1:], table[1:]


def numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]


@dataclass(frozen=True)
class Check:
    """How far numbers lie from those of other functions, at most.

    Args:
        name: whose numbers.
        apart: the largest difference by the name of the function; NaN where it cannot say.
        allowed: what is still rounding.
    """

    name: str
    apart: dict[str, float]
    allowed: float

    @property
    def agrees(self) -> bool:
        return all(math.isnan(value) or value <= self.allowed for value in self.apart.values())

    def worst(self, other: Check) -> Check:
        """Both as one: the larger differences."""
        apart = {name: max(value, other.apart[name]) for name, value in self.apart.items()}
        return replace(self, apart=apart, allowed=max(self.allowed, other.allowed))


@dataclass(frozen=True)
class Step:
    """A step of the calculation.

    Args:
        title: what it is called.
        text: what is done, in a sentence or two.
        formula: the same as a formula.
        matrices: lines of matrices; those of a line stand side by side where there is room.
        examples: single numbers worked out, from numbers as they are printed.
        notes: what else there is to say, a line each.
    """

    title: str
    text: str
    formula: str = ""
    matrices: Sequence[Sequence[Matrix]] = ()
    examples: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A whole calculation.

    Args:
        title, intro, closing: what stands before the steps, and after them.
        steps: in order.
        checks: all of one kind, which `checked_by` describes.
        shown: which steps are, by their numbers from 1, the first and the last; None for all.
    """

    title: str
    intro: Sequence[str]
    steps: Sequence[Step]
    checks: Sequence[Check]
    checked_by: str
    closing: Sequence[str] = ()
    shown: tuple[int, int] | None = None

    @property
    def agrees(self) -> bool:
        return all(check.agrees for check in self.checks)


def term(value: float | torch.Tensor) -> str:
    """A number within a sum or product: a negative one in brackets."""
    return f"({number(value)})" if number(value).startswith("-") else number(value)


def products(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    """left (N,) by right (N,), and a bias, written out; of many products the first."""
    terms = [f"{term(a)}*{term(b)}" for a, b in zip(left, right)]
    if len(terms) > MOST_TERMS:
        terms = [*terms[:3], f"… ({len(terms)} products)"]
    return " + ".join(terms if bias is None else [*terms, term(bias)])


def dot(name: str, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    """A number of a product of matrices worked out; arguments as for `products`."""
    total = left @ right if bias is None else left @ right + bias
    return f"{name} = {products(left, right, bias)} = {number(total)}"


class Attended(NamedTuple):
    """scores (H, L, S), divided and masked; weights (H, L, S), whose rows sum to 1; output (H, L, Ev)."""

    scores: torch.Tensor
    scaled: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor
    check: Check


def apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs))


def allowed(x: torch.Tensor) -> float:
    return ALLOWED.get(x.dtype, 1e-2) * max(1.0, float(x.abs().max()))


def attend(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocked: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Attended:
    """Attention one step after the other, held to `kernels.reference` and the fused function.

    Args:
        query: (H, L, E); key: (H, S, E); value: (H, S, Ev).
        blocked: (L, S) bool, True where a query must not see a key: those after it. None for nothing.
        bias: (H, L, S), added to the divided scores; the functions of `kernels.reference` know none. Or None.
    """
    scores = query @ key.mT
    scaled = scores / math.sqrt(query.shape[-1])
    if bias is not None:
        scaled = scaled + bias
    if blocked is not None:
        scaled = scaled.masked_fill(blocked, -math.inf)
    weights = scaled.softmax(-1)
    output = weights @ value

    found = {"two loops": math.nan, "no loop": math.nan}
    if bias is None:
        loops = [two_loops(*head, blocked) for head in zip(query, key, value)]
        found["two loops"] = apart([output], [torch.stack(loops)])
        no_loop = reference.scaled_dot_product_no_loop_batch(query, key, value, blocked)
        found["no loop"] = apart([output, weights], no_loop)
    mask, is_causal = None if bias is None else bias[None], blocked is not None
    batch = query[None], key[None], value[None]
    fused = kernels.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=is_causal)
    told = kernels.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=is_causal, need_weights=True)
    assert told.weights is not None
    found["fused"] = apart([output, weights], [fused[0], told.weights[0]])
    return Attended(scores, scaled, weights, output, Check(name, found, allowed(value)))


def two_loops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocked: torch.Tensor | None
) -> torch.Tensor:
    """A head by two loops. They know no mask: what a query must not see is not shown to it."""
    if blocked is None:
        return reference.scaled_dot_product_two_loop_single(query, key, value)
    rows = [
        reference.scaled_dot_product_two_loop_single(query[i : i + 1], key[~hidden], value[~hidden])
        for i, hidden in enumerate(blocked)
    ]
    return torch.cat(rows)


class Normed(NamedTuple):
    """mean and variance (M, 1) of the rows; output (M, N)."""

    mean: torch.Tensor
    variance: torch.Tensor
    output: torch.Tensor
    check: Check


def normalise(name: str, x: torch.Tensor, norm: kernels.nn.LayerNorm) -> Normed:
    """Layer norm of x (M, N) one step after the other, held to `kernels.reference` and the fused function."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    output = (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    rest = norm.weight, norm.bias, norm.eps
    found = {
        "two loops": apart([output], [reference.layer_norm_two_loop(x, *rest)]),
        "no loop": apart([output], [reference.layer_norm_no_loop(x, *rest)]),
        "fused": apart([output], [kernels.layer_norm(x, (x.shape[-1],), *rest)]),
    }
    return Normed(mean, variance, output, Check(name, found, allowed(output)))
