"""What rows of results say, in few lines: what did not end, what is wrong, what was found, ours over the best peer."""

from __future__ import annotations

from collections.abc import Iterator

from bench.rows import Row, by_group, rate, standings

SPECIAL, GENERAL = ("kernels (hopper)", "kernels (short)"), "kernels (general)"
ENDED = "error", "time", "refused", "wrong", "failed"  # kinds of rows that end a case
GAIN = 1.03  # a tile that is this much faster is worth a line in the table


def summarise(rows: list[Row], file: str = "FILE") -> list[str]:
    """The lines; file: the name under which the rows will be kept."""
    return [*ends(rows), *verdicts(rows), *tests(rows), *tiles(rows, file), *comparisons(rows)]


def ends(rows: list[Row]) -> Iterator[str]:
    """Commands that did not end well, kernels that do not compile, cases that were begun and not finished."""
    machine = next((row for row in rows if row["kind"] == "machine"), None)
    if machine:
        where = machine["gpu"] or "a rehearsal on a CPU, whose times mean nothing"
        versions = f"torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}"
        yield f"{where}; {versions}"
    for row in rows:
        if row["kind"] == "stage" and row["result"] != "passed":
            yield f"{row['stage']}: {row['result']}  {row['command']}"
        elif row["kind"] == "compile":
            yield from (f"does not compile: {row['work']}, {row['case']}: {reason}" for reason in row["failures"])
        elif row["kind"] in ("wrong", "failed"):
            yield f"{row['kind'].upper()}, not timed: {row['case']}: {row['problem']}"
    ended = {row["case"] for row in rows if row["kind"] in ENDED}
    begun = [row["case"] for row in rows if row["kind"] == "trying"]
    yield from (f"BEGUN, NOT ENDED: {case}" for case in dict.fromkeys(begun) if case not in ended)
    compiled = [row for row in rows if row["kind"] == "compile"]
    if compiled:
        kernels = {name for row in compiled for name in row["kernels"]}
        yield f"{len(kernels)} kernels compiled in {sum(row['cpu_seconds'] for row in compiled):.0f} s of CPU time"


def verdicts(rows: list[Row]) -> Iterator[str]:
    """Which kernels are right."""
    for row in rows:
        if row["kind"] == "verdict":
            reasons = "; ".join(row["failed"][:3])
            skipped = reasons.startswith("not run")
            yield f"{row['kernel']}: {'right' if row['passed'] else reasons if skipped else 'NOT RIGHT: ' + reasons}"


def tests(rows: list[Row]) -> Iterator[str]:
    """What pytest found: counts so far, and failures."""
    found = [row for row in rows if row["kind"] == "test"]
    counts = [row for row in found if not row["id"]]
    if counts:
        told = (f"{number} {name}" for name, number in counts[-1].items() if name not in ("kind", "id"))
        yield f"tests: {', '.join(told)}"
    yield from (f"FAILED {row['id']}: {row['message']}" for row in found if row["id"])


def tiles(rows: list[Row], file: str) -> Iterator[str]:
    """Of each search the table's tile and the best one, and the line for kernels/attention/measured.py."""
    searches: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "tile":
            searches.setdefault(row["search"], []).append(row)
    for name, tries in searches.items():
        timed = {tuple(row["tile"].values()): sum(row["seconds"].values()) for row in tries if not row["problem"]}
        own = next((tuple(row["tile"].values()) for row in tries if row["is_own"]), None)
        if own not in timed or not timed[own]:
            yield f"tiles of {name}: {len(tries)} compiled, the table's not timed"
            continue
        best = min(timed, key=lambda tile: timed[tile])
        gain = timed[own] / timed[best]
        yield (
            f"tiles of {name}: {'x'.join(map(str, own))} in the table, best {'x'.join(map(str, best))}, "
            f"{gain:.2f} of its speed, of {len(tries)}"
        )
        if gain >= GAIN:
            words = name.split()
            if words[0] == "short":
                entry = f'SHORT_TILES: ("{words[1]}", {words[2][1:]}, {words[3][1:]})'
            else:
                asked = words[-1] if words[-1] in ("causal", "dropout") else "plain"
                entry = f'TILES: ("{words[0]}", 90, {words[1][1:]}, "{asked}")'
            yield f'    in measured.py, {entry}: ({best}, "{file}"),'


def comparisons(rows: list[Row]) -> Iterator[str]:
    """Our rate over the best peer's, the worst first; then those of our special kernels over our general one's."""
    groups, compared = by_group(rows), standings(rows)
    if groups:
        yield "ours over the best peer:"
    for ratio, group, ours, peer in compared:
        yield f"{ratio:6.2f}  {group}: {ours} against {peer}"
    for group in sorted(set(groups) - {group for _, group, _, _ in compared}):
        yield f"     –  {group}: only {', '.join(groups[group])}"
    pairs = [
        (group, name, providers)
        for group, providers in groups.items()
        for name in SPECIAL
        if name in providers and GENERAL in providers
    ]
    if pairs:
        yield "our special kernels over our general one:"
    for group, name, providers in pairs:
        yield f"{rate(providers[name]) / rate(providers[GENERAL]):6.2f}  {group}: {name}"
