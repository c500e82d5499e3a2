"""Nobody reads what is not there, overwrites what is read or waits for ever: the protocols of the Hopper kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest

from tests.hopper_protocol import Deadlock, Group, Machine, Race, Work, backward, forward, run

ORDERS = 12
Program = Callable[[], tuple[Machine, list[Group]]]
FULL = [[Work(n)] for n in range(1, 10)]
FULL += [[Work(n), Work(m), Work(n)] for n, m in itertools.product((1, 2, 5), (1, 4))]
CUT = [
    [Work(n, frozenset(cut)), Work(m, frozenset({0})), Work(n, frozenset(cut))]
    for n, m in itertools.product(range(1, 10), (1, 2))
    for cut in ({0}, {0, 1}, {0, n - 1}, set(range(n)))
    if max(cut) < n
]
FORWARD: list[Program] = [partial(forward, works, consumers) for works in FULL + CUT for consumers in (2, 3)]
BOTH = (False, True)
BACKWARD: list[Program] = [partial(backward, *case) for case in itertools.product(range(10), BOTH, BOTH)]


@pytest.mark.parametrize("programs", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_no_order_breaks_a_rule(programs: list[Program]) -> None:
    for program, seed in itertools.product(programs, range(ORDERS)):
        run(*program(), seed)


def named_steps(programs: list[Program]) -> list[str]:
    return sorted({name for program in programs for group in program()[1] for name, _ in group if name})


@pytest.mark.parametrize(("direction", "step"), [
    *(("forward", step) for step in named_steps(FORWARD)), *(("backward", step) for step in named_steps(BACKWARD))
])  # fmt: skip
def test_each_wait_and_arrival_is_needed(direction: str, step: str) -> None:
    programs = FORWARD if direction == "forward" else BACKWARD
    with pytest.raises((Race, Deadlock)):
        for seed, program in itertools.product(range(20), reversed(programs)):
            run(*program(), seed, without=step)
