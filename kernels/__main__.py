"""python -m kernels: what runs on this machine, whether it is right, and how fast. Exit code 1: something is wrong."""

from __future__ import annotations

import argparse
import json
import sys

import torch

try:
    from kernels import selfcheck
    from kernels.backend import INTERPRETED
except ImportError as error:  # another package replaced a part of this one: kernels/ours.py
    sys.exit(str(error))


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 0 where all is right, 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels",
        description="Say which kernels run on this machine and why others do not, hold each to float64, and time it "
        "beside PyTorch's own. Exit code 1: something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, when all is done")
    as_json = parser.parse_args(arguments).json

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    device = selfcheck.device_to_check()
    machine, why_not = selfcheck.machine(device), selfcheck.availability(device)
    for name, text in machine.items():
        say(f"{name:>16}  {text}")
    say("\nWhat can run here")
    for name, reason in why_not.items():
        say(f"  {name}: {f'no, {reason}' if reason else 'yes'}")
    say(f"\nError against float64 over PyTorch's own, allowed {selfcheck.ALLOWED:g}")
    done = []
    for check in selfcheck.checks(device):
        done.append(check)
        error = "    -" if check.error is None else f"{check.error:5.2f}"
        say(f"  {'WRONG' if check.what_failed else 'right'} {error}  {check.name}, by {check.kernel}")
        if check.what_failed:
            say(f"               {check.what_failed}")
    say(f"\nMilliseconds of forward and backward, ours, PyTorch's ({torch.get_num_threads()} threads, an idle machine)")
    if INTERPRETED:
        say("  not measured: Triton's interpreter says nothing about time")
    times = []
    for timing in [] if INTERPRETED else selfcheck.timings(device):
        times.append(timing)
        say(f"  {timing['ours_ms']:9.3f} {timing['pytorch_ms']:9.3f}  {timing['name']}")
    wrong = [f"{check.name}, by {check.kernel}" for check in done if check.what_failed]
    say(f"\nWRONG, {len(wrong)} of {len(done)}: {'; '.join(wrong)}" if wrong else f"\nAll {len(done)} are right.")
    if as_json:
        found = {"machine": machine, "why_not": why_not, "checks": [check._asdict() for check in done]}
        print(json.dumps({**found, "times": times, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
