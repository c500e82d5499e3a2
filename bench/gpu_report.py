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
    """One command. seconds: its time limit; is_bench: whether it takes --benchmark-json and --time-limit."""

    command: tuple[str, ...]
    seconds: float
    is_bench: bool = False


PARTS = {
    "tests": Part((*PYTEST, "tests", "-m", "gpu", "-q", "--ignore=tests/test_hopper.py"), 450),
    "hopper": Part((*PYTEST, "tests/test_hopper.py", "-m", "gpu", "-q"), 150),  # by itself: what hangs ends it
    "ceilings": Part((sys.executable, "-m", "bench.ceilings"), 60),
    "attention-forward": Part((*PYTEST, "bench/bench_attention.py", "-m", "not short", "-k", "forward"), 420, True),
    "attention-backward": Part((*PYTEST, "bench/bench_attention.py", "-m", "not short", "-k", "backward"), 420, True),
    "attention-short": Part((*PYTEST, "bench/bench_attention.py", "-m", "short"), 240, True),
    "layer-norm": Part((*PYTEST, "bench/bench_layer_norm.py"), 240, True),
    "host": Part((*PYTEST, "bench/bench_host.py"), 60, True),
    "no-loop": Part((*PYTEST, "bench/bench_no_loop.py"), 60, True),
    "decoding": Part((*PYTEST, "bench/bench_decoding.py"), 60, True),
    "training": Part((*PYTEST, "bench/bench_training.py"), 120, True),
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
    if part.is_bench:
        json = out / f"{stem(commit)}-{name}.json"
        command += [f"--benchmark-json={json}", f"--time-limit={seconds:.0f}", f"--commit={commit}", "-q",
                    "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=min", "--benchmark-warmup=off"]
    return command


def run(command: list[str], seconds: float, log: Path) -> int:
    """The exit code of a command whose output goes to the terminal and to `log`; 124 where it had to be stopped."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "KERNELS_HOPPER": "1"}
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
        code = run(command, seconds, out / f"{stem(options.commit)}-{name}.log")
        codes[name] = f"{'passed' if code == 0 else f'exit code {code}'} in {time.monotonic() - begun:.0f} s"
    for name, result in codes.items():
        print(f"{name:<20} {result}")
    return int(any(not result.startswith("passed") for result in codes.values()))


if __name__ == "__main__":
    sys.exit(main())
