"""`calcformer sweep`."""

from __future__ import annotations

import argparse
from functools import partial

from calcformer.commands.train import add_run_flags
from calcformer.config import RunConfig
from calcformer.errors import InputError, say, tell
from calcformer.flags import Commands, path, whole
from calcformer.interrupt import Stopped
from calcformer.studies import MOST_SEEDS, STUDIES, Sweep, parse_vary

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "sweep",
        help="train many runs and compare them",
        description=(
            "Train a run for every combination of the values given, side by side, and compare them in a table and a "
            "picture. The same command with the same --out, or --resume, goes on where it was stopped. Any setting "
            f"that train has can be given; in brackets stand the defaults, those of the preset {base.preset}."
        ),
    )
    parser.add_argument("--study", choices=tuple(STUDIES), help="a report's comparison, its figures beside ours")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="values to compare, such as learning-rate=1e-3,1e-4, or case=NAME,NAME of a study; several --vary for all "
        "combinations",
    )
    parser.add_argument(
        "--seeds", type=whole(1, MOST_SEEDS), metavar="N", help="train each with N seeds, from --seed on (1)"
    )
    parser.add_argument(
        "--jobs", type=whole(0, 1024), default=0, metavar="N", help="runs at a time, 0 for one a CPU core (0)"
    )
    parser.add_argument("--out", type=path, help="sweep folder to write (runs/STUDY-N or runs/sweep-N)")
    parser.add_argument("--resume", type=path, metavar="SWEEP", help="continue a sweep")
    add_run_flags(parser, base)
    parser.set_defaults(work=partial(run, base))


def run(base: RunConfig, arguments: argparse.Namespace) -> int:
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
