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
from calcformer.studies import STUDIES, Sweep, parse_vary

__all__ = ["main"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"calcformer: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def positive(text: str) -> int:
    """The value of a flag that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


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
            default = " / ".join(map(str, defaults if len(set(defaults)) > 1 else defaults[:1]))
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

    sweep = commands.add_parser("sweep", help="train many runs and compare them", allow_abbrev=False, description=(
        "Train a run for every combination of the values given, side by side, and compare them in a table and a "
        "picture. The same command with the same --out, or --resume, goes on where it was stopped. Any setting that "
        "train has can be given; in brackets stand the defaults of the presets."))
    sweep.add_argument("--study", choices=tuple(STUDIES), help="a report's comparison, its figures beside ours")
    sweep.add_argument("--preset", choices=tuple(PRESETS), default=argparse.SUPPRESS, help="named settings (formula)")
    sweep.add_argument("--vary", action="append", default=[], metavar="SETTING=VALUE,VALUE",
                       help="values to compare, such as learning-rate=1e-3,1e-4; several --vary for all combinations")
    sweep.add_argument("--seeds", type=int, metavar="N", help="train each with N seeds, from --seed on (1)")
    sweep.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time, 0 for one a CPU core (0)")
    sweep.add_argument("--out", type=Path, help="sweep folder to write (runs/STUDY-N or runs/sweep-N)")
    sweep.add_argument("--resume", type=Path, metavar="SWEEP", help="continue a sweep")
    add_settings(sweep)

    evaluate = commands.add_parser("evaluate", help="measure a run on its held-out problems", allow_abbrev=False)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--problems", type=positive, metavar="N",
                          help="held-out problems to draw (as many as the run was validated with)")
    evaluate.add_argument("--exhaustive", action="store_true",
                          help="also answer all problems that were not trained on; mistakes go to RUN/mistakes.txt")
    evaluate.add_argument("--processes", type=positive, metavar="N",
                          help="CPU processes for --exhaustive (as many as the run was trained with)")

    solve = commands.add_parser("solve", help="answer problems", allow_abbrev=False)
    solve.add_argument("questions", nargs="+", metavar="PROBLEM",
                       help="such as 649+864, or 'NEGATIVE 30 subtract NEGATIVE 34' for a run on expressions")
    solve.add_argument("--run", type=Path, metavar="RUN", help="run folder (the newest in runs/)")

    attention = commands.add_parser("attention", help="draw what every head attends to while a run answers",
                                    allow_abbrev=False)
    attention.add_argument("questions", nargs="+", metavar="PROBLEM", help="as for solve")
    attention.add_argument("--run", type=Path, metavar="RUN", help="run folder (the newest in runs/)")
    attention.add_argument("--out", type=Path, metavar="FOLDER",
                           help="where each problem gets a folder of pictures (RUN/attention)")
    attention.add_argument("--bertviz", type=Path, metavar="FILE",
                           help="write a problem's weights and tokens as JSON, named as in BertViz's head_view")

    for command in evaluate, solve:
        command.add_argument("--beam", type=positive, default=1, metavar="WIDTH",
                             help="follow the WIDTH best beginnings of an answer instead of the best one (1)")
    for command in evaluate, solve, attention:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    return parser


def free_folder(name: str) -> Path:
    """runs/NAME-N with the first N that is free."""
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


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


def run_sweep(arguments: argparse.Namespace) -> int:
    from calcformer import comparison, sweep

    settings = vars(arguments)
    del settings["command"]
    jobs, out, resumed = settings.pop("jobs"), settings.pop("out"), settings.pop("resume")
    study, vary, seeds = settings.pop("study"), parse_vary(settings.pop("vary")), settings.pop("seeds")
    if resumed is not None:
        given = [name for name, value in {"study": study, "vary": vary, "seeds": seeds, "out": out, **settings}.items()
                 if value not in (None, {})]
        if given:
            raise InputError(f"--resume continues a sweep as it is; leave out --{given[0].replace('_', '-')}")
        folder, plan = resumed, sweep.read_sweep(resumed)
    else:
        if study is not None and "preset" in settings:
            raise InputError("a study has its own preset; leave out --preset")
        preset = settings.pop("preset", "formula")
        plan = Sweep.of(settings, vary, 1 if seeds is None else seeds, preset, study)
        folder = out or free_folder(study or "sweep")
    try:
        results = sweep.run_sweep(plan, folder, jobs)
    except KeyboardInterrupt:
        finished = sweep.finished_runs(folder, plan)
        print(f"calcformer: stopped with {finished} of {len(plan.members())} runs finished; continue with: "
              f"calcformer sweep --resume {folder}", file=sys.stderr)
        return 130
    print(comparison.make_table(results), end="")
    print(f"written to {folder}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.evaluation import evaluate_run, report
    from calcformer.exhaustive import evaluate_all
    from calcformer.solver import Solver

    solver = Solver(arguments.run, arguments.device)
    training = solver.config.training
    torch.set_num_threads(training.threads or 1)
    result = evaluate_run(solver, arguments.beam, arguments.problems)
    if arguments.exhaustive:
        result["exhaustive"] = evaluate_all(solver, arguments.beam, arguments.processes or training.processes)
    print(json.dumps(result) if arguments.json else report(solver, result))
    return 0


def run_solve(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.solver import Solver, newest_run

    torch.set_num_threads(1)
    solver = Solver(arguments.run or newest_run(), arguments.device)
    for answer in solver.solve(arguments.questions, beam=arguments.beam):
        print(answer)
    return 0


def run_attention(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer import attention_maps
    from calcformer.solver import Solver, newest_run

    if arguments.bertviz is not None and len(arguments.questions) > 1:
        raise InputError(f"--bertviz takes one problem, got {len(arguments.questions)}")
    torch.set_num_threads(1)
    run = arguments.run or newest_run()
    solver = Solver(run, arguments.device)
    for question in arguments.questions:
        maps = attention_maps.attention_maps(solver, question)
        if arguments.bertviz is not None:
            attention_maps.save_head_view(maps, arguments.bertviz)
        folder = (arguments.out or run / "attention") / attention_maps.folder_name(question)
        paths = attention_maps.save_maps(maps, folder)
        answer = solver.task.decode_answer(solver.task.vocabulary.encode(maps.said))
        print(f"{question.strip()} -> {answer}: {len(paths)} pictures in {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for wrong input, 130 for Ctrl-C."""
    # A formula may begin with a minus sign; a space before it tells argparse that it is not a flag.
    words = [f" {word}" if re.match(r"-\d", word) else word for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser()
    try:
        arguments = parser.parse_args(words)
        command = {"train": run_train, "sweep": run_sweep, "evaluate": run_evaluate, "solve": run_solve,
                   "attention": run_attention}[arguments.command]
        return command(arguments)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
