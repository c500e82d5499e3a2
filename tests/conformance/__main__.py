"""`python -m tests.conformance`: which attention gets what right on this machine, and how exact each one is.

Every attention is judged in a process of its own; one that dies (a CUDA error, a crash) loses the check it was at, and
goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.conformance import (  # noqa: F401  (importing them enters their checks into the list)
    checks_behaviour,
    checks_features,
    checks_masks,
    checks_memory,
    checks_properties,
    checks_shapes,
    errors,
)
from tests.conformance.providers import PROVIDERS
from tests.conformance.registry import CHECKS, MATTERS, OURS, Check, Outcome, run

LOST = 77  # exit status of a worker that told its last outcome, but cannot go on
LEGEND = """\
pass    right                      FAIL    a wrong answer
raises  an error, no answer        crash   the process died        -  no such argument, or not for this device"""
LEGEND_OF_ERRORS = """\
Error against float64, forward / worst gradient. torch: by norm, in units in the last place. Others: as multiples of
torch's; ! is more than 2 times forward or 3 times for gradients. -: refused."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32, cuda bfloat16")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, help="default: all that this device has")
    parser.add_argument("--only", default="", help="checks with this text in their matter or name")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown, with links")
    parser.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    chosen = options.provider or PROVIDERS
    options.provider = [name for name in PROVIDERS if name in chosen and options.device in PROVIDERS[name].devices]
    return options


def selected(text: str) -> list[Check]:
    """The checks with this text in matter or name, in the order of the table."""
    wanted = [one for one in CHECKS if text in f"{one.matter}: {one.name}"]
    return sorted(wanted, key=lambda one: MATTERS.index(one.matter))


def work(options: argparse.Namespace) -> None:
    """Judge one attention: a line of JSON a check, then one an error."""
    provider = PROVIDERS[options.worker]
    attention = provider.load(options.device)
    dtype = getattr(torch, options.dtype)
    for one in selected(options.only)[options.skip :]:
        outcome = run(one, attention, options.device, dtype, provider.interpreted and options.device == "cpu")
        print(json.dumps(outcome), flush=True)
        if options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # after some errors CUDA works again in a new process only
                sys.exit(LOST)
    for case, each in cases(options):
        print(json.dumps(errors.measure(attention, case, each, options.device)), flush=True)


def cases(options: argparse.Namespace) -> list[tuple[str, torch.dtype]]:
    """The rows of the table of errors; none when only some checks were asked for."""
    return [] if options.only else [(case, dtype) for case in errors.CASES for dtype in errors.DTYPES]


def judge(name: str, options: argparse.Namespace) -> Iterator[list]:
    """What the workers of one attention print, one after the other until everything was tried."""
    arguments = ["--device", options.device, "--dtype", options.dtype, "--only", options.only]
    checks = len(selected(options.only))
    total, done = checks + len(cases(options)), 0
    while done < total:
        command = [sys.executable, "-m", "tests.conformance", "--worker", name, "--skip", str(done), *arguments]
        with tempfile.TemporaryFile("w+") as complaints:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=complaints, text=True, cwd=Path(__file__).parents[2]
            ) as worker:
                assert worker.stdout
                for line in worker.stdout:
                    if line.startswith(("[", "null")):  # and is not something a library says
                        yield json.loads(line)
                        done += 1
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or [""])[-1]
        if worker.returncode == LOST:
            continue
        if done < checks:
            yield list(Outcome("crash", f"the process ended with {worker.returncode}: {last}"))
            done += 1
        elif done < total:
            yield from [None] * (total - done)
            done = total


def source(one: Check, markdown: bool) -> str:
    """Where the check comes from; in Markdown with links (GitHub sends /issues/ on to a pull request)."""
    if one.source == OURS or not markdown:
        return one.source
    places = (place.split("#") for place in one.source.split(", "))
    return ", ".join(f"[{name}#{n}](https://github.com/{name}/issues/{n})" for name, n in places)


def show(rows: list[list[str]], markdown: bool) -> None:
    """Print a table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        if markdown:
            print("|", " | ".join(row), "|")
            if i == 0:
                print("|" + "---|" * len(row))
        else:
            print("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip())


def outcomes(found: dict[str, list], checks: list[Check], markdown: bool) -> list[list[str]]:
    """The first table: a row a check, under its matter with how many of its checks were passed."""
    rows = [["", *(PROVIDERS[name].title for name in found), *(["source"] if markdown else [])]]

    def passed(places: list[int]) -> list[str]:
        kinds = [[lines[i][0] for i in places] for lines in found.values()]
        return [f"{kind.count('pass')} / {len(kind) - kind.count('-')}" for kind in kinds] + [""] * markdown

    for matter in MATTERS:
        places = [i for i, one in enumerate(checks) if one.matter == matter]
        if places:
            rows.append([matter.upper(), *passed(places)])
        for i in places:
            kinds = [lines[i][0] for lines in found.values()]
            rows.append([checks[i].name, *kinds, *([source(checks[i], True)] if markdown else [])])
    rows.append(["PASSED / TRIED", *passed(list(range(len(checks))))])
    return rows


def exactness(found: dict[str, list], options: argparse.Namespace) -> list[list[str]]:
    """The second table: a row a case and dtype."""
    rows = [["", *(PROVIDERS[name].title for name in found)]]
    for i, (case, dtype) in enumerate(cases(options)):
        measured = {name: lines[i] and errors.Error(*lines[i]) for name, lines in found.items()}
        own = torch.nn.functional.scaled_dot_product_attention
        torchs = measured["torch"] if "torch" in found else errors.measure(own, case, dtype, options.device)
        cells = [errors.cell(error, torchs, name == "torch") for name, error in measured.items()]
        rows.append([f"{case}, {str(dtype).removeprefix('torch.')}", *cells])
    return rows


def main() -> None:
    """Judge every attention asked for, then print both tables and the reasons."""
    options = parse()
    if options.worker:
        return work(options)
    checks = selected(options.only)
    found: dict[str, list] = {}
    for name in options.provider:
        found[name] = []
        for line in judge(name, options):
            found[name].append(line)
            if sys.stderr.isatty():
                print(f"\r{PROVIDERS[name].title}: {len(found[name])}", end="", file=sys.stderr, flush=True)
        print(f"\r{PROVIDERS[name].title}: done", file=sys.stderr)

    print(f"torch {torch.__version__}, {options.device}, {options.dtype}\n{LEGEND}\n")
    show(outcomes(found, checks, options.markdown), options.markdown)
    if cases(options):
        print("\n" + LEGEND_OF_ERRORS + "\n")
        show(exactness({name: lines[len(checks) :] for name, lines in found.items()}, options), options.markdown)
    for name in found:
        reasons = [(one, line) for one, line in zip(checks, found[name]) if line[0] not in ("pass", "-")]
        if reasons:
            print(f"\n{PROVIDERS[name].title}")
        for one, (kind, message) in reasons:
            print(f"- {kind}: {one.name} ({source(one, options.markdown)})\n  {message}")


if __name__ == "__main__":
    main()
