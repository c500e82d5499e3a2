"""README's GPU tables and its plot, from the raw JSON of the benchmarks.

    python -m bench.report [--results FOLDER] [--check]

Rewrites what stands between the two marks in README.md and draws bench/results/attention.png. --check changes nothing
and exits with 1 where README and JSON disagree. Of several results of a part the newest counts. Without any, README
says that no GPU has run the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"
PICTURE = "attention.png"
MARKS = "<!-- GPU results: python -m bench.report -->", "<!-- end of GPU results -->"
NOTHING = "No GPU has run them yet: until one has, this page shows no GPU number."


class Row(NamedTuple):
    """One provider's figures for one piece of work: what its benchmark calls extra_info."""

    group: str
    provider: str
    info: dict[str, Any]


class Result(NamedTuple):
    """One file of results: its rows, and the machine that made them."""

    name: str
    machine: dict[str, Any]
    rows: list[Row]


class Table(NamedTuple):
    """A table of README: the groups that a pattern matches, whose one group is the column; the figure in a cell."""

    title: str
    pattern: str
    figure: str


TABLES = [
    *(Table(f"Attention {direction}, D = {size}, {mask}, TFLOP/s by sequence length",
            rf"attention {direction} B\d+ H\d+ S(\d+) D{size} {mask} bf16", "tflops_per_second")
      for direction in ("forward", "backward") for size in (64, 128, 256) for mask in ("full", "causal")),
    *(Table(f"Short sequences {direction}, 32,768 heads of {size}, GB/s by sequence length",
            rf"attention {direction} B8192 H4 S(\d+) D{size} (?:full|causal) bf16", "gb_per_second")
      for direction in ("forward", "backward") for size in (16, 32, 64)),
    *(Table(f"{kind.capitalize()} {direction}, GB/s by row width", rf"{re.escape(kind)} {direction} M\d+ N(\d+) bf16",
            "gb_per_second")
      for kind in ("layer norm", "rms norm", "add + layer norm", "add + rms norm")
      for direction in ("forward", "backward")),
    Table("A training step of the S1 model, examples a second by batch", r"S1 training step B(\d+) fp32 on GPU",
          "examples_per_second"),
]  # fmt: skip
CURVES = "forward", 128  # direction and head size of the plot


def read_result(path: Path) -> Result:
    """A file that pytest-benchmark wrote; one of `bench.tune` has no rows."""
    content = json.loads(path.read_text())
    rows = [Row(entry["group"] or "", entry["extra_info"].get("provider", entry["name"]), entry["extra_info"])
            for entry in content.get("benchmarks", ())]  # fmt: skip
    return Result(path.name, content["machine_info"]["bench"], rows)


def read_results(folder: Path) -> list[Result]:
    """The newest GPU result of each part: files are named GPU-DATE-COMMIT-PART.json."""
    newest: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (re.findall(r"\d{4}-\d\d-\d\d", path.name), path.name)):
        result = read_result(path)
        match = re.search(r"\d{4}-\d\d-\d\d-[0-9a-z]+(?:-dirty)?-(.+)\.json$", path.name)
        if match and result.rows and result.machine["gpu"]:
            newest[match[1]] = result
    return list(newest.values())


def cells(table: Table, rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """The figures of a table, by provider and column."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        match = re.fullmatch(table.pattern, row.group)
        if match and table.figure in row.info:
            found.setdefault(row.provider, {})[int(match[1])] = row.info[table.figure]
    return found


def make_table(table: Table, rows: Iterable[Row]) -> list[str]:
    """A table in Markdown, the largest figure of each column in bold; no lines where there are no figures."""
    found = cells(table, rows)
    columns = sorted({column for figures in found.values() for column in figures})
    if not columns:
        return []
    best = {column: max(figures.get(column, 0.0) for figures in found.values()) for column in columns}
    heading = " | ".join([table.title, *(f"{column:,}" for column in columns)])
    lines = [f"| {heading} |", "|---" * (len(columns) + 1) + "|"]
    for provider, figures in found.items():
        texts = []
        for column in columns:
            text = f"{figures[column]:,.0f}" if column in figures else "–"
            texts.append(f"**{text}**" if column in figures and figures[column] == best[column] else text)
        lines.append(f"| {provider} | {' | '.join(texts)} |")
    return [*lines, ""]


def make_section(results: Sequence[Result]) -> str:
    """What README says of GPUs."""
    if not results:
        return NOTHING + "\n"
    machines = dict.fromkeys(
        f"{result.machine['gpu']}, PyTorch {result.machine['torch']}, Triton {result.machine['triton']}, "
        f"commit {result.machine['commit']}" for result in results
    )  # fmt: skip
    rows = [row for result in results for row in result.rows]
    lines = [f"Measured on {'; '.join(machines)}; raw figures in `bench/results/`.", ""]
    if plot_rows(rows):
        lines += [f"![attention in TFLOP/s by sequence length](bench/results/{PICTURE})", ""]
    for table in TABLES:
        lines += make_table(table, rows)
    return "\n".join(lines).rstrip() + "\n"


def plot_rows(rows: Iterable[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """The curves of the plot, by mask and provider."""
    direction, size = CURVES
    rows = list(rows)
    found = {mask: cells(Table("", rf"attention {direction} B\d+ H\d+ S(\d+) D{size} {mask} bf16",
                               "tflops_per_second"), rows) for mask in ("full", "causal")}  # fmt: skip
    return {mask: curves for mask, curves in found.items() if curves}


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
            axis.plot(lengths, [figures[n] for n in lengths], marker="o", label=provider, linewidth=3 if ours else 1.5,
                      zorder=3 if ours else 2)
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
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def replace_section(readme: str, section: str) -> str:
    """README with what stands between the marks replaced."""
    before, rest = readme.split(MARKS[0] + "\n")
    _, after = rest.split(MARKS[1] + "\n")
    return f"{before}{MARKS[0]}\n{section}{MARKS[1]}\n{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where README and JSON disagree")
    options = parser.parse_args(argv)
    results = read_results(options.results)
    old = options.readme.read_text()
    new = replace_section(old, make_section(results))
    if options.check:
        return int(new != old)
    options.readme.write_text(new)
    if plot_rows([row for result in results for row in result.rows]):
        draw(results, options.results / PICTURE)
    print(make_section(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
