"""The command `calcformer`: from text to a configuration, and from results to text."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from calcformer import __version__
from calcformer.commands import COMMANDS
from calcformer.commands.train import choose
from calcformer.config import DEFAULT, PRESETS, RunConfig
from calcformer.errors import STANDARD_OUTPUT, InputError, tell
from calcformer.flags import Parser
from calcformer.interrupt import handle_signals

__all__ = ["main"]


def build_parser(base: RunConfig) -> Parser:
    """The parser of all commands; train and sweep have the flags of the task and the kind of model of `base`."""
    parser = Parser(prog="calcformer", description="Train a transformer, measure it, and ask it.")
    parser.add_argument("--version", action="version", version=f"calcformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands, base)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where `explain` finds numbers that disagree, 2 for wrong input,
    130 for Ctrl-C or SIGTERM, 141 where what it printed found no reader.
    """
    open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    asks = words[:1] in (["solve"], ["attention"], ["explain"], ["generate"], ["translate"])
    if asks:
        # What is asked may begin with a minus sign; a space before it tells argparse that it is not a flag.
        words = [f" {word}" if re.match(r"-+[^-\w]|-+\d", word) else word for word in words]
    parser = Parser(prog="calcformer")
    try:
        with handle_signals(signal.default_int_handler, signal.SIGTERM):
            base = PRESETS[DEFAULT]
            if words[:1] in (["train"], ["sweep"]):
                base, words = choose(words)
            arguments = build_parser(base).parse_args(words)
            for name, value in vars(arguments).items() if asks else ():
                setattr(arguments, name, without_space(value))
            return vars(arguments).pop("work")(arguments)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        if error.filename == STANDARD_OUTPUT:  # what is still in its buffer would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # as `calcformer solve ... | head` does; nobody is left to be told
            return 141
        parser.error(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    except KeyboardInterrupt:
        tell("calcformer: stopped")
        return 130


def without_space(value: Any) -> Any:
    """A word, or each of a list, without the space before its minus sign."""
    if isinstance(value, list):
        return [without_space(word) for word in value]
    return value[1:] if isinstance(value, str) and value.startswith(" -") else value


def open_standard_streams() -> None:
    """Open what a shell closed, as by 2>&-: the next file opened would take its place, and what is printed go there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Takes the lowest descriptor that is free. What is printed to standard output was wanted: it fails there.
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # of a file's name not all can be written in every encoding
            stream.reconfigure(errors="backslashreplace")
