"""Sums and differences of two whole numbers, however they are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calcformer.data.examples import Examples, Pairs
from calcformer.data.task import Task

__all__ = ["Arithmetic", "Operands", "as_problems"]

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a, b (N,) int64 and plus (N,) bool, True = a+b
Problem = tuple[int, int, bool]

DIGITS = tuple(map(str, range(1, 14)))


def as_problems(a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
    """Operands as `Examples` keep them, (N, 3) int64."""
    return torch.stack((a, b, plus.long()), dim=1)


class Arithmetic(Task):
    """A task whose problems are a, b, and True for a+b, False for a-b."""

    group_labels = {"digits": "digits of an operand: {}", "result": "{} result", "operation": "{}"}

    def operands(self, index: torch.Tensor) -> Operands:
        """The problems of these numbers."""
        raise NotImplementedError

    def write(self, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> Pairs:
        """Problems as tokens, with their answers: a, b (N,) int64, plus (N,) bool."""
        raise NotImplementedError

    def number_text(self, value: int) -> str:
        """A number as answers write it."""
        return str(value)

    def encode(self, index: torch.Tensor) -> Pairs:
        return self.write(*self.operands(index))

    def ask(self, problems: Sequence[Problem]) -> Pairs:
        a, b, plus = torch.tensor(problems).unbind(dim=1)
        return self.write(a, b, plus.bool())

    def right_answer(self, problem: Problem) -> str:
        a, b, plus = problem
        return self.number_text(a + b if plus else a - b)

    def questions(self, examples: Examples) -> list[str]:
        assert examples.problem is not None
        return [self.question((a, b, bool(plus))) for a, b, plus in examples.problem.tolist()]

    def groups(self, examples: Examples) -> dict[str, tuple[Sequence[str], torch.Tensor]]:
        """By the digits of the longer operand, the sign of the result, and the operation."""
        assert examples.problem is not None
        a, b, plus = examples.problem.unbind(dim=1)
        powers = 10 ** torch.arange(1, len(DIGITS), device=a.device)
        digits = torch.bucketize(torch.maximum(a.abs(), b.abs()), powers, right=True)
        sign = torch.where(plus.bool(), a + b, a - b).sign() + 1
        return {
            "digits": (DIGITS, digits),
            "result": (("negative", "zero", "positive"), sign),
            "operation": (("subtraction", "addition"), plus),
        }
