"""What may stand behind a flag: text to numbers, names and settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from calcformer.config import PRESETS, SECTIONS
from calcformer.errors import shown, tell

__all__ = ["Parser", "add_settings", "path", "whole"]

LONGEST = 600  # characters of an error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())
        if len(text) > LONGEST:  # what is wrong stands at its beginning, what to do at its end
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        tell(f"calcformer: error: {text}")
        raise SystemExit(2)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag that counts something."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text.strip()) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number, {low} to {high}, got {shown(text)}")
        return int(text)

    return read


def number(kind: type) -> Callable[[str], Any]:
    """The type of a setting that is a number; config.py knows its limits."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {shown(text)}") from None

    return read


def path(text: str) -> Path:
    """The type of a flag that names a file or folder; an empty one would be the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be the name of a file or folder, got {shown(text)}")
    return Path(text)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of every section of RunConfig; only those that are given reach the namespace."""
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section)
        hints = get_type_hints(kind)
        for item in fields(kind):
            hint = hints[item.name]
            options: dict[str, Any] = {"default": argparse.SUPPRESS}
            if hint is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif get_origin(hint) is Literal:
                options["choices"] = get_args(hint)
            else:
                options |= {"type": str if hint is str else number(hint), "metavar": hint.__name__.upper()}
            defaults = [getattr(getattr(preset, section), item.name) for preset in PRESETS.values()]
            default = " / ".join(map(str, defaults if len(set(defaults)) > 1 else defaults[:1]))
            group.add_argument(
                f"--{item.name.replace('_', '-')}", help=f"{item.metadata['help']} ({default})", **options
            )
