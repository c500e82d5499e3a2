"""Rows of results, one JSON object a line, each written as soon as it is known: whatever stops a run, they are there.

A row's "kind" says what else is in it. "case" is what was at work, "problem" why it is not right (empty: it is), "work"
one of the pieces of work of bench/gpu_work.py, or a stage of a benchmark:

| kind | what it says |
|---|---|
| machine | GPU, driver, versions, commit |
| stage | what became of a command: passed, exit code, killed at its limit, left out; how often it started |
| compile | the kernels that a call launches were compiled (their hashes), in how many seconds; or why not |
| error | one tensor of a case: our distance from the exact result and PyTorch's, as shares of its norm; their ratio |
| verdict | whether a kernel passed all its cases |
| trying | a case is begun: one that has no other row has crashed |
| time | the median of "samples", in seconds, of a provider's call for a group; figures in "info" (the last counts) |
| refused, wrong, failed | why a provider is not timed: it does not take the work, its result is wrong, an error |
| tile | a candidate of a tile search: registers, bytes spilled, "seconds" of full and of causal attention |
| test | a test that did not pass, and why; with an empty "id", how many did so far |

Needs nothing but Python.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
RATES = "examples_per_second", "tflops_per_second", "gb_per_second"  # what a row is compared by, the first that it has

Row = dict[str, Any]


def write_row(path: Path, kind: str, **fields: Any) -> None:
    """Append a row in one write, so that rows of processes side by side do not mix, and hand it to the disk."""
    line = json.dumps({"kind": kind, **fields}) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a file; of one whose last line was cut off, those before. No file: none."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def newest_with(kind: str, folder: Path = RESULTS) -> Path | None:
    """The newest file with rows of a kind in a folder of results: bench.gpu_first alone has verdicts."""
    files = (path for path in folder.glob("*.jsonl") if any(row["kind"] == kind for row in read_rows(path)))
    return max(files, key=age, default=None)


def age(path: Path) -> tuple[list[str], str]:
    """What orders files of results, the oldest first: the date in the name, then the name."""
    return re.findall(r"\d{4}-\d\d-\d\d", path.name), path.name


def rate(row: Row) -> float:
    """What a timed row reached, larger is better: operations, bytes or examples a second, else calls a second."""
    info = row["info"]
    return next((info[name] for name in RATES if info.get(name)), 1 / row["seconds"])


def is_ours(provider: str) -> bool:
    """Whether a provider is this project's."""
    return provider.startswith(("kernels", "calcformer"))


def is_bound(provider: str) -> bool:
    """Whether a provider is a limit rather than a peer."""
    return provider == "device copy"


def by_group(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Timed rows by group and provider, the last of each."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "time":
            groups.setdefault(row["group"], {})[row["provider"]] = row
    return groups


def standings(rows: Sequence[Row]) -> list[tuple[float, str, str, str]]:
    """Of each group that has both: our best over the best peer's, group, who we are, who the peer is; losses first."""
    found = []
    for group, providers in by_group(rows).items():
        ours = [row for provider, row in providers.items() if is_ours(provider)]
        peers = [row for provider, row in providers.items() if not is_ours(provider) and not is_bound(provider)]
        if ours and peers:
            best, peer = max(ours, key=rate), max(peers, key=rate)
            found.append((rate(best) / rate(peer), group, best["provider"], peer["provider"]))
    return sorted(found)


def run_text(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def commit() -> str:
    """The commit that is checked out, with "-dirty" where tracked files differ; "unknown" without git.

    The environment variable BENCH_COMMIT says it for a copy without git.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    found = run_text("git", "rev-parse", "--short=12", "HEAD")
    dirty = found and run_text("git", "status", "--porcelain", "--untracked-files=no")
    return f"{found}-dirty" if dirty else found or "unknown"
