"""`calcformer attention`."""

from __future__ import annotations

import argparse

from calcformer.config import RunConfig
from calcformer.errors import InputError, say
from calcformer.flags import Commands, add_device, path

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "attention",
        help="draw what every head attends to while a run answers",
        description=(
            "Draw what every head of every layer attends to while a run answers: a picture a layer, a row a token. A "
            "problem of a language model is a text."
        ),
    )
    parser.add_argument("questions", nargs="+", metavar="PROBLEM", help="as for solve")
    parser.add_argument("--run", type=path, metavar="RUN", help="run folder, as for solve")
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help="where each problem gets a folder of pictures (RUN/attention)"
    )
    parser.add_argument(
        "--bertviz",
        type=path,
        metavar="FILE",
        help="write a problem's weights and tokens as JSON, named as in BertViz's head_view",
    )
    add_device(parser)
    parser.set_defaults(work=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer import attention_maps
    from calcformer.runs.newest import newest_run
    from calcformer.solver import Solver

    if arguments.bertviz is not None and len(arguments.questions) > 1:
        raise InputError(f"--bertviz takes one problem, got {len(arguments.questions)}")
    torch.set_num_threads(1)
    run = arguments.run or newest_run(arguments.questions)
    solver = Solver(run, arguments.device)
    for question in arguments.questions:
        solver.task.read_question(question)  # all, before anything is drawn
    for question in arguments.questions:
        maps = attention_maps.attention_maps(solver, question)
        if arguments.bertviz is not None:
            attention_maps.save_head_view(maps, arguments.bertviz)
        folder = (arguments.out or run / "attention") / attention_maps.folder_name(maps.answer.problem)
        paths = attention_maps.save_maps(maps, folder)
        say(f"{maps.answer}: {len(paths)} pictures in {folder}, of {solver}")
    return 0
