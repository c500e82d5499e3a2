"""`calcformer train`, and what `sweep` has of it: the preset that is meant, and a flag for each setting."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from calcformer.config import DEFAULT, PRESETS, RunConfig, describe_figures
from calcformer.errors import InputError, say, shown, tell
from calcformer.flags import Commands, Parser, add_settings, path
from calcformer.interrupt import Stopped
from calcformer.studies import STUDIES
from calcformer.tasks import TASKS

__all__ = ["add", "add_run_flags", "choose"]


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
    finder = Parser(add_help=False)
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


def add_run_flags(parser: Parser, base: RunConfig) -> None:
    """The flags of the task and the kind of model of `base`."""
    own = [name for name, preset in PRESETS.items() if preset.data.task == base.data.task]
    parser.usage = f"{parser.prog} [TASK] [--preset PRESET] [--FLAG VALUE ...]"
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        metavar="PRESET",
        default=argparse.SUPPRESS,
        help=f"settings with a name: {', '.join(own)} ({base.preset})",
    )
    add_settings(parser, base)


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description=(
            f"Train a model on a task: {', '.join(TASKS)}. These are the flags of {base.data.task}; another one, "
            f"named first, has others. In brackets stand the defaults, those of the preset {base.preset}; with another "
            "--preset before --help its own."
        ),
    )
    parser.add_argument("--out", type=path, help="run folder to write (runs/PRESET-N)")
    parser.add_argument("--resume", type=path, metavar="RUN", help="continue a run from its last finished epoch")
    add_run_flags(parser, base)
    parser.set_defaults(work=partial(run, base))


def run(base: RunConfig, arguments: argparse.Namespace) -> int:
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
