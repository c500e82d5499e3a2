"""What the README promises of its first command: it trains in minutes what is right on all that people type.

Left out unless it is asked for, since it trains: pytest -m training tests/test_calculator.py.
"""

import time
from pathlib import Path

import pytest

import calcformer
from calcformer.cli import main

MINUTES = 6  # on two cores

pytestmark = [pytest.mark.training, pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")]


@pytest.mark.parametrize("split", [123_456, 1, 2])
def test_every_formula_of_one_or_two_digits_is_answered_right(split: int) -> None:
    started = time.monotonic()
    assert main(["train", "--out", "run", "--data-seed", str(split)]) == 0
    minutes = (time.monotonic() - started) / 60
    solver = calcformer.load(Path("run"))
    formulas = [f"{a}{sign}{b}" for a in range(-99, 100) for sign in "+-" for b in range(100)]
    corners = [f"{a}{sign}{b}" for a in (-1000, 0, 1000) for sign in "+-" for b in (0, 1000)]
    wrong = [str(answer) for answer in solver.answers(formulas + corners) if not answer.is_right]
    assert not wrong
    assert minutes < MINUTES
