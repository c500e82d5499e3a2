"""The command `calcformer`: from text to a configuration, and from results to text."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from calcformer import __version__
from calcformer.config import PRESETS, SECTIONS, RunConfig
from calcformer.errors import InputError

__all__ = ["main"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"calcformer: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


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
                options |= {"type": hint, "metavar": hint.__name__.upper()}
            defaults = [getattr(getattr(preset, section), item.name) for preset in PRESETS.values()]
            default = " / ".join(dict.fromkeys(str(value) for value in defaults))
            group.add_argument(f"--{item.name.replace('_', '-')}", help=f"{item.metadata['help']} ({default})",
                               **options)


def build_parser() -> Parser:
    parser = Parser(prog="calcformer", description="Train a transformer to calculate, measure it, and ask it.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"calcformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", allow_abbrev=False, description="Train a model. "
                                f"In brackets stand the defaults: {' / '.join(PRESETS)}, or one where they agree.")
    train.add_argument("--preset", choices=tuple(PRESETS), default=argparse.SUPPRESS, help="named settings (formula)")
    train.add_argument("--out", type=Path, help="run folder to write (runs/PRESET-N)")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue a run from its last finished epoch")
    add_settings(train)

    evaluate = commands.add_parser("evaluate", help="measure a run on its held-out problems", allow_abbrev=False)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    solve = commands.add_parser("solve", help="answer problems", allow_abbrev=False)
    solve.add_argument("questions", nargs="+", metavar="PROBLEM",
                       help="such as 649+864, or 'NEGATIVE 30 subtract NEGATIVE 34' for a run on expressions")
    solve.add_argument("--run", type=Path, metavar="RUN", help="run folder (the newest in runs/)")

    for command in evaluate, solve:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    return parser


def free_folder(preset: str) -> Path:
    """runs/PRESET-N with the first N that is free."""
    number = 1
    while Path("runs", f"{preset}-{number}").exists():
        number += 1
    return Path("runs", f"{preset}-{number}")


def configure(settings: dict[str, Any]) -> RunConfig:
    """The configuration that a preset and the flags given beside it describe."""
    return PRESETS[settings.pop("preset", "formula")].with_settings(settings)


def run_train(arguments: argparse.Namespace) -> int:
    settings = vars(arguments)
    del settings["command"]
    out, resumed = settings.pop("out"), settings.pop("resume")
    if resumed is not None:
        if out is not None or settings:
            given = "out" if out is not None else next(iter(settings))
            raise InputError(f"--resume continues a run with its own settings; leave out --{given.replace('_', '-')}")
        folder = resumed
    else:
        config = configure(settings)
        folder = out or free_folder(config.preset)

    from calcformer import training

    try:
        last = training.train(config, folder) if resumed is None else training.resume(folder)
    except KeyboardInterrupt:
        finished = training.finished_epochs(folder)
        if finished is None:
            print("calcformer: stopped before the run was written", file=sys.stderr)
        else:
            print(f"calcformer: stopped after epoch {finished}; continue with: calcformer train --resume {folder}",
                  file=sys.stderr)
        return 130
    print(f"{folder}: exact match {last['exact_match']:.4f}, token accuracy {last['valid_token_accuracy']:.4f}, "
          f"loss {last['valid_loss']:.4f} on held-out problems")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.solver import Solver
    from calcformer.training import evaluate, exact_match

    solver = Solver(arguments.run, arguments.device)
    torch.set_num_threads(solver.config.training.threads or 1)
    examples = solver.task.split()[1].to(solver.device)
    score = evaluate(solver.model, examples, solver.task.vocabulary.pad_id)
    result = {"exact_match": exact_match(solver.model, examples, solver.task), "token_accuracy": score.token_accuracy,
              "loss": score.loss, "n": score.n, "epoch": solver.epoch, "preset": solver.config.preset,
              "checkpoint": str(arguments.run / "model.safetensors")}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{arguments.run}, epoch {solver.epoch}, {score.n} held-out problems: exact match "
              f"{result['exact_match']:.4f}, token accuracy {score.token_accuracy:.4f}, loss {score.loss:.4f}")
    return 0


def run_solve(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.solver import Solver, newest_run

    torch.set_num_threads(1)
    solver = Solver(arguments.run or newest_run(), arguments.device)
    for answer in solver.solve(arguments.questions):
        print(answer)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    # A formula may begin with a minus sign; a space before it tells argparse that it is not a flag.
    words = [f" {word}" if re.match(r"-\d", word) else word for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser()
    try:
        arguments = parser.parse_args(words)
        command = {"train": run_train, "evaluate": run_evaluate, "solve": run_solve}[arguments.command]
        return command(arguments)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
