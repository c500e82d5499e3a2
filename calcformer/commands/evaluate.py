"""`calcformer evaluate`."""

from __future__ import annotations

import argparse
import json

from calcformer.config import RunConfig
from calcformer.errors import InputError, say
from calcformer.flags import Commands, add_beam, add_device, add_length_penalty, path, set_length_penalty, whole
from calcformer.settings import LARGEST_SET

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a run on its held-out problems",
        description="Measure a run on problems it was not trained on, and count its mistakes by kind.",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--problems",
        type=whole(1, LARGEST_SET),
        metavar="N",
        help="held-out problems to draw (as many as the run was validated with)",
    )
    parser.add_argument(
        "--part", metavar="NAME", help="of translations: test... of the corpus, or valid, what is held out (a test)"
    )
    parser.add_argument(
        "--exhaustive",
        action="store_true",
        help="also answer all problems that were not trained on; mistakes go to RUN/mistakes.txt",
    )
    parser.add_argument(
        "--processes",
        type=whole(1, 1024),
        metavar="N",
        help="CPU processes for --exhaustive (as many as the run was trained with)",
    )
    add_beam(parser)
    add_length_penalty(parser)
    add_device(parser)
    parser.set_defaults(work=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.evaluation import evaluate_run, report
    from calcformer.exhaustive import check_exhaustive, evaluate_all
    from calcformer.runs.device import count_cores
    from calcformer.solver import Solver

    if arguments.processes is not None and not arguments.exhaustive:
        raise InputError("--processes is for --exhaustive; leave it out")
    solver = Solver(arguments.run, arguments.device)
    if arguments.exhaustive:
        check_exhaustive(solver, arguments.processes)
    torch.set_num_threads(min(solver.config.training.threads or 1, count_cores()))
    set_length_penalty(solver, arguments.beam, arguments.length_penalty)
    result = evaluate_run(solver, arguments.beam, arguments.problems, arguments.part)
    if arguments.exhaustive:
        result["exhaustive"] = evaluate_all(solver, arguments.beam, arguments.processes)
    say(json.dumps(result, allow_nan=False) if arguments.json else report(solver, result))
    return 0
