"""Everything that needs a GPU, in one command: the tests marked gpu, the machine's ceilings, the benchmarks' raw JSON.

    python -m bench.gpu_report [PART ...] [--limit SECONDS] [--out FOLDER] [--commit ID] [--dry-run]

Each part ends by its own time limit, and none begins after --limit; a benchmark that is stopped still writes what it
has. JSON goes to FOLDER/GPU-DATE-COMMIT-PART.json, logs beside it. Exits with 1 where a part failed or was left out.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench import machine

PYTEST = (sys.executable, "-m", "pytest")
GRACE = 45.0  # seconds a stopped part has to write its results


class Part(NamedTuple):
    """One command.

    Args:
        seconds: its time limit.
        json: its option that takes a file for its results; it then takes --time-limit and --commit too.
        hopper: whether the kernels for Hopper chips run where nothing is said of them (KERNELS_HOPPER).
    """

    command: tuple[str, ...]
    seconds: float
    json: str = ""
    hopper: bool = True


def benchmarks(file: str, seconds: float, *selected: str) -> Part:
    """The benchmarks of a file."""
    quiet = "-q", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=min", "--benchmark-warmup=off"
    return Part((*PYTEST, f"bench/{file}", *selected, *quiet), seconds, "--benchmark-json")


PARTS = {
    "tests": Part((*PYTEST, "tests", "-m", "gpu", "-q", "--ignore=tests/test_hopper.py"), 450, hopper=False),
    "hopper": Part((*PYTEST, "tests/test_hopper.py", "-m", "gpu", "-q"), 150),  # by itself: what hangs ends it
    "ceilings": Part((sys.executable, "-m", "bench.ceilings"), 60),
    "attention-forward": benchmarks("bench_attention.py", 420, "-m", "not short", "-k", "forward"),
    "attention-backward": benchmarks("bench_attention.py", 420, "-m", "not short", "-k", "backward"),
    "attention-short": benchmarks("bench_attention.py", 240, "-m", "short"),
    "layer-norm": benchmarks("bench_layer_norm.py", 240),
    "host": benchmarks("bench_host.py", 60),
    "no-loop": benchmarks("bench_no_loop.py", 60),
    "decoding": benchmarks("bench_decoding.py", 60),
    "training": benchmarks("bench_training.py", 120),
    "tuning": Part((sys.executable, "-m", "bench.tune"), 400, "--json"),
}


def stem(commit: str) -> str:
    """GPU-DATE-COMMIT, in letters that every file system takes."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", str(machine.describe()["gpu"] or "cpu")).strip("-").lower()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"{gpu}-{today}-{commit}"


def build_command(name: str, out: Path, commit: str, seconds: float) -> list[str]:
    """The command of a part that may take `seconds`."""
    part = PARTS[name]
    command = list(part.command)
    if part.json:
        file = out / f"{stem(commit)}-{name}.json"
        command += [f"{part.json}={file}", f"--time-limit={seconds:.0f}", f"--commit={commit}"]
    return command


def run(command: list[str], seconds: float, log: Path, hopper: bool) -> int:
    """The exit code of a command whose output goes to the terminal and to `log`; 124 where it had to be stopped."""
    environment = {"KERNELS_HOPPER": "01"[hopper], **os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes its report
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = 124
    print(log.read_text(errors="replace")[-20_000:], flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="for all parts together (480)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--commit", default=machine.commit(), metavar="ID", help="where git cannot tell it")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    out = options.out.resolve()
    if not options.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    started, codes = time.monotonic(), {}
    for name in options.parts or PARTS:
        seconds = min(PARTS[name].seconds, options.limit - (time.monotonic() - started) - GRACE)
        command = build_command(name, out, options.commit, max(seconds, 0.0))
        if options.dry_run:
            print(" ".join(command))
            continue
        if seconds <= 0:
            codes[name] = "left out, the time is used up"
            continue
        print(f"== {name}: {' '.join(command)}", flush=True)
        begun = time.monotonic()
        code = run(command, seconds, out / f"{stem(options.commit)}-{name}.log", PARTS[name].hopper)
        codes[name] = f"{'passed' if code == 0 else f'exit code {code}'} in {time.monotonic() - begun:.0f} s"
    for name, result in codes.items():
        print(f"{name:<20} {result}")
    return int(any(not result.startswith("passed") for result in codes.values()))


if __name__ == "__main__":
    sys.exit(main())
