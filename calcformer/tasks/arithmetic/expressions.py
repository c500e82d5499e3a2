"""Expressions written in words: NEGATIVE 30 subtract NEGATIVE 34 is POSITIVE 04.

a and b run over -49..49, the operator is add or subtract: 19,602 distinct expressions. Numbers always have two
digits, each digit is a token, and zero is POSITIVE.
"""

from dataclasses import dataclass

import torch

from calcformer.data.examples import Pairs, held_out_side
from calcformer.data.vocab import Vocabulary
from calcformer.errors import InputError, shown
from calcformer.tasks.arithmetic.problems import Arithmetic, Operands, as_problems

__all__ = [
    "EXPRESSION",
    "EXPRESSIONS",
    "ExpressionTask",
    "encode_expressions",
    "expression_text",
    "generate_expressions",
]

EXPRESSION = Vocabulary((*"0123456789", "POSITIVE", "NEGATIVE", "add", "subtract", "BOS", "EOS"), "BOS", "EOS")
LIMIT = 49
OPERATORS = ("add", "subtract")
VALUES = 2 * LIMIT + 1
EXPRESSIONS = VALUES * VALUES * len(OPERATORS)
SOURCE_LENGTH, TARGET_LENGTH = 9, 5
LEAKY_TRAIN_SHARE = 0.8  # the report does not give the shares of its random split


def operands(index: torch.Tensor) -> Operands:
    """The expressions numbered `index` (N,) in 0..19601: a, b (N,) int64 and add (N,) bool."""
    return index // (2 * VALUES) - LIMIT, index // 2 % VALUES - LIMIT, index % 2 == 0


def write_numbers(values: torch.Tensor) -> torch.Tensor:
    """(N,) int64 in -99..99 to sign and two digits, (N, 3)."""
    sign = torch.where(values < 0, EXPRESSION.id("NEGATIVE"), EXPRESSION.id("POSITIVE"))
    return torch.stack((sign, values.abs() // 10, values.abs() % 10), dim=1)  # the id of a digit is the digit


def encode_expressions(index: torch.Tensor) -> Pairs:
    """Write the expressions numbered `index` (N,) in 0..19601 as tokens: source (N, 9), target (N, 5) int64."""
    a, b, add = operands(index)
    begin = torch.full((len(index), 1), EXPRESSION.bos_id, device=index.device)
    end = torch.full_like(begin, EXPRESSION.eos_id)
    operator = torch.where(add, EXPRESSION.id("add"), EXPRESSION.id("subtract"))[:, None]
    source = torch.cat((begin, write_numbers(a), operator, write_numbers(b), end), dim=1)
    target = torch.cat((begin, write_numbers(torch.where(add, a + b, a - b)), end), dim=1)
    return Pairs(source, target, problem=as_problems(a, b, add))


def number_text(value: int) -> str:
    return f"{'NEGATIVE' if value < 0 else 'POSITIVE'} {abs(value):02d}"


def expression_text(a: int, b: int, operator: str) -> tuple[str, str]:
    """An expression and its result as text, such as ("BOS NEGATIVE 30 subtract ... EOS", "BOS POSITIVE 04 EOS")."""
    result = a + b if operator == "add" else a - b
    return f"BOS {number_text(a)} {operator} {number_text(b)} EOS", f"BOS {number_text(result)} EOS"


def tokenize(text: str) -> list[str]:
    """Split at spaces, and numbers into digits."""
    return [token for word in text.split() for token in (word if word.isdigit() else [word])]


def generate_expressions(
    count: int, generator: torch.Generator, held_out: bool | None = None, fraction: float = 0.1, seed: int = 0
) -> Pairs:
    """Draw `count` expressions with replacement straight into tensors on the generator's device.

    Args:
        held_out: None draws from all expressions, False only from those to train on, True only from those held out.
        fraction, seed: the share held out and which split it is (see `held_out_side`).
    """
    every = torch.arange(EXPRESSIONS, device=generator.device)
    if held_out is not None:
        every = every[held_out_side(every, fraction, seed) == held_out]
    if count > 0 and len(every) == 0:
        raise InputError(f"no expressions are left on this side: held_out={held_out} with fraction {fraction}")
    table = encode_expressions(every)
    return table.select(torch.randint(0, max(len(every), 1), (count,), generator=generator, device=generator.device))


@dataclass(frozen=True)
class ExpressionTask(Arithmetic):
    """Expressions, split at random into disjoint sets of distinct expressions.

    `leaky_split` instead draws `train_size + valid_size` expressions with replacement and splits that list 80 to 20
    at random, as the report did: what is drawn twice can then stand on both sides. Where `fresh`, each epoch draws
    `train_size` expressions anew, from those that a hash does not hold out, a share of 1 - `held_out`.
    """

    train_size: int = 4_602
    valid_size: int = 15_000
    seed: int = 0
    leaky_split: bool = False
    fresh: bool = False
    held_out: float = 0.5

    vocabulary = EXPRESSION
    source_length, target_length = SOURCE_LENGTH, TARGET_LENGTH
    size = EXPRESSIONS

    def operands(self, index: torch.Tensor) -> Operands:
        return operands(index)

    def write(self, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> Pairs:
        return encode_expressions(((a + LIMIT) * VALUES + b + LIMIT) * 2 + ~plus)

    def trained_on(self, index: torch.Tensor) -> torch.Tensor:
        if self.fresh:
            return ~held_out_side(index, self.held_out, self.seed)
        return torch.isin(index, self._split_index()[0].to(index.device))

    def draw(self, generator: torch.Generator) -> Pairs:
        """`train_size` fresh problems to train on, on the generator's device."""
        return generate_expressions(self.train_size, generator, False, self.held_out, self.seed)

    def _split_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the training and the held-out expressions."""
        total = self.train_size + self.valid_size
        generator = torch.Generator().manual_seed(self.seed)
        if self.leaky_split:
            drawn = torch.randint(0, EXPRESSIONS, (total,), generator=generator)
            train, valid = drawn.split((int(total * LEAKY_TRAIN_SHARE), total - int(total * LEAKY_TRAIN_SHARE)))
            return train, valid
        if total > EXPRESSIONS:
            raise InputError(
                f"there are {EXPRESSIONS} expressions: {self.train_size} for training and "
                f"{self.valid_size} held out are {total - EXPRESSIONS} too many"
            )
        order = torch.randperm(EXPRESSIONS, generator=generator)
        return order[: self.train_size], order[self.train_size : total]

    def split(self) -> tuple[Pairs, Pairs]:
        """Training and held-out examples; InputError where more is asked for than there are expressions."""
        if self.fresh:
            generator = torch.Generator().manual_seed(self.seed)
            train = self.draw(generator)
            return train, generate_expressions(self.valid_size, generator, True, self.held_out, self.seed)
        chosen, held_out = self._split_index()
        return encode_expressions(chosen), encode_expressions(held_out)

    def read_question(self, text: str) -> tuple[int, int, bool]:
        """A typed expression, with or without BOS and EOS: a, b, and True for an addition.

        Raises:
            InputError: it is not one.
        """
        tokens, expression = tokenize(text), f"expression {shown(text.strip())}"
        for token in tokens:
            if token not in EXPRESSION.tokens:
                raise InputError(
                    f"{expression}: {shown(token)} is not a word this run knows; the words are "
                    "POSITIVE NEGATIVE add subtract BOS EOS and numbers of two digits"
                )
        inner = tokens[tokens[:1] == ["BOS"] : len(tokens) - (tokens[-1:] == ["EOS"])]
        signs, digits = ("POSITIVE", "NEGATIVE"), "0123456789"
        form = (signs, digits, digits, OPERATORS, signs, digits, digits)
        if len(inner) != len(form) or any(token not in allowed for token, allowed in zip(inner, form)):
            raise InputError(
                f"{expression} is not of the form SIGN NUMBER OPERATOR SIGN NUMBER with "
                "two digits a number, such as NEGATIVE 30 subtract NEGATIVE 34"
            )
        numbers = []
        for sign, tens, ones in (inner[:3], inner[4:]):
            if int(tens + ones) > LIMIT:
                raise InputError(
                    f"{expression}: {tens + ones} is larger than this run was trained for, numbers up to {LIMIT}"
                )
            if sign == "NEGATIVE" and tens + ones == "00":
                raise InputError(f"{expression}: zero is written POSITIVE 00")
            numbers.append(int(tens + ones) * (-1 if sign == "NEGATIVE" else 1))
        return numbers[0], numbers[1], inner[3] == "add"

    def question(self, problem: tuple[int, int, bool]) -> str:
        a, b, plus = problem
        return expression_text(a, b, "add" if plus else "subtract")[0].removeprefix("BOS ").removesuffix(" EOS")

    def number_text(self, value: int) -> str:
        return number_text(value)

    def text(self, tokens: list[str]) -> str:
        return " ".join(tokens[:1] + ["".join(tokens[1:])]) if tokens else ""
