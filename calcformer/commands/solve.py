"""`calcformer solve`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from calcformer.config import DEFAULT, PRESETS, RunConfig
from calcformer.errors import InputError, say, tell
from calcformer.flags import Commands, add_beam, add_device, path
from calcformer.tasks import TASKS

if TYPE_CHECKING:
    from calcformer.solver import Solver

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "solve",
        help="answer problems",
        description=(
            "Answer problems, say how probable the answers are, and whether they are right. Without any problem they "
            "come from standard input, one a line; on a terminal they are asked for. Where one cannot be read none is "
            "answered."
        ),
    )
    parser.add_argument(
        "questions",
        nargs="*",
        metavar="PROBLEM",
        help=f"such as {', or '.join(task.example for task in TASKS.values() if task.example)}",
    )
    parser.add_argument(
        "--input", type=path, metavar="FILE", help="a file of problems, one a line, - for standard input"
    )
    parser.add_argument(
        "--run",
        type=path,
        metavar="RUN",
        help="run folder (of those in runs/ that know such problems the newest finished one)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_beam(parser)
    add_device(parser)
    parser.set_defaults(work=run)


def read_problems(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The problems given, in a file or else at standard input, each with where it stands; empty lines are none."""
    if arguments.questions:
        return [(question, "") for question in arguments.questions]
    if arguments.input is not None and str(arguments.input) != "-":
        source, content = str(arguments.input), arguments.input.read_bytes()
    else:
        if sys.stdin.isatty():
            tell("Type problems, one a line, and Ctrl-D to end.")
        source, content = "standard input", sys.stdin.buffer.read()
    lines = enumerate(content.decode("utf-8-sig", errors="replace").split("\n"), start=1)
    return [(line.rstrip("\r"), f"{source}, line {number}: ") for number, line in lines if line.strip()]


def run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from calcformer.runs.newest import newest_run
    from calcformer.solver import Solver

    if arguments.questions and arguments.input is not None:
        raise InputError("problems are given and in a file; leave out --input or the problems")
    torch.set_num_threads(1)
    is_asked = not (arguments.questions or arguments.input or arguments.json) and sys.stdin.isatty()
    problems = [] if is_asked else read_problems(arguments)
    if not problems and not is_asked:
        raise InputError(f"no problem was given; give one, such as: calcformer solve {PRESETS[DEFAULT].data.example}")
    questions = [question for question, _ in problems]
    solver = Solver(arguments.run or newest_run(questions), arguments.device)
    asked = "" if arguments.run else f" (asked was {solver.folder}; --run names another)"
    for question, place in problems:
        try:
            solver.task.read_question(question)
        except InputError as error:
            raise InputError(f"{place}{error}{asked}") from None
    with tqdm(total=len(questions), unit="ex", unit_scale=True, disable=None, delay=2, leave=False) as bar:
        answers = solver.answers(questions, beam=arguments.beam, advance=bar.update)
    tell(f"answered by {solver}")
    if is_asked:
        return converse(solver, arguments.beam)
    if arguments.json:
        say(
            json.dumps(
                {
                    "run": str(solver.folder),
                    "preset": solver.config.preset,
                    "epoch": solver.epoch,
                    "epochs": solver.config.training.epochs,
                    "beam": arguments.beam,
                    "answers": [
                        {"asked": question, **vars(answer), "right": answer.is_right}
                        for question, answer in zip(questions, answers)
                    ],
                }
            )
        )
    else:
        say("\n".join(map(str, answers)))
    return 0


def converse(solver: Solver, beam: int) -> int:
    """Answer what is typed, a problem a line, until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit a line and recall those before

    tell("Type a problem, or quit.")
    while True:
        try:
            question = input("> ")
            if question.strip() in ("quit", "exit"):
                return 0
            if question.strip():
                say(str(solver.answers([question], beam=beam)[0]))
        except InputError as error:
            tell(str(error))
        except EOFError:
            tell("")
            return 0
        except KeyboardInterrupt:
            tell("")  # what comes next begins a line
            raise
