"""Formulas that are known to be hard, by name: the few among millions where random samples seldom look."""

__all__ = ["hard_problems"]

Problem = tuple[int, int, bool]  # a, b, and True for a+b, False for a-b


def telling_numbers(complexity: int) -> list[int]:
    """0, and of each length one and zeros, all nines, all fives, and digits counting up: 100, 999, 555, 123."""
    numbers = {0, 10**complexity}
    for length in range(1, complexity + 1):
        ones = 10**length // 9
        counting = int("".join(str(place % 10) for place in range(1, length + 1)))
        numbers |= {10 ** (length - 1), 9 * ones, 5 * ones, counting}
    return sorted(numbers)


def hard_problems(complexity: int, signed: bool) -> dict[str, list[Problem]]:
    """Formulas by what is hard about them.

    Args:
        complexity: operands reach 10 to this power.
        signed: whether the first operand may be negative.

    Returns:
        For each name its formulas, without repetition; names without any are left out:
        carry chain: a carry passes through every place, 999+1 or -999-1;
        borrow chain: a borrow does, 1000-1, 1-1000 or -1000+1;
        equal operands: 555+555 or -555-555;
        zero: 555-555; zero from a negative: -5+5, whose answer has no sign;
        one apart: the last digit decides the sign, 123-124 or -124+123;
        unequal lengths: one operand has one digit, the other as many as there are, or one less;
        extremes: 0, 1 and the largest operands with each other.
    """
    limit, numbers = 10**complexity, telling_numbers(complexity)
    steps = [(10**length, digit) for length in range(1, complexity + 1) for digit in range(1, 10)]
    long = [number for number in numbers if number >= max(10, limit // 10)]
    pairs = [pair for one in long for other in (1, 5, 9) for pair in ((one, other), (other, one))]
    edges = {0, 1, limit - 1, limit}
    found = {
        "carry chain": [
            formula
            for power, digit in steps
            for a, b in ((power - 1, digit), (digit, power - 1))
            for formula in ((a, b, True), (-a, b, False))
        ],
        "borrow chain": [
            formula
            for power, digit in steps
            for a, b in ((power, digit), (digit, power))
            for formula in ((a, b, False), (-a, b, True))
        ],
        "equal operands": [formula for a in numbers for formula in ((a, a, True), (-a, a, False))],
        "zero": [(a, a, False) for a in numbers],
        "zero from a negative": [(-a, a, True) for a in numbers if a],
        "one apart": [
            formula
            for one in numbers
            for a, b in ((one, one + 1), (one + 1, one))
            for formula in ((a, b, False), (-a, b, True))
        ],
        "unequal lengths": [(sign * a, b, plus) for a, b in pairs for sign in (1, -1) for plus in (True, False)],
        "extremes": [
            (sign * a, b, plus)
            for a in sorted(edges)
            for b in sorted(edges)
            for sign in (1, -1)
            for plus in (True, False)
        ],
    }
    lowest = -limit if signed else 0
    allowed = {
        name: [(a, b, plus) for a, b, plus in dict.fromkeys(formulas) if lowest <= a <= limit and b <= limit]
        for name, formulas in found.items()
    }
    return {name: formulas for name, formulas in allowed.items() if formulas}
