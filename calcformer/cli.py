"""The command `calcformer`: from text to a configuration, and from results to text."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from calcformer import __version__
from calcformer.config import DEFAULT, PRESETS, RunConfig, describe_figures
from calcformer.errors import InputError, shown, tell
from calcformer.flags import Parser, add_settings, path, real, whole
from calcformer.interrupt import Stopped, handle_signals
from calcformer.settings import LARGEST_SET
from calcformer.studies import MOST_SEEDS, STUDIES, Sweep, parse_vary
from calcformer.tasks import TASKS

if TYPE_CHECKING:
    from calcformer.model import DecoderOnly
    from calcformer.solver import Solver

__all__ = ["main"]

STANDARD_OUTPUT = "standard output"


def say(text: str) -> None:
    """Print to standard output, at once, so that an error is one of this line."""
    try:
        print(text, flush=True)
    except OSError as error:
        error.filename = STANDARD_OUTPUT
        raise


def choose(words: list[str]) -> tuple[RunConfig, list[str]]:
    """The preset that the words of train or sweep begin with, and those words without TASK.

    TASK stands right behind the command; --preset, --study and --model may stand anywhere. What they name wrongly is
    left to the parser. InputError where TASK is none, or where the others contradict it.
    """
    task, rest = None, words[1:]
    if rest and not rest[0].startswith("-"):
        task = rest.pop(0)
        if task not in TASKS:
            raise InputError(f"there is no task {shown(task)}; give {' or '.join(TASKS)}, or none for {DEFAULT}")
        if any(word.partition("=")[0] == "--resume" for word in rest):
            raise InputError(f"--resume goes on with what was begun; leave out {task}")
    finder = Parser(add_help=False, allow_abbrev=False)
    for flag in "--preset", "--study", "--model":
        finder.add_argument(flag, nargs="?")
    found = finder.parse_known_args(rest)[0]
    name = found.preset if found.study not in STUDIES else STUDIES[found.study].preset
    if name not in PRESETS:
        name = DEFAULT if task is None else next(iter(TASKS[task].presets()))
    base = PRESETS[name]
    if task not in (None, base.data.task):
        raise InputError(f"{name} is a preset of {base.data.task}, not of {task}; leave out one of them")
    if found.model in base.data.models:
        base = base.with_settings({"model": found.model})
    return base, [words[0], *rest]


def build_parser(base: RunConfig) -> Parser:
    """The parser of all commands; train and sweep have the flags of the task and the kind of model of `base`."""
    task, own = base.data.task, [name for name, preset in PRESETS.items() if preset.data.task == base.data.task]
    parser = Parser(prog="calcformer", description="Train a transformer, measure it, and ask it.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"calcformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model",
        allow_abbrev=False,
        description=(
            f"Train a model on a task: {', '.join(TASKS)}. These are the flags of {task}; another one, named first, "
            f"has others. In brackets stand the defaults: {' / '.join(own)}, or one where they agree."
        ),
    )
    train.add_argument("--out", type=path, help="run folder to write (runs/PRESET-N)")
    train.add_argument("--resume", type=path, metavar="RUN", help="continue a run from its last finished epoch")

    sweep = commands.add_parser(
        "sweep",
        help="train many runs and compare them",
        allow_abbrev=False,
        description=(
            "Train a run for every combination of the values given, side by side, and compare them in a table and a "
            "picture. The same command with the same --out, or --resume, goes on where it was stopped. Any setting "
            f"that train has can be given; in brackets stand the defaults of the presets of {task}."
        ),
    )
    sweep.add_argument("--study", choices=tuple(STUDIES), help="a report's comparison, its figures beside ours")
    sweep.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="values to compare, such as learning-rate=1e-3,1e-4; several --vary for all combinations",
    )
    sweep.add_argument(
        "--seeds", type=whole(1, MOST_SEEDS), metavar="N", help="train each with N seeds, from --seed on (1)"
    )
    sweep.add_argument(
        "--jobs", type=whole(0, 1024), default=0, metavar="N", help="runs at a time, 0 for one a CPU core (0)"
    )
    sweep.add_argument("--out", type=path, help="sweep folder to write (runs/STUDY-N or runs/sweep-N)")
    sweep.add_argument("--resume", type=path, metavar="SWEEP", help="continue a sweep")
    for command in train, sweep:
        command.prog += " [TASK]"
        command.add_argument(
            "--preset",
            choices=tuple(PRESETS),
            metavar="PRESET",
            default=argparse.SUPPRESS,
            help=f"{', '.join(own)} ({base.preset})",
        )
        add_settings(command, base)

    evaluate = commands.add_parser("evaluate", help="measure a run on its held-out problems", allow_abbrev=False)
    evaluate.add_argument("run", type=path, metavar="RUN", help="run folder")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument(
        "--problems",
        type=whole(1, LARGEST_SET),
        metavar="N",
        help="held-out problems to draw (as many as the run was validated with)",
    )
    evaluate.add_argument(
        "--exhaustive",
        action="store_true",
        help="also answer all problems that were not trained on; mistakes go to RUN/mistakes.txt",
    )
    evaluate.add_argument(
        "--processes",
        type=whole(1, 1024),
        metavar="N",
        help="CPU processes for --exhaustive (as many as the run was trained with)",
    )

    solve = commands.add_parser(
        "solve",
        help="answer problems",
        allow_abbrev=False,
        description=(
            "Answer problems, say how probable the answers are, and whether they are right. Without any problem they "
            "come from standard input, one a line; on a terminal they are asked for. Where one cannot be read none is "
            "answered."
        ),
    )
    solve.add_argument(
        "questions",
        nargs="*",
        metavar="PROBLEM",
        help=f"such as {', or '.join(task.example for task in TASKS.values() if task.example)}",
    )
    solve.add_argument(
        "--input", type=path, metavar="FILE", help="a file of problems, one a line, - for standard input"
    )
    solve.add_argument(
        "--run",
        type=path,
        metavar="RUN",
        help="run folder (of those in runs/ that know such problems the newest finished one)",
    )
    solve.add_argument("--json", action="store_true", help="print one JSON object")

    generate = commands.add_parser(
        "generate",
        help="go on with a text",
        allow_abbrev=False,
        description="Let a language model go on with a text, each token drawn by its probability.",
    )
    generate.add_argument("run", type=path, metavar="RUN", help="run folder")
    generate.add_argument("beginning", nargs="?", metavar="BEGINNING", help="what the text begins with (a new line)")
    generate.add_argument("--length", type=whole(1, 1_000_000), default=200, metavar="N", help="tokens to say (200)")
    generate.add_argument(
        "--temperature",
        type=real(0, 1000),
        default=0.8,
        metavar="T",
        help="below 1 for likely tokens, above for others, 0 for the likeliest (0.8)",
    )
    generate.add_argument(
        "--top-k", type=whole(0, 10**9), default=0, metavar="K", help="of the K likeliest tokens only, 0 for all (0)"
    )
    generate.add_argument(
        "--top-p",
        type=real(0, 1),
        default=1.0,
        metavar="P",
        help="of the fewest tokens only whose probabilities sum to P (1)",
    )
    generate.add_argument(
        "--seed", type=whole(0, 2**62), metavar="N", help="for the same text again (another each time)"
    )
    generate.add_argument("--count", type=whole(1, 10_000), default=1, metavar="N", help="texts (1)")
    generate.add_argument("--json", action="store_true", help="print one JSON object")

    attention = commands.add_parser(
        "attention", help="draw what every head attends to while a run answers", allow_abbrev=False
    )
    attention.add_argument("questions", nargs="+", metavar="PROBLEM", help="as for solve")
    attention.add_argument("--run", type=path, metavar="RUN", help="run folder, as for solve")
    attention.add_argument(
        "--out", type=path, metavar="FOLDER", help="where each problem gets a folder of pictures (RUN/attention)"
    )
    attention.add_argument(
        "--bertviz",
        type=path,
        metavar="FILE",
        help="write a problem's weights and tokens as JSON, named as in BertViz's head_view",
    )

    commands.add_parser("tasks", help="list what can be learned, and the presets", allow_abbrev=False)
    runs = commands.add_parser("runs", help="list the runs in a folder", allow_abbrev=False)
    runs.add_argument("folder", type=path, nargs="?", default=Path("runs"), metavar="FOLDER", help="(runs)")
    info = commands.add_parser("info", help="say what is known of a run", allow_abbrev=False)
    info.add_argument("run", type=path, metavar="RUN", help="run folder")
    for command in commands.choices["tasks"], runs, info:
        command.add_argument("--json", action="store_true", help="print JSON")

    explain = commands.add_parser(
        "explain",
        help="a transformer worked by hand, every matrix of it",
        allow_abbrev=False,
        description=(
            "Work a small transformer by hand: every step with its matrices, to calculate along, and held to the "
            "kernels. In brackets stand the defaults."
        ),
    )
    explain.add_argument("sentence", nargs="?", metavar="SENTENCE", help="what the encoder reads (You win, you live!)")
    explain.add_argument("--answer", metavar="SENTENCE", help="what the decoder is to say (you live)")
    for flag, most, text in (
        ("--width", 256, "numbers a word (4)"),
        ("--heads", 32, "heads of each attention (1)"),
        ("--hidden", 1024, "numbers a word within the feed-forward (4)"),
        ("--d-k", 256, "numbers of a head's query and key (width / heads)"),
        ("--d-v", 256, "numbers of a head's value (width / heads)"),
    ):
        explain.add_argument(flag, type=whole(1, most), metavar="N", help=text)
    explain.add_argument("--seed", type=whole(0, 2**63 - 1), metavar="N", help="of the weights drawn (0)")
    explain.add_argument("--run", type=path, metavar="RUN", help="with a run's weights; SENTENCE is a problem then")
    explain.add_argument("--tutorial", action="store_true", help="a tutorial's numbers, what it prints beside ours")
    explain.add_argument("--losses", action="store_true", help="six loss functions side by side instead")
    explain.add_argument("--html", type=path, metavar="FILE", help="write a page for a browser instead of text")
    explain.add_argument("--picture", type=path, metavar="FILE", help="with --losses: draw them to a PNG as well")

    for command in evaluate, solve:
        command.add_argument(
            "--beam",
            type=whole(1, 100),
            default=1,
            metavar="WIDTH",
            help="follow the WIDTH best beginnings of an answer instead of the best one (1)",
        )
    for command in evaluate, solve, generate, attention:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    return parser


def run_train(base: RunConfig, arguments: argparse.Namespace) -> int:
    settings = vars(arguments)
    del settings["command"]
    out, resumed = settings.pop("out"), settings.pop("resume")
    if resumed is not None:
        if out is not None or settings:
            given = "out" if out is not None else next(iter(settings))
            raise InputError(f"--resume continues a run with its own settings; leave out --{given.replace('_', '-')}")
    else:
        settings.pop("preset", None)
        config = base.with_settings(settings)

    from calcformer import training
    from calcformer.runs.folder import read_config

    try:
        last = training.train(config, out) if resumed is None else training.resume(resumed)
    except Stopped as stopped:
        tell(
            f"calcformer: stopped after epoch {stopped.finished}; continue with: calcformer train --resume "
            f"{stopped.folder}"
        )
        return 130
    config = read_config(Path(last["run"]))
    say(f"{last['run']}: {describe_figures(last, config)} on {config.data.measured}")
    return 0


def run_sweep(base: RunConfig, arguments: argparse.Namespace) -> int:
    from calcformer import comparison, sweep

    settings = vars(arguments)
    del settings["command"]
    jobs, out, resumed = settings.pop("jobs"), settings.pop("out"), settings.pop("resume")
    study, vary, seeds = settings.pop("study"), parse_vary(settings.pop("vary"), base), settings.pop("seeds")
    if resumed is not None:
        given = [
            name
            for name, value in {"study": study, "vary": vary, "seeds": seeds, "out": out, **settings}.items()
            if value not in (None, {})
        ]
        if given:
            raise InputError(f"--resume continues a sweep as it is; leave out --{given[0].replace('_', '-')}")
        out, plan = resumed, sweep.read_sweep(resumed)
    else:
        if study is not None and "preset" in settings:
            raise InputError("a study has its own preset; leave out --preset")
        settings.pop("preset", None)
        plan = Sweep.of(settings, vary, seeds, base.preset, study)
    try:
        results = sweep.run_sweep(plan, out, jobs)
    except Stopped as stopped:
        tell(
            f"calcformer: stopped with {stopped.finished} of {len(plan.members())} runs finished; continue with: "
            f"calcformer sweep --resume {stopped.folder}"
        )
        return 130
    say(f"{comparison.make_table(results)}written to {results['folder']}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
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
    result = evaluate_run(solver, arguments.beam, arguments.problems)
    if arguments.exhaustive:
        result["exhaustive"] = evaluate_all(solver, arguments.beam, arguments.processes)
    say(json.dumps(result, allow_nan=False) if arguments.json else report(solver, result))
    return 0


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
    return [(line, f"{source}, line {number}: ") for number, line in lines if line.strip()]


def run_solve(arguments: argparse.Namespace) -> int:
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
    for question, place in problems:
        try:
            solver.task.read_question(question)
        except InputError as error:
            raise InputError(f"{place}{error}") from None
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


def converse(solver: "Solver", beam: int) -> int:
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


def run_generate(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.sampling import generate
    from calcformer.solver import Solver

    solver = Solver(arguments.run, arguments.device)
    torch.set_num_threads(min(solver.config.training.threads or 1, torch.get_num_threads()))
    ids = solver.task.beginning(arguments.beginning)
    seed = torch.seed() % 2**32 if arguments.seed is None else arguments.seed
    drawn = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")} | {"seed": seed}
    said = generate(cast("DecoderOnly", solver.model), [ids] * arguments.count, arguments.length, **drawn)
    # With what was asked, since a piece of a word may belong to the last of it.
    texts = [solver.task.decode_answer((ids if arguments.beginning else []) + more) for more in said]
    if arguments.json:
        facts = {"run": str(solver.folder), "epoch": solver.epoch, "length": arguments.length}
        say(json.dumps({**facts, "beginning": arguments.beginning, **drawn, "texts": texts}))
    else:
        tell(f"by {solver}, seed {seed}")
        say("\n---\n".join(texts))
    return 0


def run_attention(arguments: argparse.Namespace) -> int:
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


def run_listing(arguments: argparse.Namespace) -> int:
    """The commands tasks, runs and info."""
    from calcformer import listing

    found: Any
    if arguments.command == "tasks":
        found, text = listing.list_tasks(), listing.tasks_text()
    elif arguments.command == "runs":
        found = listing.list_runs(arguments.folder)
        text = listing.runs_text(arguments.folder, found)
    else:
        found = listing.describe_run(arguments.run)
        text = listing.run_text(found)
    say(json.dumps(found) if arguments.json else text)
    return 0


def run_explain(arguments: argparse.Namespace) -> int:
    import shutil

    from calcformer import by_hand
    from calcformer.runs.files import write_atomically

    given = vars(arguments)
    drawn = {name: given[name] for name in ("answer", "width", "heads", "hidden", "seed")}
    drawn |= {"key_size": arguments.d_k, "value_size": arguments.d_v}
    page = by_hand.choose_page(arguments.sentence, arguments.run, arguments.tutorial, arguments.losses, drawn)
    if arguments.picture is not None and not arguments.losses:
        raise InputError("--picture is for --losses; leave it out")
    for file in arguments.html, arguments.picture:  # both, before one is written
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}; make it, or name another")
    if arguments.picture is not None:
        by_hand.draw_losses(arguments.picture)
        tell(f"drawn to {arguments.picture}")
    if arguments.html is not None:
        write_atomically(arguments.html, by_hand.write_html(page).encode())
        say(f"written to {arguments.html}")
    else:
        say(by_hand.write_text(page, shutil.get_terminal_size((by_hand.COLUMNS, 24)).columns))
    return 0 if page.agrees else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where `explain` finds numbers that disagree, 2 for wrong input,
    130 for Ctrl-C or SIGTERM, 141 where what it printed found no reader.
    """
    open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["solve"], ["attention"], ["explain"]):
        # A formula may begin with a minus sign; a space before it tells argparse that it is not a flag.
        words = [f" {word}" if re.match(r"-+[^-\w]|-+\d", word) else word for word in words]
    parser = Parser(prog="calcformer")
    try:
        with handle_signals(signal.default_int_handler, signal.SIGTERM):
            base = PRESETS[DEFAULT]
            if words[:1] in (["train"], ["sweep"]):
                base, words = choose(words)
            arguments = build_parser(base).parse_args(words)
            commands: dict[str, Callable[[argparse.Namespace], int]] = {
                "train": partial(run_train, base),
                "sweep": partial(run_sweep, base),
                "evaluate": run_evaluate,
                "solve": run_solve,
                "generate": run_generate,
                "attention": run_attention,
                "explain": run_explain,
                **dict.fromkeys(("tasks", "runs", "info"), run_listing),
            }
            return commands[arguments.command](arguments)
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
