"""Formulas written in characters: 649+864 is 1513."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from calcformer.data.examples import Examples, Pairs
from calcformer.errors import InputError, shown
from calcformer.tasks.arithmetic.formula_tensors import FORMULA, FormulaForm, generate_formulas
from calcformer.tasks.arithmetic.hard_problems import hard_problems
from calcformer.tasks.arithmetic.problems import Arithmetic, Operands

__all__ = ["FormulaTask", "random_formula"]


def random_operands(rng: random.Random, complexity: int = 3, signed: bool = True) -> tuple[int, int, str]:
    """Draw a, b and the operator, in this order and by these calls: they fix the stream a seed stands for."""
    limit = 10**complexity
    a = rng.randint(-limit if signed else 0, limit)
    b = rng.randint(0, limit)
    return a, b, rng.choice("-+")


def random_formula(rng: random.Random, complexity: int = 3, signed: bool = True) -> tuple[str, str]:
    """One formula and its result as text, such as ("649+864", "1513")."""
    a, b, operator = random_operands(rng, complexity, signed)
    return f"{a}{operator}{b}", str(a + b if operator == "+" else a - b)


@dataclass
class FormulaTask(Arithmetic):
    """Formulas of one form, split into those to train on and those held out.

    A fixed list is split as the formula report does, but disjoint: training is the first `train_size` of the stream of
    `seed`; held out are the first `valid_size` of the stream of `seed + 1` that are not in training. `leaky_split`
    keeps those too. Where `fresh`, each epoch draws its problems anew, from those that a hash does not hold out.

    Args:
        held_out: the share of all formulas that is held out, where `fresh`.
        sampling: how fresh formulas are drawn, see `draw_operands`; those held out are then drawn by "digits" too,
            unless it is "uniform".
    """

    form: FormulaForm = FormulaForm()
    train_size: int = 10_000
    valid_size: int = 5_000
    seed: int = 123_456
    leaky_split: bool = False
    fresh: bool = False
    held_out: float = 0.5
    sampling: str = "uniform"

    vocabulary = FORMULA
    size: int = field(init=False)

    def __post_init__(self) -> None:
        form = self.form
        self.source_length, self.target_length, self.size = form.source_length, form.target_length, form.size
        self.probes = ("123+123", "321+321") if form.complexity >= 3 else ()  # as the report asks

    def operands(self, index: torch.Tensor) -> Operands:
        return self.form.operands(index)

    def write(self, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> Pairs:
        return self.form.encode(a, b, plus)

    def hard_sets(self) -> dict[str, tuple[Examples, torch.Tensor]]:
        found: dict[str, tuple[Examples, torch.Tensor]] = {}
        for name, problems in hard_problems(self.form.complexity, self.form.signed).items():
            a, b, plus = torch.tensor(problems).unbind(dim=1)
            found[name] = self.ask(problems), self.trained_on(self.form.index(a, b, plus))
        return found

    def trained_on(self, index: torch.Tensor) -> torch.Tensor:
        if self.fresh:
            return ~self.form.held_out(index, self.held_out, self.seed)
        return torch.isin(index, self._train_index.to(index.device))

    @cached_property
    def _train_index(self) -> torch.Tensor:
        return self.form.index(*self._columns(self._train_operands()))

    def _stream(self, seed: int) -> Iterator[tuple[int, int, str]]:
        rng = random.Random(seed)
        while True:
            yield random_operands(rng, self.form.complexity, self.form.signed)

    def _train_operands(self) -> list[tuple[int, int, str]]:
        return [drawn for drawn, _ in zip(self._stream(self.seed), range(self.train_size))]

    def _columns(self, operands: list[tuple[int, int, str]]) -> Operands:
        columns = torch.tensor([(a, b, operator == "+") for a, b, operator in operands]).reshape(-1, 3)
        return columns[:, 0], columns[:, 1], columns[:, 2].bool()

    def draw(self, generator: torch.Generator) -> Pairs:
        """`train_size` fresh problems to train on, on the generator's device."""
        return generate_formulas(self.form, self.train_size, generator, self.sampling, False, self.held_out, self.seed)

    def split(self) -> tuple[Pairs, Pairs]:
        """Training and held-out examples; InputError where too few formulas are left to hold out."""
        if self.fresh:
            generator = torch.Generator().manual_seed(self.seed)
            sampling = "uniform" if self.sampling == "uniform" else "digits"
            return self.draw(generator), generate_formulas(
                self.form, self.valid_size, generator, sampling, True, self.held_out, self.seed
            )
        train = self._train_operands()
        seen = set() if self.leaky_split else set(train)
        if self.valid_size > self.size - len(seen):
            raise InputError(
                f"complexity {self.form.complexity} has {self.size} formulas, {len(seen)} of them in "
                f"training: {self.valid_size} cannot be held out; ask for fewer or raise the complexity"
            )
        valid: list[tuple[int, int, str]] = []
        stream = self._stream(self.seed + 1)
        while len(valid) < self.valid_size:
            drawn = next(stream)
            if drawn not in seen:
                valid.append(drawn)
        return self.form.encode(*self._columns(train)), self.form.encode(*self._columns(valid))

    def read_question(self, text: str) -> tuple[int, int, bool]:
        """A typed formula, such as "-940 - 819": a, b, and True for a+b; InputError where the model cannot know it."""
        formula = text.strip()
        for place, character in enumerate(formula, start=1):
            if character not in "+-0123456789" and not character.isspace():
                raise InputError(f"formula {shown(formula)}: {character!r} at place {place} is not a digit, + or -")
        match = re.fullmatch(r"(-?)\s*([0-9]+)\s*([+-])\s*([0-9]+)", formula)
        if match is None:
            raise InputError(
                f"formula {shown(formula)} is not of the form NUMBER+NUMBER or NUMBER-NUMBER, "
                "such as 649+864 or -940-819"
            )
        digits = [number.lstrip("0") or "0" for number in (match[2], match[4])]
        limit = self.form.limit
        for number in digits:
            if len(number) > self.form.complexity + 1 or int(number) > limit:
                raise InputError(
                    f"formula {shown(formula)}: {shown(number)} is more than {limit}, the largest number "
                    "this run was trained for; train with a larger --complexity"
                )
        a, b = (int(number) for number in digits)
        if match[1] and a > 0 and not self.form.signed:
            raise InputError(
                f"formula {shown(formula)}: this run was trained without negative numbers; train with --signed"
            )
        return -a if match[1] else a, b, match[3] == "+"

    def question(self, problem: tuple[int, int, bool]) -> str:
        a, b, plus = problem
        return f"{a}{'+' if plus else '-'}{b}"

    def decode_answer(self, ids: list[int]) -> str:
        return self.form.read_answer(ids)
