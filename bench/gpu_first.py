"""The first minutes on a GPU: is every kernel right, and how fast beside its peers. One command that ends in time.

    python -m bench.gpu_first --out FOLDER [--seconds 480]

Compiles all kernels on all cores, compares each with float64, then times attention, short sequences, norms, a training
step and a call's way to the GPU against PyTorch's own. Each stage has its own processes and ends by force at its time:
one that hangs, crashes or is wrong costs its own figures and no others. FOLDER then holds two files: rows.jsonl, one
result a line, written as it comes, and log.txt. A summary is printed at the end. Without a GPU, --rehearse goes through
all of it on the CPU, on a few numbers; times then mean nothing.

What to do with the results: bench/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.rows import Row, by_group, read_rows, standings
from bench.stages import LOG, ROWS, Stage, run_stages

HOPPER = {"forward": ("forward64", "forward128", "forward256"), "backward": ("backward64", "backward128")}
# Name, end in seconds, and pieces of work (bench/gpu_work.py) that run side by side.
PLAN = [
    ("compile", 60, ("look", "compile", "warm-up-flex", "warm-up-norms", "warm-up-training")),
    ("correctness", 95, ("general", "short", "norms")),
    ("Hopper forward", 118, HOPPER["forward"]),
    ("Hopper backward", 141, HOPPER["backward"]),
    ("attention forward", 196, ("attention-forward",)),
    ("attention backward", 256, ("attention-backward",)),
    ("short sequences", 288, ("short-sequences",)),
    ("norms", 334, ("norms-timed",)),
    ("training", 386, ("training",)),
    ("compiled training", 460, ("compiled-training",)),
    ("host time", 472, ("host-time",)),
]
END = 480  # a summary is printed until then


def commands(work: tuple[str, ...], out: Path, rehearse: bool) -> tuple[tuple[str, ...], ...]:
    """The processes of some pieces of work."""
    rest = ("--rows", str(out / ROWS), *(("--rehearse",) if rehearse else ()))
    return tuple((sys.executable, "-m", "bench.gpu_work", name, *rest) for name in work)


def environment(stage: Stage, rows: list[Row]) -> dict[str, str]:
    """What all processes must agree on, so that kernels compiled by one are found by the others; and which of the
    Hopper kernels run: those that passed all their cases."""
    passed = [row["kernel"] for row in rows if row["kind"] == "verdict" and row["passed"]]
    hopper = " ".join(name for names in HOPPER.values() for name in names if name in passed)
    interpreted = stage.name == "correctness" and "--rehearse" in stage.commands[0]
    return {
        "KERNELS_HOPPER": hopper or "0", "PYTHONUNBUFFERED": "1",
        "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_INTERPRET": "01"[interpreted],
    }  # fmt: skip


def summarise(rows: list[Row]) -> list[str]:
    """What the rows say, in few lines: what did not end, what is wrong, ours against the best peer."""
    lines = [f"{row['stage']}: {row['result']}" for row in rows if row["kind"] == "stage" and row["result"] != "passed"]
    for row in rows:
        if row["kind"] == "compile" and row["failures"]:
            lines.append(f"does not compile: {row['work']}, {row['case']}: {row['failures'][0]}")
        elif row["kind"] == "verdict":
            told = "right" if row["passed"] else f"NOT RIGHT: {'; '.join(row['failed'][:3])}"
            lines.append(f"{row['kernel']}: {told}")
        elif row["kind"] in ("wrong", "failed"):
            lines.append(f"{row['kind'].upper()}, not timed: {row['group']}, {row['provider']}: {row['problem']}")
        elif row["kind"] == "ceiling":
            unit, figure = next((k, v) for k, v in row.items() if k.endswith("per_second"))
            lines.append(f"{row['what']}: {figure:,.0f} {unit.replace('_per_second', '/s')}")
    if any(row["kind"] == "machine" and not row["gpu"] for row in rows):
        lines.append("a rehearsal on a CPU: its times mean nothing")
    compiled = [row for row in rows if row["kind"] == "compile"]
    kernels = {name for row in compiled for name in row["kernels"]}
    lines.append(f"{len(kernels)} kernels compiled in {sum(row['cpu_seconds'] for row in compiled):.0f} s of CPU time")
    lines.append("ours over the best peer:")
    compared = standings(rows)
    lines += [f"{ratio:6.2f}  {group}: {ours} against {peer}" for ratio, group, ours, peer in compared]
    alone = set(by_group(rows)) - {group for _, group, _, _ in compared}
    return lines + [f"     –  {group}: only {', '.join(by_group(rows)[group])}" for group in sorted(alone)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_first", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--seconds", type=float, default=END, help=f"for everything ({END}); shorter or longer stages")
    parser.add_argument("--commit", metavar="ID", help="what the results are of, in a copy without git")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same on the CPU, on a few numbers")
    options = parser.parse_args(argv)
    if options.commit:
        os.environ["BENCH_COMMIT"] = options.commit
    out = options.out.resolve()
    if (out / ROWS).exists():
        parser.error(f"{out / ROWS} is there already; name another folder, or move the file away")
    stages = [Stage(name, end, commands(work, out, options.rehearse)) for name, end, work in PLAN]
    has_gpu = run_stages(stages, out, options.seconds * PLAN[-1][1] / END, environment)
    if not has_gpu:
        print("there is no CUDA GPU here; --rehearse goes through everything on the CPU", file=sys.stderr)
        return 2
    print("", *summarise(read_rows(out / ROWS)), "", f"results: {out / ROWS}, what was printed: {out / LOG}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
