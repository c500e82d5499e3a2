"""Formulas written in characters: 649+864 is 1513.

A formula of complexity c is a+b or a-b with a in -10^c..10^c (0..10^c where unsigned) and b in 0..10^c.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from calcformer.data.examples import Examples, held_out_side
from calcformer.data.vocab import FORMULA, Vocabulary
from calcformer.errors import InputError

__all__ = ["FormulaTask", "encode_formulas", "generate_formulas", "random_formula"]

MAX_COMPLEXITY = 8  # keeps a * b * 2 below 2^63, so that every formula has its own 64-bit key
CACHED_ROWS = 1 << 14  # drawn at once on a CPU, so that intermediate tensors stay in its cache
SEED_SOURCE_LENGTH, SEED_TARGET_LENGTH = 9, 6  # the lengths that `truncate` reproduces; the target begins with <bos>


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


def write_numbers(values: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Write integers as tokens from the left: (N,) int64 to tokens (N, width), padded, and their counts (N,)."""
    powers = 10 ** torch.arange(width + 1, device=values.device)
    negative = (values < 0).long()
    magnitude = values.abs()
    count = negative + 1
    for power in powers[1:]:
        count = count + (magnitude >= power)
    # The digit in column j stands for 10^(count - 1 - j); a negative exponent is a column past the end.
    exponent = (count - 1)[:, None] - torch.arange(width, device=values.device)  # (N, width)
    digit = magnitude[:, None] // powers[exponent.clamp(min=0)] % 10
    tokens = torch.where(exponent < 0, FORMULA.id("<pad>"), digit + FORMULA.id("0"))
    tokens[:, 0] = torch.where(values < 0, FORMULA.id("-"), tokens[:, 0])
    return tokens, count


def formula_lengths(complexity: int, signed: bool = True, truncate: bool = False) -> tuple[int, int]:
    """Tokens of the longest source and target: signs, digits, operator, <eos>, and <bos> before the target."""
    source, target = int(signed) + 2 * (complexity + 1) + 2, complexity + 4
    return (min(source, SEED_SOURCE_LENGTH), min(target, SEED_TARGET_LENGTH)) if truncate else (source, target)


def encode_formulas(a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor, complexity: int = 3, signed: bool = True,
                    truncate: bool = False) -> Examples:
    """Write formulas as tokens, all at once.

    Args:
        a, b: (N,) int64, the operands.
        plus: (N,) bool, True = a+b, False = a-b.
        complexity, signed: the range of the operands; they decide the lengths.
        truncate: cut sources to 9 and targets to 6 tokens, <bos> included, even where something is lost.

    Returns:
        source (N, 2c + 5) and target (N, c + 4) int64 on the device of `a`; 2c + 4 where unsigned.
    """
    pad, eos = FORMULA.id("<pad>"), FORMULA.id("<eos>")
    source_length, target_length = formula_lengths(complexity, signed)
    rows, device = a.shape[0], a.device
    first, first_count = write_numbers(a, complexity + 1 + int(signed))
    second, second_count = write_numbers(b, complexity + 1)
    # Operator, second number and <eos> as one block, moved to where the first number ends.
    tail = torch.full((rows, complexity + 3), pad, device=device)
    tail[:, 0] = torch.where(plus, FORMULA.id("+"), FORMULA.id("-"))
    tail[:, 1:-1] = second
    tail.scatter_(1, second_count[:, None] + 1, eos)
    source = torch.full((rows, source_length), pad, device=device)
    source[:, :first.shape[1]] = first
    source.scatter_(1, first_count[:, None] + torch.arange(complexity + 3, device=device), tail)

    answer, answer_count = write_numbers(torch.where(plus, a + b, a - b), complexity + 2)
    target = torch.full((rows, target_length), pad, device=device)
    target[:, 0] = FORMULA.id("<bos>")
    target[:, 1:-1] = answer
    target.scatter_(1, answer_count[:, None] + 1, eos)
    if truncate:
        source_length, target_length = formula_lengths(complexity, signed, truncate)
        return Examples(source[:, :source_length].contiguous(), target[:, :target_length].contiguous())
    return Examples(source, target)


def generate_formulas(count: int, generator: torch.Generator, complexity: int = 3, signed: bool = True,
                      held_out: bool | None = None, fraction: float = 0.1, seed: int = 0) -> Examples:
    """Draw `count` formulas straight into tensors on the generator's device.

    Args:
        held_out: None draws from all formulas, False only from those to train on, True only from those held out.
        fraction, seed: the share held out and which split it is (see `held_out_side`).
    """
    limit, device = 10**complexity, generator.device
    share = 1.0 if held_out is None else fraction if held_out else 1 - fraction
    if share <= 0:
        raise InputError(f"no formulas are left on this side: held_out={held_out} with fraction {fraction}")
    lengths = formula_lengths(complexity, signed)
    examples = Examples(*(torch.empty(count, length, dtype=torch.long, device=device) for length in lengths))
    start = 0
    while start < count:
        missing = min(count - start, CACHED_ROWS) if device.type == "cpu" else count - start
        draws = missing if held_out is None else int(missing / share * 1.05) + 64
        a = torch.randint(-limit if signed else 0, limit + 1, (draws,), generator=generator, device=device)
        b = torch.randint(0, limit + 1, (draws,), generator=generator, device=device)
        plus = torch.randint(0, 2, (draws,), generator=generator, device=device)
        if held_out is not None:
            key = ((a + limit) * (limit + 1) + b) * 2 + plus
            a, b, plus = torch.stack((a, b, plus))[:, held_out_side(key, fraction, seed) == held_out]
        part = encode_formulas(a[:missing], b[:missing], plus[:missing].bool(), complexity, signed)
        examples.source[start:start + len(part)] = part.source
        examples.target[start:start + len(part)] = part.target
        start += len(part)
    return examples


@dataclass(frozen=True)
class FormulaTask:
    """Formulas of one complexity, split as the formula report does, but disjoint.

    Training is the first `train_size` of the stream of `seed`; held out are the first `valid_size` of the stream of
    `seed + 1` that are not in training. `leaky_split` keeps those too; `truncate` cuts as the report did.
    """

    complexity: int = 3
    signed: bool = True
    truncate: bool = False
    train_size: int = 10_000
    valid_size: int = 5_000
    seed: int = 123_456
    leaky_split: bool = False

    @property
    def vocabulary(self) -> Vocabulary:
        return FORMULA

    @property
    def source_length(self) -> int:
        return formula_lengths(self.complexity, self.signed, self.truncate)[0]

    @property
    def target_length(self) -> int:
        return formula_lengths(self.complexity, self.signed, self.truncate)[1]

    def _stream(self, seed: int) -> Iterator[tuple[int, int, str]]:
        rng = random.Random(seed)
        while True:
            yield random_operands(rng, self.complexity, self.signed)

    def _encode(self, operands: list[tuple[int, int, str]]) -> Examples:
        columns = torch.tensor([(a, b, operator == "+") for a, b, operator in operands]).reshape(-1, 3)
        return encode_formulas(columns[:, 0], columns[:, 1], columns[:, 2].bool(), self.complexity, self.signed,
                               self.truncate)

    def split(self) -> tuple[Examples, Examples]:
        """Training and held-out examples; InputError where too few formulas are left to hold out."""
        limit = 10**self.complexity
        train = [drawn for drawn, _ in zip(self._stream(self.seed), range(self.train_size))]
        seen = set() if self.leaky_split else set(train)
        distinct = (2 * limit + 1 if self.signed else limit + 1) * (limit + 1) * 2
        if self.valid_size > distinct - len(seen):
            raise InputError(f"complexity {self.complexity} has {distinct} formulas, {len(seen)} of them in training: "
                             f"{self.valid_size} cannot be held out; ask for fewer or raise the complexity")
        valid: list[tuple[int, int, str]] = []
        stream = self._stream(self.seed + 1)
        while len(valid) < self.valid_size:
            drawn = next(stream)
            if drawn not in seen:
                valid.append(drawn)
        return self._encode(train), self._encode(valid)

    def encode_question(self, text: str) -> list[int]:
        """The ids of a typed formula; InputError where the model cannot know it."""
        formula = "".join(text.split())
        for place, character in enumerate(formula, start=1):
            if character not in "+-0123456789":
                raise InputError(f"formula {text.strip()!r}: {character!r} at place {place} is not a digit, + or -")
        match = re.fullmatch(r"(-?[0-9]+)([+-])([0-9]+)", formula)
        if match is None:
            raise InputError(f"formula {text.strip()!r} is not of the form NUMBER+NUMBER or NUMBER-NUMBER, "
                             "such as 649+864 or -940-819")
        limit = 10**self.complexity
        for number in match[1], match[3]:
            if len(number.lstrip("-").lstrip("0")) > self.complexity + 1 or abs(int(number)) > limit:
                raise InputError(f"formula {text.strip()!r}: {number} is longer than this run was trained for, numbers "
                                 f"up to {limit}; train with a larger --complexity")
        a, b = int(match[1]), int(match[3])
        if a < 0 and not self.signed:
            raise InputError(f"formula {text.strip()!r}: this run was trained without negative numbers; "
                             "train with --signed")
        ids = FORMULA.encode(f"{a}{match[2]}{b}") + [FORMULA.eos_id]
        return ids[:self.source_length]

    def decode_answer(self, ids: list[int]) -> str:
        return "".join(FORMULA.decode_until_eos(ids))
