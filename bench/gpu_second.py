"""The second call on a GPU, after what the first one showed: faster tiles, the main shapes once more, and the tests.

    python -m bench.gpu_second --out FOLDER [--seconds 230] [--first FILE] [WORD ... [or WORD ...]]

Searches tiles (python -m bench.tune) for the kernels that WORDs name, "forward D128 or key_value D128"; without any,
for those by which ours lost most in FILE, the rows of the first run (the newest of bench/results). Then it times the
three main shapes again and runs the tests on the GPU, all cores side by side, those first that failed in FILE, until
the time is used up. Stages end by force at their time; FOLDER gets rows.jsonl and log.txt, as by bench.gpu_first.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from bench.gpu_first import commands, environment, summarise
from bench.rows import Row, newest_results, read_rows, standings
from bench.stages import LOG, ROWS, Stage, run_stages

SEARCHES = 5  # at most; each takes about 20 seconds
ENDS = {"tiles": 110, "main shapes": 150, "tests": 225}
END = 230


def lost_searches(rows: list[Row]) -> list[str]:
    """The tile searches for what we lost at, the worst first, as words of bench.tune."""
    found: dict[str, None] = {}
    for ratio, group, _, _ in standings(rows):
        match = re.match(r"attention (forward|backward) .*?S(\d+) D(\d+)", group)
        if ratio >= 1 or not match:
            continue
        direction, length, size = match[1], int(match[2]), match[3]
        dropout = " dropout" if "dropout" in group else ""
        if length <= 64:
            found[f"short {direction} L{length} D{size}"] = None
        elif direction == "forward":
            found[f"forward D{size}{dropout}"] = None
        else:
            found |= dict.fromkeys(f"{kernel} D{size}{dropout}" for kernel in ("key_value", "query"))
    return list(found)[:SEARCHES]


def make_stages(words: list[str], first: Path | None, out: Path, rehearse: bool) -> list[Stage]:
    """The stages; rehearsed: one search, compiled only, and the tests of one file, without a GPU."""
    rows = str(out / ROWS)
    words = ["short", "forward", "L5", "D16"] if rehearse else words
    tune = (sys.executable, "-m", "bench.tune", *words, "--rows", rows, "--time-limit", str(ENDS["tiles"] - 20))
    tests = (
        sys.executable, "-m", "pytest", "tests/test_short.py" if rehearse else "tests", "-m", "gpu", "-q", "-p",
        "bench.pytest_rows", "-p", "no:cacheprovider", "--rows", rows, *(("--last", str(first)) if first else ()),
        *(() if rehearse else ("-n", str(os.cpu_count()), "--timeout=60", "--timeout-method=thread")),
    )  # fmt: skip
    look, main_shapes = commands(("look",), out, rehearse), commands(("main-shapes",), out, rehearse)
    return [
        Stage("tiles", ENDS["tiles"], (*look, *((tune,) if words else ()))),
        Stage("main shapes", ENDS["main shapes"], main_shapes),
        Stage("tests", ENDS["tests"], (tests,)),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_second", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of tile searches: python -m bench.tune --list")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--seconds", type=float, default=END, help=f"for everything ({END}); shorter or longer stages")
    parser.add_argument("--first", type=Path, default=newest_results(), metavar="FILE", help="rows of the first run")
    parser.add_argument("--commit", metavar="ID", help="what the results are of, in a copy without git")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same on the CPU, a little of each")
    options = parser.parse_args(argv)
    if options.commit:
        os.environ["BENCH_COMMIT"] = options.commit
    out = options.out.resolve()
    if (out / ROWS).exists():
        parser.error(f"{out / ROWS} is there already; name another folder, or move the file away")
    if options.first and not options.first.exists():
        parser.error(f"there is no {options.first}; --first takes the rows.jsonl of bench.gpu_first")
    first = options.first.resolve() if options.first else None
    known = read_rows(first) if first else []
    words = options.words or " or ".join(lost_searches(known)).split()
    stages = make_stages(words, first, out, options.rehearse)

    def setting(stage: Stage, _: list[Row]) -> dict[str, str]:
        return environment(stage, known)  # the Hopper kernels that were right in the first run

    if not run_stages(stages, out, options.seconds * ENDS["tests"] / END, setting):
        print("there is no CUDA GPU here; --rehearse goes through everything on the CPU", file=sys.stderr)
        return 2
    print("", *summarise(read_rows(out / ROWS)), "", f"results: {out / ROWS}, what was printed: {out / LOG}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
