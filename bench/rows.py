"""Rows of results, one JSON object a line, each written as soon as it is known: whatever stops a run, they are there.

A row's "kind" says what else is in it:

| kind | what it says |
|---|---|
| machine | GPU, driver, versions, commit |
| stage | what became of a command: passed, failed, killed at its limit, left out |
| compile | a call's kernels were compiled: how many, in how many seconds; or why not |
| ceiling | what a copy and a matrix product reach |
| error | one tensor of a case: our error, PyTorch's, and whether ours is within the tolerance |
| verdict | whether a kernel passed all its cases |
| trying | a case is begun: one that has no other row has crashed |
| time | a provider's figures for one piece of work (the last one counts) |
| refused, wrong, failed | why a provider is not timed: it does not take the work, its result is wrong, an error |
| tile | a candidate of a tile search |
| test | a test that did not pass, and why; at the end, how many did |

Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import re
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


def newest_results(folder: Path = RESULTS) -> Path | None:
    """The newest rows in a folder of results, by their names GPU-DATE-COMMIT.jsonl."""
    return max(folder.glob("*.jsonl"), key=age, default=None)


def age(path: Path) -> tuple[list[str], str]:
    """What orders files of results, the oldest first: the date in the name, then the name."""
    return re.findall(r"\d{4}-\d\d-\d\d", path.name), path.name


def rate(row: Row) -> float:
    """What a timed row reached, larger is better: operations, bytes or examples a second, else calls a second."""
    info = row["info"]
    return next((info[name] for name in RATES if info.get(name)), 1 / row["seconds"])


def is_ours(row: Row) -> bool:
    """Whether a timed row is this project's."""
    return str(row["provider"]).startswith(("kernels", "calcformer"))


def is_bound(row: Row) -> bool:
    """Whether a timed row is a limit rather than a peer."""
    return row["provider"] == "device copy"


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
        ours = [row for row in providers.values() if is_ours(row)]
        peers = [row for row in providers.values() if not is_ours(row) and not is_bound(row)]
        if ours and peers:
            best, peer = max(ours, key=rate), max(peers, key=rate)
            found.append((rate(best) / rate(peer), group, best["provider"], peer["provider"]))
    return sorted(found)
