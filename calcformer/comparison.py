"""The runs of a sweep side by side: as numbers, as a table and as a picture."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from calcformer.plots import Line, is_loss, save_panels
from calcformer.runs.folder import METRICS
from calcformer.runs.run_log import RunLog
from calcformer.settings import TaskSettings
from calcformer.solver import Solver
from calcformer.studies import STUDIES, Member, Sweep
from calcformer.training import measure

__all__ = ["draw", "make_table", "summarize"]


def label_figures(data: TaskSettings) -> dict[str, str]:
    """What the columns of the table are called, by the names of metrics.jsonl; the one that counts last but one."""
    held_out = dict(reversed(data.figures.items()))
    if "valid_loss" in held_out:
        held_out["valid_loss"] = "validation loss"
    return {"loss": "training loss", **held_out, "seconds": "seconds"}


def measure_member(folder: Path, member: Member, study: str | None) -> dict[str, Any]:
    """The last figures of a finished run, and its answers to the questions of the study."""
    entries = RunLog(folder / member.name / METRICS).read()
    last = entries[-1] if entries else {}  # of a log that was lost
    figures = {**last, "seconds": sum(entry.get("seconds", 0.0) for entry in entries)}
    answers: dict[str, str] = {}
    if study is not None:
        solver = Solver(folder / member.name, member.config.training.device)
        questions = STUDIES[study].questions
        answers = dict(zip(questions, solver.solve(questions)))
        if STUDIES[study].measure_training:
            examples = solver.task.split()[0].to(solver.device)
            figures |= measure(solver.model, examples, solver.task, member.config.data.figures)
    shown = {name: figures[name] for name in label_figures(member.config.data) if name in figures}
    return {"figures": shown, "answers": answers}


def summarize(folder: Path, sweep: Sweep, failed: dict[str, str]) -> dict[str, Any]:
    """What results.json holds."""
    reports = [] if sweep.study is None else STUDIES[sweep.study].reported
    labels = label_figures(sweep.base.data)
    rows = []
    for values, members in itertools.groupby(sweep.members(), key=lambda member: member.values):
        runs: list[dict[str, Any]] = [
            {"run": member.name, "failed": failed[member.name]}
            if member.name in failed
            else {"run": member.name, **measure_member(folder, member, sweep.study)}
            for member in members
        ]
        figures = [run["figures"] for run in runs if "figures" in run]
        found = {name: [each[name] for each in figures if name in each] for name in labels}
        mean, spread = (
            {name: function(values) for name, values in found.items() if len(values) >= least}
            for function, least in ((statistics.fmean, 1), (statistics.stdev, 2))
        )
        reported = next((theirs for place, theirs in reports if place.items() <= values.items()), {})
        rows.append({"values": values, "mean": mean, "spread": spread, "reported": reported, "runs": runs})
    main = next(iter(sweep.base.data.figures))
    plan = {"study": sweep.study, "vary": sweep.vary, "seeds": sweep.seeds}
    return {**plan, "figures": labels, "main": main, "rows": rows}


def _report(results: dict[str, Any]) -> str:
    """The report that a study is of, such as S0."""
    return (results["study"] or "").split("-")[0].upper()


def _measures_training(results: dict[str, Any]) -> bool:
    return results["study"] is not None and STUDIES[results["study"]].measure_training


def best_row(results: dict[str, Any]) -> dict[str, Any] | None:
    """The row that is best by the figure that counts, of equal ones by validation loss; None of one row."""
    main = results["main"]
    rows = [row for row in results["rows"] if row["mean"].keys() >= {main, "valid_loss"}]
    if len(results["rows"]) < 2 or not rows:
        return None
    sign = -1 if is_loss(main) else 1
    return max(rows, key=lambda row: (sign * row["mean"][main], -row["mean"]["valid_loss"]))


def make_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table that reads well unrendered too, and notes below it."""
    rows, report, best, labels = results["rows"], _report(results), best_row(results), results["figures"]
    reported = [name for name in labels if any(name in row["reported"] for row in rows)]
    questions = STUDIES[results["study"]].questions if results["study"] else ()
    lines = [
        [
            *(name.replace("_", " ") for name in results["vary"]),
            *labels.values(),
            *(f"{report} {labels[name]}" for name in reported),
            *questions,
        ]
    ]
    for row in rows:
        cells = [f"**{value}**" if row is best else str(value) for value in row["values"].values()]
        for name in labels:
            digits = 1 if name == "seconds" else 4
            text = f"{row['mean'][name]:.{digits}f}" if name in row["mean"] else "–" if row["mean"] else "failed"
            cells.append(f"{text} ± {row['spread'][name]:.{digits}f}" if name in row["spread"] else text)
        cells += [str(row["reported"].get(name, "")) for name in reported]
        cells += [
            ", ".join(run["answers"][question] for run in row["runs"] if "answers" in run) for question in questions
        ]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    notes = ["Token accuracy counts single tokens, the end token too, given the right ones before."]
    if best:
        notes.insert(0, f"Best by {labels[results['main']]}: {_label(best['values'])}.")
    if results["seeds"] > 1:
        notes.append(f"Mean and standard deviation of {results['seeds']} training seeds.")
    if _measures_training(results):
        notes.append("Validated on the problems trained on.")
    notes += [f"{run['run']} failed: {run['failed']}" for row in rows for run in row["runs"] if "failed" in run]
    table = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths))} |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in notes), ""])


def _by_setting(axis: str, name: str, results: dict[str, Any]) -> list[Line]:
    """A figure by the values of one setting: a line for each combination of the others, and one for the report."""
    series: dict[str, list[dict[str, Any]]] = {}
    rows = sorted(results["rows"], key=lambda row: row["values"][axis])
    for row in rows:
        series.setdefault(_label({key: value for key, value in row["values"].items() if key != axis}), []).append(row)
    lines = [
        Line(
            label or "ours",
            [
                (row["values"][axis], row["mean"][name], row["spread"].get(name, 0.0))
                for row in members
                if name in row["mean"]
            ],
            f"C{number}",
        )
        for number, (label, members) in enumerate(series.items())
    ]
    reported = {row["values"][axis]: row["reported"][name] for row in rows if name in row["reported"]}
    return [*lines, Line(_report(results), [(x, y, 0.0) for x, y in reported.items()], "black", reported=True)]


def _by_epoch(folder: Path, name: str, results: dict[str, Any]) -> list[Line]:
    """A figure by epoch: a line for each row of the table, and the report's figure at the end of it."""
    lines = []
    for number, row in enumerate(results["rows"]):
        logs = [RunLog(folder / run["run"] / METRICS).read() for run in row["runs"] if "figures" in run]
        points = []
        for entries in zip(*logs):  # one epoch, of all seeds
            values = [entry[name] for entry in entries if name in entry]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((entries[0]["epoch"], statistics.fmean(values), spread))
        if points and _measures_training(results) and name != "loss":  # which the log does not
            points = [(points[-1][0], row["mean"][name], row["spread"].get(name, 0.0))]
        label = _label(row["values"]) + (" (best)" if row is best_row(results) else "")
        lines.append(Line(label or "ours", points, f"C{number}"))
        if points and name in row["reported"]:
            lines.append(
                Line(
                    f"{_report(results)} {label}".strip(),
                    [(points[-1][0], row["reported"][name], 0.0)],
                    f"C{number}",
                    reported=True,
                )
            )
    return lines


def _label(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def draw(results: dict[str, Any], folder: Path, path: Path) -> bool:
    """The results as a picture; returns False where matplotlib is not installed."""
    axis = next(
        (
            name
            for name, values in results["vary"].items()
            if len(values) > 1 and all(type(value) in (int, float) for value in values)
        ),
        None,
    )
    title = results["study"] or folder.resolve().name
    figures = {name: panel for name, panel in results["figures"].items() if name != "seconds"}
    if axis is None:
        return save_panels(
            {panel: _by_epoch(folder, name, results) for name, panel in figures.items()}, "epoch", title, path
        )
    best = best_row(results)
    return save_panels(
        {panel: _by_setting(axis, name, results) for name, panel in figures.items()},
        axis.replace("_", " "),
        title,
        path,
        sorted(results["vary"][axis]),
        best["values"][axis] if best else None,
    )
