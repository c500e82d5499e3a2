"""The second call on a GPU, after what the first one showed: faster tiles, the main shapes once more, and the tests.

    python -m bench.gpu_second --out FOLDER [--seconds 230] [--first FILE] [WORD ... [or WORD ...]]

Searches tiles (python -m bench.tune) for the kernels that WORDs name, "forward D128 or key_value D128"; without any,
for those by which ours lost most in FILE, the rows of bench.gpu_first. Then it times what the benchmarks (bench_*.py)
want timed again, the three main shapes of attention, and runs the tests on the GPU, all cores side by side, those first
that failed in the newest of bench/results, until the time is used up. Stages end by force at their time; FOLDER gets
rows.jsonl and log.txt, as by bench.gpu_first.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from bench.benchmark import gpu_stages
from bench.gpu_first import commands, environment, parser_of, prepare, run
from bench.rows import ROOT, Row, newest_with, read_rows, standings
from bench.stages import ROWS, Stage, cores, one_after_another

SEARCHES = 5  # at most; each takes about 20 seconds
TILES, TESTS = 110, 75  # seconds for them, beside what the benchmarks ask for
END, STAGES_END = 230, 225


def lost_searches(rows: list[Row]) -> list[str]:
    """The tile searches for what we lost at, the worst first, by their names in bench.tune."""
    found: dict[str, None] = {}
    for ratio, group, _, _ in standings(rows):
        match = re.match(r"attention (forward|backward) .*?S(\d+) D(\d+)", group)
        if ratio >= 1 or not match:
            continue
        direction, length, size = match[1], int(match[2]), match[3]
        asked = " dropout" if "dropout" in group else " causal" if "causal" in group else ""
        if length <= 64:
            found[f"short {direction} L{length} D{size}"] = None
        elif direction == "forward":
            found[f"forward D{size}{asked}"] = None
        else:
            found |= dict.fromkeys(f"{kernel} D{size}{asked}" for kernel in ("key_value", "query"))
    return list(found)[:SEARCHES]


def make_stages(words: list[str], out: Path, rehearse: bool) -> list[Stage]:
    """The stages; rehearsed: one search, compiled only, and the tests of one file, without a GPU."""
    rows = str(out / ROWS)
    words = ["short", "forward", "L5", "D16"] if rehearse else words
    tune = (sys.executable, "-m", "bench.tune", *words, "--rows", rows, "--time-limit", str(TILES - 20))
    side_by_side = ("-n", "2" if rehearse else str(cores())) if importlib.util.find_spec("xdist") else ()
    limits = ("--timeout=60", "--timeout-method=thread") if importlib.util.find_spec("pytest_timeout") else ()
    last = newest_with("test")
    tests = (
        sys.executable,
        "-m",
        "pytest",
        "tests/test_short.py" if rehearse else "tests",
        "-m",
        "gpu",
        "-q",
        "-p",
        "bench.pytest_rows",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",  # it warns of side by side
        "--rows",
        rows,
        *(("--last", str(last)) if last else ()),
        *side_by_side,
        *limits,
    )
    look = commands(("look",), out, rehearse)
    return one_after_another(
        [
            ("tiles", TILES, (*look, *((tune,) if words else ()))),
            *(
                (stage.name, stage.seconds, commands((work,), out, rehearse))
                for work, stage in gpu_stages("second").items()
            ),
            ("tests", TESTS, (tests,)),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("gpu_second", __doc__, END)
    parser.add_argument("words", nargs="*", metavar="WORD", help="of tile searches: python -m bench.tune --list")
    parser.add_argument("--first", type=Path, metavar="FILE", help="rows of bench.gpu_first (bench/results' newest)")
    options = parser.parse_args(argv)
    first: Path | None = options.first or newest_with("verdict")
    rows = read_rows(first) if first and first.is_file() else []
    if options.first and not any(row["kind"] == "verdict" for row in rows):
        parser.error(f"--first must be the rows.jsonl of bench.gpu_first, found {options.first}, which has no verdicts")
    words = options.words or " or ".join(lost_searches(rows)).split()
    if options.words:
        command = (sys.executable, "-m", "bench.tune", *words, "--list")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            parser.error((done.stderr.strip().splitlines() or ["bench.tune --list failed"])[-1].partition("error: ")[2])
    out = prepare(parser, options)
    print(f"first run: {first or 'none'}\ntile searches: {' '.join(words) or 'none'}", flush=True)
    plan = make_stages(words, out, options.rehearse)
    # The Hopper kernels that were right in the first run.
    return run(plan, out, options.seconds * STAGES_END / END, lambda stage, _: environment(stage, rows))


if __name__ == "__main__":
    sys.exit(main())
