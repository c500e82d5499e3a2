"""What bench/results says, in words: rows of bench.gpu_first, and JSON of pytest-benchmark.

    python -m bench.report [--results FOLDER] [--check]

Rewrites what stands between the two marks in README.md, a line for each table, and in docs/measured.md, all of them,
and draws bench/results/attention.png. --check changes nothing and exits with 1 where one of them and the results
disagree. Of several results of the same work the newest counts. Without any, they say that no GPU has run them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.benchmark import Table, benchmarks
from bench.rows import RESULTS, ROOT, age, is_bound, is_ours, read_rows, standings

PICTURE, PAGE = "attention.png", "docs/measured.md"
OTHERS = "FlashAttention", "Liger", "QuACK"  # peers that do not come with PyTorch
MARKS = "<!-- GPU results: python -m bench.report -->", "<!-- end of GPU results -->"
NOTHING = "No GPU has run them yet: until one has, this page shows no GPU number."


class Row(NamedTuple):
    """One provider's figures for one piece of work, and the seconds that it took."""

    group: str
    provider: str
    info: dict[str, Any]
    seconds: float


class Result(NamedTuple):
    """One file of results: its rows, and the machine that made them."""

    name: str
    machine: dict[str, Any]
    rows: list[Row]


CURVES = "forward", 128  # direction and head size of the plot


def read_result(path: Path) -> Result:
    """A file of bench.gpu_first, bench.gpu_second or pytest-benchmark."""
    if path.suffix == ".jsonl":
        content = read_rows(path)
        machine = next((row for row in content if row["kind"] == "machine"), {"gpu": ""})
        timed = (row for row in content if row["kind"] == "time")
        rows = [Row(row["group"], row["provider"], row["info"], row["seconds"]) for row in timed]
        return Result(path.name, machine, rows)
    report = json.loads(path.read_text())
    rows = [
        Row(
            entry["group"] or "",
            entry["extra_info"].get("provider", entry["name"]),
            entry["extra_info"],
            entry["stats"]["median"],
        )
        for entry in report["benchmarks"]
    ]
    return Result(path.name, report["machine_info"]["bench"], rows)


def read_results(folder: Path) -> list[Result]:
    """All results of a GPU, each with those of its rows that count; others are named on standard error.

    Of each group the newest run counts; from older ones on the same GPU only peers that it left out.
    """
    paths = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")], key=age)
    found = list(map(read_result, paths))
    for result in found:
        if not result.machine["gpu"]:
            print(f"left out, since no GPU made it: {folder / result.name}", file=sys.stderr)
    results = [result for result in found if result.rows and result.machine["gpu"]]
    counting: dict[str, dict[str, str]] = {}  # the file, by group and provider
    gpus = {result.name: result.machine["gpu"] for result in results}
    for result in results:
        for group in {row.group for row in result.rows}:
            older = counting.get(group, {})
            counting[group] = {
                provider: file
                for provider, file in older.items()
                if not is_ours(provider) and gpus[file] == result.machine["gpu"]
            }
        for row in result.rows:
            counting[row.group][row.provider] = result.name
    for place, result in enumerate(results):
        rows = [row for row in result.rows if counting[row.group].get(row.provider) == result.name]
        results[place] = result._replace(rows=rows)
    return [result for result in results if result.rows]


Column = int | str
Figures = dict[str, dict[Column, float]]  # by provider and column


def cells(table: Table, rows: Iterable[Row]) -> Figures:
    """The figures of a table."""
    found: Figures = {}
    for row in rows:
        match = re.fullmatch(table.pattern, row.group)
        if match and table.figure in row.info:
            column: Column = int(match[1]) if match[1].isdigit() else match[1]
            found.setdefault(row.provider, {})[column] = row.info[table.figure]
    return found


def make_table(table: Table, rows: Iterable[Row]) -> list[str]:
    """A table in Markdown, the largest figure of each column in bold, but for limits; no lines without figures."""
    found = cells(table, rows)
    columns = sorted({column for figures in found.values() for column in figures}, key=lambda x: (str(type(x)), x))
    if not columns:
        return []
    compared = [figures for provider, figures in found.items() if not is_bound(provider)]
    best = {column: max((figures.get(column, 0.0) for figures in compared), default=0.0) for column in columns}
    heading = " | ".join([table.title, *(f"{column:,}" if isinstance(column, int) else column for column in columns)])
    lines = [f"| {heading} |", "|---" * (len(columns) + 1) + "|"]
    for provider, figures in found.items():
        texts = []
        for column in columns:
            text = f"{figures[column]:,.0f}" if column in figures else "–"
            texts.append(f"**{text}**" if column in figures and figures[column] == best[column] else text)
        lines.append(f"| {provider} | {' | '.join(texts)} |")
    return [*lines, ""]


def measured_on(results: Sequence[Result]) -> str:
    """The machines of some results, in words."""
    machines = dict.fromkeys(
        f"{result.machine['gpu']}, PyTorch {result.machine['torch']}, Triton {result.machine['triton']}"
        for result in results
    )
    commits = dict.fromkeys(result.machine["commit"] for result in results)
    peers = dict.fromkeys(filter(None, (result.machine.get("peers") for result in results)))
    beside = f", beside {'; '.join(peers)}" if peers else ""
    return f"Measured on {'; '.join(machines)}{beside}, at {' and '.join(commits)}"


def make_section(results: Sequence[Result]) -> str:
    """What docs/measured.md says of GPUs: every table, and every loss."""
    if not results:
        return NOTHING + "\n"
    rows = [row for result in results for row in result.rows]
    lines = [f"{measured_on(results)}; raw figures in bench/results.", ""]
    for benchmark in benchmarks().values():
        for table in benchmark.tables:
            lines += make_table(table, rows)
    return "\n".join([*lines, *losses(rows)]).rstrip() + "\n"


def make_summary(results: Sequence[Result]) -> str:
    """What README says of GPUs: for each table how many times as fast as PyTorch and as all peers ours is; the plot."""
    if not results:
        return NOTHING + "\n"
    rows = [row for result in results for row in result.rows]
    lines = [f"{measured_on(results)}. How many times as fast as a peer, from the worst to the best of the shapes:", ""]
    lines += ["| ours | PyTorch's fastest | the fastest of all |", "|---|---|---|"]
    every = timed(rows)
    pytorchs = [row for row in every if not row["provider"].startswith(OTHERS)]
    for benchmark in benchmarks().values():
        for table in benchmark.tables:
            columns = [times(table, standings(among)) for among in (pytorchs, every)]
            if any(columns):
                title = re.sub(r",? (TFLOP/s|GB/s|examples a second).*", "", table.title)
                lines.append(f"| {title} | {' | '.join(columns)} |")
    picture = ["", f"![attention in TFLOP/s by sequence length](bench/results/{PICTURE})"] if plot_rows(rows) else []
    return "\n".join(
        [*lines, *picture, "", f"All figures, and each shape at which a peer is faster: [{PAGE}]({PAGE}).\n"]
    )


def times(table: Table, ratios: Iterable[tuple[float, str, str, str]]) -> str:
    """How many times as fast ours is over a table's shapes, and than whom at the worst; empty without any."""
    found = sorted((ratio, peer) for ratio, group, _, peer in ratios if re.fullmatch(table.pattern, group))
    if not found:
        return ""
    (low, peer), (high, _) = found[0], found[-1]
    return f"{low:.2f} ({peer})" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} ({peer}) to {high:.2f}"


def timed(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as `standings` takes them."""
    return [{"kind": "time", **row._asdict()} for row in rows]


def losses(rows: Iterable[Row]) -> list[str]:
    """A list in Markdown of what a peer does faster, the worst first."""
    behind = [found for found in standings(timed(rows)) if found[0] < 0.995]
    lines = [f"- {group}: {ours} has {ratio:.2f} of the rate of {peer}" for ratio, group, ours, peer in behind]
    return ["Where a peer is faster:", "", *lines, ""] if lines else []


def plot_rows(rows: Iterable[Row]) -> dict[str, Figures]:
    """The curves of the plot, by mask and provider; none of a mask of which one length was measured."""
    direction, size = CURVES
    rows = list(rows)
    found = {
        mask: cells(
            Table("", rf"attention {direction} B\d+ H\d+ S(\d+) D{size} {mask} bf16", "tflops_per_second"), rows
        )
        for mask in ("full", "causal")
    }
    return {mask: curves for mask, curves in found.items() if any(len(figures) > 1 for figures in curves.values())}


def draw(results: Sequence[Result], path: Path) -> None:
    """TFLOP/s by sequence length: ours against each peer, with the rate of a plain matrix product."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for result in results for row in result.rows]
    plots = plot_rows(rows)
    figure, axes = pyplot.subplots(1, len(plots), figsize=(6.4 * len(plots), 4.4), sharey=True, squeeze=False)
    ceiling = max((row.info.get("ceiling_tflops_per_second", 0.0) for row in rows if "bf16" in row.group), default=0.0)
    for axis, (mask, curves) in zip(axes[0], plots.items()):
        for provider, figures in curves.items():
            lengths = sorted(figures)
            ours = provider.startswith("kernels")
            axis.plot(
                lengths,
                [figures[n] for n in lengths],
                marker="o",
                label=provider,
                linewidth=3 if ours else 1.5,
                zorder=3 if ours else 2,
            )
        if ceiling:
            axis.axhline(ceiling, color="black", linestyle=":", label="matrix product")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({n for figures in curves.values() for n in figures}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("sequence length")
        axis.set_title(f"attention {CURVES[0]}, D = {CURVES[1]}, {mask}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def replace_section(text: str, section: str) -> str:
    """A text with what stands between the marks replaced."""
    before, rest = text.split(MARKS[0] + "\n")
    _, after = rest.split(MARKS[1] + "\n")
    return f"{before}{MARKS[0]}\n{section}{MARKS[1]}\n{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where they and the results disagree")
    options = parser.parse_args(argv)
    results, differ = read_results(options.results), 0
    for name, section in ("README.md", make_summary(results)), (PAGE, make_section(results)):
        path = options.root / name
        old = path.read_text()
        new = replace_section(old, section)
        if new != old and options.check:
            print(f"{path} does not say what {options.results} holds: run python -m bench.report")
            differ = 1
        elif not options.check:
            path.write_text(new)
    if options.check:
        return differ
    if plot_rows([row for result in results for row in result.rows]):
        draw(results, options.results / PICTURE)
    print(make_section(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
