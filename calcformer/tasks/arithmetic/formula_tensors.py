"""Formulas as tensors: how they are written in tokens, how many there are, and how to draw them by the million."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from calcformer.data.examples import Pairs, held_out_side
from calcformer.data.vocab import Vocabulary
from calcformer.errors import InputError
from calcformer.tasks.arithmetic.problems import Operands, as_problems

__all__ = ["FORMULA", "FormulaForm", "draw_operands", "generate_formulas"]

MOST_COUNTED = 1 << 17  # formulas of which it is counted how many a split leaves
MOST_DRAWN = 10**8  # formulas, to find those wanted of a split
CACHED_ROWS = 1 << 14  # drawn at once on a CPU, so that intermediate tensors stay in its cache
REPORT_SOURCE_LENGTH, REPORT_TARGET_LENGTH = 9, 6  # what `truncate` cuts to; the target begins with <bos>
FORMULA = Vocabulary(("+", "-", *"0123456789", "<bos>", "<eos>", "<pad>", "<unk>"), "<bos>", "<eos>", "<pad>")
PAD, EOS, BOS, MINUS, PLUS, ZERO = (FORMULA.id(token) for token in ("<pad>", "<eos>", "<bos>", "-", "+", "0"))


def write_digits(
    magnitude: torch.Tensor, width: int, zero_pad: bool = False, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers that are not negative, (N,) int64, as tokens from the left: (N, width), padded, and their counts (N,).

    Args:
        zero_pad: leading zeros up to `width` instead of padding behind.
        reverse: the last digit first.
    """
    powers = 10 ** torch.arange(width, device=magnitude.device)
    count = torch.full_like(magnitude, width) if zero_pad else 1 + (magnitude[:, None] >= powers[1:]).sum(dim=1)
    column = torch.arange(width, device=magnitude.device)
    # A digit stands for 10^exponent; places past the end have no exponent in 0..count-1.
    exponent = column.expand(len(magnitude), -1) if reverse else (count - 1)[:, None] - column
    digit = magnitude[:, None] // powers[exponent.clamp(min=0)] % 10 + ZERO
    return torch.where(column < count[:, None], digit, PAD), count


def write_numbers(
    values: torch.Tensor, digits: int, signed: bool, zero_pad: bool = False, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers as tokens: (N,) int64 to (N, digits + 1 where signed), padded, and their counts (N,).

    Negative ones begin with a minus sign; with `zero_pad` the others with a plus sign, if `signed`.
    """
    tokens, count = write_digits(values.abs(), digits, zero_pad, reverse)
    if not signed:
        return tokens, count
    negative = values < 0
    behind_sign = torch.cat((torch.where(negative, MINUS, PLUS)[:, None], tokens), dim=1)
    if zero_pad:
        return behind_sign, count + 1
    bare = torch.cat((tokens, torch.full_like(tokens[:, :1], PAD)), dim=1)
    return torch.where(negative[:, None], behind_sign, bare), count + negative


@dataclass(frozen=True)
class FormulaForm:
    """Which formulas there are, and how they are written.

    A formula of complexity c is a+b or a-b with a in -10^c..10^c (0..10^c where unsigned) and b in 0..10^c.

    Args:
        truncate: sources of at most 9 tokens and targets of at most 6, <bos> included, even where something is lost.
        zero_pad: every number has c + 1 digits, and a sign where one is possible.
        reverse_answer: the digits of the answer stand in reverse, behind its sign.
    """

    complexity: int = 3
    signed: bool = True
    truncate: bool = False
    zero_pad: bool = False
    reverse_answer: bool = False

    @property
    def limit(self) -> int:
        return 10**self.complexity

    @property
    def lowest(self) -> int:
        """The lowest first operand."""
        return -self.limit if self.signed else 0

    @property
    def size(self) -> int:
        """The number of distinct formulas."""
        return (self.limit - self.lowest + 1) * (self.limit + 1) * 2

    @property
    def source_length(self) -> int:
        """Tokens of the longest source: sign, digits, operator, digits, <eos>."""
        length = int(self.signed) + 2 * (self.complexity + 1) + 2
        return min(length, REPORT_SOURCE_LENGTH) if self.truncate else length

    @property
    def target_length(self) -> int:
        """Tokens of the longest target: <bos>, sign, digits, <eos>."""
        return min(self.complexity + 4, REPORT_TARGET_LENGTH) if self.truncate else self.complexity + 4

    def held_out(self, index: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
        """Which of the formulas numbered `index` (N,) a split of fresh ones holds out: (N,) bool, see `held_out_side`.

        Never the corners, whose operands are each 0 or as large as can be. Too little else shows what to say there:
        every X-1000 is negative but 1000-1000, only the answers to 1000+1000 and -1000-1000 begin with a 2, and 0-1000
        differs from 1000-1000 by one digit alone.
        """
        corners = [(a, b, plus) for a in {self.lowest, 0, self.limit} for b in (0, self.limit) for plus in (0, 1)]
        kept = self.index(*torch.tensor(corners, device=index.device).unbind(dim=1))
        return held_out_side(index, fraction, seed) & ~torch.isin(index, kept)

    def index(self, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
        """The number of each formula, (N,) int64 in 0..size-1; from complexity 10 on modulo 2^64."""
        return ((a - self.lowest) * (self.limit + 1) + b) * 2 + plus

    def operands(self, index: torch.Tensor) -> Operands:
        """The formulas with these numbers, (N,) int64, up to complexity 9."""
        return index // (2 * (self.limit + 1)) + self.lowest, index // 2 % (self.limit + 1), index % 2 == 1

    def encode(self, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> Pairs:
        """Write formulas as tokens, all at once.

        Args:
            a, b: (N,) int64, the operands.
            plus: (N,) bool, True = a+b, False = a-b.

        Returns:
            source (N, source_length) and target (N, target_length) int64 on the device of `a`.
        """
        rows, device, digits = a.shape[0], a.device, self.complexity + 1
        first, first_count = write_numbers(a, digits, self.signed, self.zero_pad)
        second, second_count = write_numbers(b, digits, False, self.zero_pad)
        # Operator, second number and <eos> as one block, moved to where the first number ends.
        tail = torch.full((rows, digits + 2), PAD, device=device)
        tail[:, 0] = torch.where(plus, PLUS, MINUS)
        tail[:, 1:-1] = second
        tail.scatter_(1, second_count[:, None] + 1, EOS)
        source = torch.full((rows, first.shape[1] + digits + 2), PAD, device=device)
        source[:, : first.shape[1]] = first
        source.scatter_(1, first_count[:, None] + torch.arange(digits + 2, device=device), tail)

        result = torch.where(plus, a + b, a - b)
        answer, answer_count = write_numbers(result, digits, True, self.zero_pad, self.reverse_answer)
        target = torch.full((rows, digits + 3), PAD, device=device)
        target[:, 0] = BOS
        target[:, 1:-1] = answer
        target.scatter_(1, answer_count[:, None] + 1, EOS)
        source, target = source[:, : self.source_length].contiguous(), target[:, : self.target_length].contiguous()
        return Pairs(source, target, problem=as_problems(a, b, plus))

    def read_answer(self, ids: list[int]) -> str:
        """An answer's tokens as the number they write; as they stand where they write none."""
        text = "".join(FORMULA.decode_until_eos(ids))
        match = re.fullmatch(r"([+-]?)([0-9]+)", text)
        if match is None or not (self.zero_pad or self.reverse_answer):
            return text
        sign, digits = match.groups()
        digits = digits[::-1] if self.reverse_answer else digits
        if self.zero_pad:
            sign, digits = sign.replace("+", ""), digits.lstrip("0") or "0"
        return sign + digits


def draw_operands(form: FormulaForm, count: int, generator: torch.Generator, sampling: str = "uniform") -> Operands:
    """Draw formulas on the generator's device, with replacement.

    Args:
        sampling: "uniform", all formulas alike; "digits", all lengths of each operand alike; "hard", a quarter of them
            so, a quarter with a run of places through which a carry, a borrow or an undecided comparison passes, half
            with a difference of any length, zeros within many of these; one operand in 32 a power of ten, and one
            formula in 512 a corner, see `FormulaForm.held_out`.
    """
    device, places = generator.device, form.complexity

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device, dtype=torch.float64)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    def of_any_length(longest: torch.Tensor) -> torch.Tensor:
        """0..10^k with k in 1..longest, all k alike."""
        length = (random(*longest.shape) * longest).long() + 1
        return (random(*longest.shape) * (10.0 ** length.double() + 1)).long()

    apart = integers(2, count).bool()  # the magnitudes are subtracted
    if sampling == "uniform" or places == 0:
        return integers(form.limit - form.lowest + 1, count) + form.lowest, integers(form.limit + 1, count), ~apart
    a, b = of_any_length(torch.full((2, count), places, device=device))
    if sampling == "hard":
        powers = 10 ** torch.arange(places + 1, device=device)
        a, b = torch.where(random(2, count) < 1 / 32, powers[integers(places + 1, 2, count)], torch.stack((a, b)))
        kind = random(count)
        near = kind < 0.5
        apart = apart | near
        place = torch.arange(places + 1, device=device)
        # In a quarter of the runs the run reaches the last place, in a quarter the first, in a sixteenth both.
        ends = integers(places + 1, 2, count)
        start = torch.where(random(count) < 0.25, 0, ends.amin(dim=0))
        stop = torch.where(random(count) < 0.25, places, ends.amax(dim=0))
        inside = (place >= start[:, None]) & (place < stop[:, None])
        # Digits that add up to 9 hand a carry on; equal ones hand a borrow on, and do not decide which is larger.
        digits = a[:, None] // powers % 10  # (N, places + 1), the last digit first
        passing = torch.where(apart[:, None], digits, 9 - digits)
        run = (torch.where(inside, passing, b[:, None] // powers % 10) * powers).sum(dim=1)
        # A difference no longer than the number. Zeros within it: has it ended there?
        difference = of_any_length((a[:, None] >= powers[1:]).sum(dim=1).clamp(max=places - 1) + 1)
        hollow = (torch.where(inside, 0, difference[:, None] // powers % 10) * powers).sum(dim=1)
        difference = torch.where((random(count) < 0.5) & (hollow > 0), hollow, difference)
        neighbour = torch.where(random(count) < 0.5, a + difference, (a - difference).abs())
        b = torch.where(near, neighbour, torch.where(kind < 0.75, run, b)).clamp(max=form.limit)
        corner = random(count) < 1 / 512
        a, b = torch.where(corner, form.limit * integers(2, 2, count), torch.stack((a, b)))
        apart = torch.where(corner, integers(2, count).bool(), apart)
    negative = random(count) < 0.5 if form.signed else torch.zeros_like(apart)
    return torch.where(negative, -a, a), b, apart == negative


def generate_formulas(
    form: FormulaForm,
    count: int,
    generator: torch.Generator,
    sampling: str = "uniform",
    held_out: bool | None = None,
    fraction: float = 0.1,
    seed: int = 0,
) -> Pairs:
    """Draw `count` formulas straight into tensors on the generator's device.

    Args:
        sampling: see `draw_operands`.
        held_out: None draws from all formulas, False only from those to train on, True only from those held out.
        fraction, seed: the share held out and which split it is (see `held_out_side`).
    """
    device = generator.device
    share = 1.0 if held_out is None else fraction if held_out else 1 - fraction
    if held_out is not None and form.size <= MOST_COUNTED:
        share = float((form.held_out(torch.arange(form.size), fraction, seed) == held_out).double().mean())
    if share <= 0 or count / share > MOST_DRAWN:
        raise InputError(
            f"held_out {fraction:g} of the {form.size:,} formulas of complexity {form.complexity} leaves "
            f"too few to {'hold out' if held_out else 'train on'}: {count:,} are not found in "
            f"{MOST_DRAWN:,} draws; change --held-out, or raise --complexity"
        )
    lengths = {"source": form.source_length, "target": form.target_length, "problem": 3}
    tensors = {name: torch.empty(count, columns, dtype=torch.long, device=device) for name, columns in lengths.items()}
    start = 0
    while start < count:
        missing = min(count - start, CACHED_ROWS) if device.type == "cpu" else count - start
        draws = missing if held_out is None else min(int(missing / share * 1.05) + 64, 16 * missing + 64)
        a, b, plus = draw_operands(form, draws, generator, sampling)
        if held_out is not None:
            chosen = form.held_out(form.index(a, b, plus), fraction, seed) == held_out
            a, b, plus = a[chosen], b[chosen], plus[chosen]
        part = form.encode(a[:missing], b[:missing], plus[:missing])
        for name, tensor in tensors.items():
            tensor[start : start + len(part)] = getattr(part, name)
        start += len(part)
    return Pairs(**tensors)
