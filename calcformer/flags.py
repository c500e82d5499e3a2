"""What may stand behind a flag: text to numbers, names and settings."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from calcformer.config import RunConfig
from calcformer.errors import InputError, shown, tell
from calcformer.model.settings import MODELS
from calcformer.settings import kinds_of
from calcformer.tasks import TASKS

if TYPE_CHECKING:
    from calcformer.solver import Solver

__all__ = [
    "Commands",
    "Parser",
    "add_beam",
    "add_device",
    "add_length_penalty",
    "add_settings",
    "path",
    "real",
    "set_length_penalty",
    "span",
    "whole",
]

LONGEST = 600  # characters of an error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2.

    Flags are written whole, and words may stand behind flags as well as before.
    """

    _is_mixing = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse, which takes no word behind a flag where one before it could have been the last."""
        words = self._get_positional_actions()
        if self._is_mixing or not words or args is None or "--" in args or words[-1].nargs == argparse.PARSER:
            return super().parse_known_args(args, namespace)
        self._is_mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixing = False

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; leave it out (--help lists what there is), and put what is one text in quotes"
        text = " ".join(message.split())
        if len(text) > LONGEST:  # what is wrong stands at its beginning, what to do at its end
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        tell(f"calcformer: error: {text}")
        raise SystemExit(2)


Commands = argparse._SubParsersAction  # of Parser: where commands add their own


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag that counts something."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,30}", text.strip()) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number, {low} to {high}, got {shown(text.strip())}")
        return int(text)

    return read


def span(text: str) -> tuple[int, int]:
    """The type of a flag that is a number from 1, or two of them in order: the first and the last."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?", text.strip())
    first, last = map(int, (found[1], found[2] or found[1])) if found else (2, 1)
    if first > last:
        raise argparse.ArgumentTypeError(f"must be a number from 1, or two such as 3-6, got {shown(text.strip())}")
    return first, last


def real(low: float, high: float) -> Callable[[str], float]:
    """The type of a flag that is any number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # NaN lies nowhere
            raise argparse.ArgumentTypeError(f"must be a number, {low} to {high}, got {shown(text.strip())}")
        return value

    return read


def number(kind: type) -> Callable[[str], Any]:
    """The type of a setting that is a number; settings.py knows its limits."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {shown(text.strip())}") from None

    return read


def path(text: str) -> Path:
    """The type of a flag that names a file or folder; an empty one would be the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be the name of a file or folder, got {shown(text)}")
    return Path(text)


def add_beam(parser: Parser) -> None:
    parser.add_argument(
        "--beam",
        type=whole(1, 100),
        default=1,
        metavar="WIDTH",
        help="follow the WIDTH best beginnings of an answer instead of the best one (1)",
    )


def add_length_penalty(parser: Parser) -> None:
    parser.add_argument(
        "--length-penalty",
        type=real(0, 100),
        metavar="ALPHA",
        help="of a beam: answers of T tokens are compared by log p / ((5 + T) / 6)^ALPHA (translations 1, others 0)",
    )


def set_length_penalty(solver: Solver, beam: int, alpha: float | None) -> None:
    """Search with the penalty that was given, if any; InputError where nothing is searched."""
    if alpha is not None:
        if beam == 1:
            raise InputError("--length-penalty is for a beam; give --beam as well, or leave it out")
        solver.task.length_penalty = alpha


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def add_settings(parser: argparse.ArgumentParser, base: RunConfig) -> None:
    """A flag for every setting of the task and the kind of model of `base`; only those given reach the namespace.

    Those of other tasks and kinds are read too, and not shown: `RunConfig.with_settings` says whose they are.
    """
    known: set[str] = set()
    for section, settings in base.sections.items():
        group = parser.add_argument_group(section)
        if section == "model":
            kinds: dict[str, Any] = {"choices": tuple(base.data.models), "default": argparse.SUPPRESS}
            group.add_argument("--model", help=f"kind of model ({base.model.kind})", **kinds)
        for item in fields(settings):
            default = getattr(settings, item.name)
            add_flag(group, settings, item, f"{item.metadata['help']} ({'none' if default == '' else default})")
            known.add(item.name)
    for foreign in (*TASKS.values(), *MODELS.values()):
        for item in fields(foreign):
            if item.name not in known:
                add_flag(parser, foreign, item, argparse.SUPPRESS)
                known.add(item.name)


def add_flag(parser: argparse._ActionsContainer, settings: Any, item: Field[Any], help: str) -> None:
    """A flag for one field of a dataclass of settings."""
    kind = kinds_of(settings)[item.name]
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    else:
        options |= {"type": str if kind is str else number(kind), "metavar": kind.__name__.upper()}
    parser.add_argument(f"--{item.name.replace('_', '-')}", **options)
