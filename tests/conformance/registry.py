"""The list of checks, and how one is run against one attention."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.conformance.judge import Attention

# The rows of the contract that a check belongs to, in the order of the table.
MATTERS = (
    "shapes",
    "strides",
    "dtypes",
    "mask",
    "rows with no allowed key",
    "NaN and Inf",
    "dropout",
    "determinism",
    "weights",
    "log-sum-exp",
    "alignment",
    "window",
    "softcap",
    "slopes",
    "sinks",
    "key lengths",
    "higher order",
    "graph",
    "memory",
    "bad input",
)
OURS = "contract"  # source of a check that no peer is known to have failed
EVERYWHERE, GPU, NOT_INTERPRETED = "everywhere", "gpu", "not interpreted"
TORCH_KEYWORDS = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}


class NotApplicable(Exception):
    """This check says nothing about this attention."""


class Check(NamedTuple):
    """One thing to get right.

    name: a sentence that is true of an attention that passes. matter: one of MATTERS. source: where a peer is known to
    have failed (owner/repository#number, several by commas), or OURS. needs: keyword arguments it uses that PyTorch's
    attention does not have. where: EVERYWHERE, GPU, or NOT_INTERPRETED (it would take Triton's interpreter minutes).
    """

    name: str
    matter: str
    source: str
    run: Callable[..., None]
    needs: tuple[str, ...] = ()
    where: str = EVERYWHERE


class Outcome(NamedTuple):
    """kind: "pass"; "FAIL", a wrong answer; "raises", an error instead of an answer; or "-", not applicable."""

    kind: str
    message: str = ""


CHECKS: list[Check] = []
SEED = 20_260_101


def check(
    name: str, matter: str, source: str = OURS, needs: tuple[str, ...] = (), where: str = EVERYWHERE
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter `run(attention, device, dtype)`, which raises AssertionError with a sentence, into the list."""
    assert matter in MATTERS, matter

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        assert name not in {c.name for c in CHECKS}, name
        CHECKS.append(Check(name, matter, source, run, needs, where))
        return run

    return enter


def keywords(attention: Attention) -> set[str]:
    """The keyword arguments an attention takes; of PyTorch's own, which is built in, those it documents."""
    while isinstance(attention, functools.partial):
        attention = attention.func
    try:
        return set(inspect.signature(attention).parameters)
    except ValueError:
        return TORCH_KEYWORDS


def run(
    one: Check, attention: Attention, device: str = "cpu", dtype: torch.dtype = torch.float32, interpreted: bool = False
) -> Outcome:
    """Run one check, always on the same random numbers. Warnings are no failure.

    Args:
        interpreted: whether `attention` runs in Triton's interpreter, which gets fewer random examples.
    """
    missing = [name for name in one.needs if name not in keywords(attention)]
    if missing:
        return Outcome("-", f"has no argument {' nor '.join(missing)}")
    if one.where == GPU and device == "cpu":
        return Outcome("-", "needs a GPU")
    if one.where == NOT_INTERPRETED and interpreted:
        return Outcome("-", "too many programs for the interpreter")
    few = {"examples": 6} if interpreted and "examples" in inspect.signature(one.run).parameters else {}
    torch.manual_seed(SEED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.run(attention, device, dtype, **few)
            if device == "cuda":
                torch.cuda.synchronize()
    except NotApplicable as reason:
        return Outcome("-", str(reason))
    except AssertionError as failure:
        return Outcome("FAIL", first_line(failure))
    except Exception as error:  # whatever a package raises is its answer to the call
        return Outcome("raises", f"{type(error).__name__}: {first_line(error)}")
    return Outcome("pass")


def first_line(error: BaseException) -> str:
    """The message of an error without what follows its first line."""
    return (str(error).strip().splitlines() or [""])[0]
