"""The first minutes on a GPU: is every kernel right, and how fast beside its peers. One command that ends in time.

    python -m bench.gpu_first --out FOLDER [--seconds 480]

Compiles all kernels on all cores, compares each with float64, then times what the benchmarks (bench_*.py) ask for, in
the order of need, against PyTorch's own. Each stage has its own processes and ends by force at its time: one that
hangs, crashes or is wrong costs its own figures and no others. FOLDER then holds two files: rows.jsonl, one result a
line, written as it comes, and log.txt. A summary is printed at the end. Without a GPU, --rehearse goes through all of
it on the CPU, on a few numbers; times then mean nothing.

What to do with the results: bench/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from bench.benchmark import gpu_stages, warm_ups
from bench.rows import ROOT, Row, commit, read_rows
from bench.stages import LOG, ROWS, Stage, one_after_another, run_stages
from bench.summary import summarise

HOPPER = {"forward": ("forward64", "forward128", "forward256"), "backward": ("backward64", "backward128")}
MEASURED = ROOT / "kernels" / "attention" / "measured.py"  # not imported: its package imports torch
END, STAGES_END = 480, 472  # seconds; between them the summary is printed
LEAST = 60  # seconds with which any of it makes sense
NEEDED = "torch", "triton", "numpy", "safetensors", "tqdm", "pytest", "hypothesis"

Environment = Callable[[Stage, list[Row]], dict[str, str]]


def commands(work: tuple[str, ...], out: Path, rehearse: bool) -> tuple[tuple[str, ...], ...]:
    """The processes of some pieces of work."""
    rest = ("--rows", str(out / ROWS), *(("--rehearse",) if rehearse else ()))
    return tuple((sys.executable, "-m", "bench.gpu_work", name, *rest) for name in work)


def make_stages(out: Path, rehearse: bool) -> list[Stage]:
    """Whether every kernel is right, then what the benchmarks ask for."""
    plan = [  # name, seconds, and pieces of work (bench/gpu_work.py) that run side by side
        ("compile", 60, ("look", "compile", *warm_ups())),
        ("correctness", 35, ("general", "short", "norms")),
        ("Hopper forward", 23, HOPPER["forward"]),
        ("Hopper backward", 23, HOPPER["backward"]),
        *((stage.name, stage.seconds, (work,)) for work, stage in gpu_stages("first").items()),
    ]
    return one_after_another((name, seconds, commands(work, out, rehearse)) for name, seconds, work in plan)


def environment(stage: Stage, rows: list[Row]) -> dict[str, str]:
    """What all processes must agree on, so that kernels compiled by one are found by the others; and which of the
    Hopper kernels run: those that passed all their cases, and those that a GPU decided for before and that did not
    fail, since their cases may not have ended in time."""
    verdicts = {row["kernel"]: row["passed"] for row in rows if row["kind"] == "verdict"}
    decided = {f"{way}{size}" for way, size in runpy.run_path(str(MEASURED))["HOPPER"]}
    hopper = " ".join(x for names in HOPPER.values() for x in names if verdicts.get(x, x in decided))
    interpreted = stage.name == "correctness" and "--rehearse" in stage.commands[0]
    return {
        "KERNELS_HOPPER": hopper or "0",
        "PYTHONUNBUFFERED": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "01"[interpreted],
    }


def parser_of(name: str, description: str | None, end: float) -> argparse.ArgumentParser:
    """The options that both commands have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--seconds", type=float, default=end, help=f"for everything ({end}); the stages share them")
    parser.add_argument("--commit", metavar="ID", help="what the results are of, in a copy without git")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same on the CPU, on a few numbers")
    return parser


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """Check what can be known before anything runs; the folder for the results."""
    if not (math.isfinite(options.seconds) and options.seconds >= LEAST):
        parser.error(f"--seconds must be {LEAST} or more, found {options.seconds:g}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"these packages are missing: {', '.join(missing)}; pip install {' '.join(missing)}")
    out: Path = options.out.resolve()
    if (out / ROWS).exists():
        parser.error(f"{out / ROWS} is there already; name another folder, or move the file away")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOG).touch()
    except OSError as error:
        parser.error(f"cannot write to --out: {error}")
    os.environ["BENCH_COMMIT"] = options.commit or commit()
    if os.environ["BENCH_COMMIT"].endswith(("unknown", "-dirty")) and not options.rehearse:
        print(f"note: the commit is {os.environ['BENCH_COMMIT']}; results should name one (--commit), without changes")
    return out


def run(plan: list[Stage], out: Path, seconds: float, environment: Environment) -> int:
    """Run the stages and print what the rows say, also where the run is stopped; the exit code."""

    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:  # no exception: while a process is started, Python drops some
        stopped.append(number)

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, stop)
    code = 0
    try:
        if not run_stages(plan, out, seconds, environment, stopped):
            print((out / LOG).read_text(errors="replace").strip().splitlines()[-1], file=sys.stderr)
            for file in ROWS, LOG:
                (out / file).unlink()
            return 2
    except KeyboardInterrupt:
        print("\nstopped; what is known so far:")
        code = 130
    name = f"bench/results/GPU-DATE-{os.environ['BENCH_COMMIT']}-CALL.jsonl"
    print("", *summarise(read_rows(out / ROWS), name), "", sep="\n")
    print(f"rows: {out / ROWS}, what was printed: {out / LOG}")
    return code


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("gpu_first", __doc__, END)
    options = parser.parse_args(argv)
    out = prepare(parser, options)
    return run(make_stages(out, options.rehearse), out, options.seconds * STAGES_END / END, environment)


if __name__ == "__main__":
    sys.exit(main())
