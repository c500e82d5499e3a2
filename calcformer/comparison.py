"""The runs of a sweep side by side: as numbers, as a table and as a picture."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from calcformer.plots import Line, save_panels
from calcformer.runs.folder import METRICS
from calcformer.runs.run_log import RunLog
from calcformer.settings import TaskSettings, is_loss
from calcformer.solver import Solver
from calcformer.studies import STUDIES, Member, Sweep
from calcformer.training import measure

__all__ = ["draw", "make_table", "summarize"]

START, CONVERGENCE = "start", "convergence"  # figures that metrics.jsonl does not name
ROUNDING = 1e-6  # of an accuracy, a quotient of numbers in float32
WIDTH = 80  # characters of a table, beyond which it is several


def label_figures(data: TaskSettings, epochs: Iterable[int] = (), reported: Iterable[str] = ()) -> dict[str, str]:
    """What the columns of the table are called, by the names of metrics.jsonl; the one that counts last but one.

    Where the best possible figures are known, with the mean loss of the first epoch, that at the end of those `epochs`,
    and the first epoch at whose end the figure that counts was the best possible. The accuracy of training stands there
    where it is `reported`.
    """
    measured = dict(reversed(data.figures.items()))
    if data.best_possible:
        losses = {f"valid_loss@{epoch}": f"loss after {epoch}" for epoch in epochs}
        return {START: "loss in epoch 1", **losses, **measured, CONVERGENCE: "convergence", "seconds": "seconds"}
    if "valid_loss" in measured:
        measured["valid_loss"] = "validation loss"
    if "token_accuracy" in reported:
        measured = {"token_accuracy": "training token accuracy", **measured}
    return {"loss": "training loss", **measured, "seconds": "seconds"}


def add_convergence(figures: dict[str, Any], entries: list[dict[str, Any]], data: TaskSettings) -> None:
    """Add what `label_figures` says of data whose best possible figures are known."""
    main, best = next(iter(data.figures)), data.best_possible
    figures |= {f"valid_loss@{entry['epoch']}": entry["valid_loss"] for entry in entries if "valid_loss" in entry}
    if entries and entries[0]["epoch"] == 1:
        figures[START] = entries[0]["loss"]
    for entry in reversed(entries):
        if main in entry and abs(entry[main] - best[main]) < ROUNDING:
            figures[CONVERGENCE] = entry["epoch"]


def measure_member(folder: Path, member: Member, study: str | None, labels: Iterable[str]) -> dict[str, Any]:
    """The last figures, as far as there are `labels`, of a finished run, and its answers to the study's questions."""
    entries = RunLog(folder / member.name / METRICS).read()
    last = entries[-1] if entries else {}  # of a log that was lost
    figures = {**last, "seconds": sum(entry.get("seconds", 0.0) for entry in entries)}
    answers: dict[str, str] = {}
    if member.config.data.best_possible:
        add_convergence(figures, entries, member.config.data)
    questions, measures_training = (STUDIES[study].questions, STUDIES[study].measure_training) if study else ((), False)
    if questions or measures_training:
        solver = Solver(folder / member.name, member.config.training.device)
        answers = dict(zip(questions, solver.solve(questions)))
        if measures_training:
            examples = solver.task.split()[0].to(solver.device)
            figures |= measure(solver.model, examples, solver.task, member.config.data.figures)
    return {"figures": {name: figures[name] for name in labels if name in figures}, "answers": answers}


def summarize(folder: Path, sweep: Sweep, failed: dict[str, str]) -> dict[str, Any]:
    """What results.json holds."""
    reports = [] if sweep.study is None else STUDIES[sweep.study].reported
    epochs = STUDIES[sweep.study].epochs if sweep.study else ()
    epochs = tuple(epoch for epoch in epochs if epoch < sweep.base.training.epochs)
    labels = label_figures(sweep.base.data, epochs, {name for _, theirs in reports for name in theirs})
    rows = []
    for values, group in itertools.groupby(sweep.members(), key=lambda member: member.values):
        members = list(group)
        runs: list[dict[str, Any]] = [
            {"run": member.name, "failed": failed[member.name]}
            if member.name in failed
            else {"run": member.name, **measure_member(folder, member, sweep.study, labels)}
            for member in members
        ]
        figures = [run["figures"] for run in runs if "figures" in run]
        found = {name: [each[name] for each in figures if name in each] for name in labels}
        mean, spread = (
            {name: function(values) for name, values in found.items() if len(values) >= least}
            for function, least in ((statistics.fmean, 1), (statistics.stdev, 2))
        )
        reported = next((theirs for place, theirs in reports if place.items() <= values.items()), {})
        row = {"values": values, "mean": mean, "spread": spread, "reported": reported, "runs": runs}
        if best := members[0].config.data.best_possible:
            row |= {"best": best, "earliest": min(found[CONVERGENCE], default=None)}
        rows.append(row)
    main = next(iter(sweep.base.data.figures))
    plan = {"study": sweep.study, "vary": sweep.axes, "cases": sweep.cases, "seeds": sweep.seeds}
    return {**plan, "figures": labels, "main": main, "rows": rows}


def _beside(name: str, results: dict[str, Any]) -> list[list[str]]:
    """The columns that stand beside a figure: what is best possible, where that is known, and the report's."""
    rows, columns = results["rows"], []
    if name == CONVERGENCE:
        columns.append(["earliest", *(str(row["earliest"] or "–") for row in rows)])
        converged = [sum(name in run.get("figures", {}) for run in row["runs"]) for row in rows]
        columns.append(["runs", *(f"{count} of {len(row['runs'])}" for count, row in zip(converged, rows))])
    elif any(name in row.get("best", {}) for row in rows):
        columns.append(["floor" if is_loss(name) else "best possible", *(f"{row['best'][name]:.4f}" for row in rows)])
    if any(name in row["reported"] for row in rows):
        columns.append([_report(results), *(str(row["reported"].get(name, "")) for row in rows)])
    return columns


def _report(results: dict[str, Any]) -> str:
    """The report that a study is of, such as S0."""
    return (results["study"] or "").split("-")[0].upper()


def _measures_training(results: dict[str, Any]) -> bool:
    return results["study"] is not None and STUDIES[results["study"]].measure_training


def deciding(results: dict[str, Any]) -> str:
    """By which a row is best: the figure that counts, but bits a character where tokens may differ in length."""
    return "bits_per_character" if "bits_per_character" in results["figures"] else results["main"]


def best_row(results: dict[str, Any]) -> dict[str, Any] | None:
    """The row that is best by `deciding`, of equal ones by validation loss; None of one row."""
    main = deciding(results)
    rows = [row for row in results["rows"] if row["mean"].keys() >= {main, "valid_loss"}]
    if len(results["rows"]) < 2 or not rows or "best" in rows[0]:  # of which there is a different one for some rows
        return None
    sign = -1 if is_loss(main) else 1
    return max(rows, key=lambda row: (sign * row["mean"][main], -row["mean"]["valid_loss"]))


def _cell(name: str, row: dict[str, Any]) -> str:
    """A figure of a row of the table."""
    digits = 1 if name in ("seconds", CONVERGENCE) else 4
    text = f"{row['mean'][name]:.{digits}f}" if name in row["mean"] else "–" if row["mean"] else "failed"
    return f"{text} ± {row['spread'][name]:.{digits}f}" if name in row["spread"] else text


def _lay_out(first: list[list[str]], groups: list[list[list[str]]]) -> list[str]:
    """The lines of Markdown tables that are as wide as `WIDTH` allows.

    Args:
        first: the columns, cells from top to bottom, that each table begins with.
        groups: columns that stay side by side.
    """
    tables: list[list[list[str]]] = []
    for group in groups:
        wide = [*tables[-1], *group] if tables else []
        if not tables or 1 + sum(3 + max(map(len, column)) for column in wide) > WIDTH:
            tables.append([*first])
        tables[-1] += group
    lines = []
    for columns in tables:
        widths = [max(map(len, column)) for column in columns]
        heads, *cells = zip(*columns)
        for line in heads, ["-" * (width - 1) + ":" for width in widths], *cells:
            lines.append(f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths))} |")
        lines.append("")
    return lines


def make_table(results: dict[str, Any]) -> str:
    """The results as Markdown that reads well unrendered too: tables, more than one where it is wide, and notes."""
    rows, best, labels = results["rows"], best_row(results), results["figures"]
    first, shared = [], _shared([row["values"] for row in rows]) if len(rows) > 1 else {}
    for name in [name for name in results["vary"] if name not in shared]:
        values = [str(row["values"].get(name, "–")) for row in rows]
        bold = (f"**{value}**" if row is best else value for value, row in zip(values, rows))
        first.append([name.replace("_", " "), *bold])
    groups = [[[label, *(_cell(name, row) for row in rows)], *_beside(name, results)] for name, label in labels.items()]
    said = [[run["answers"] for run in row["runs"] if "answers" in run] for row in rows]
    questions = STUDIES[results["study"]].questions if results["study"] else ()
    if questions:
        groups.append([[word, *(", ".join(answers[word] for answers in each) for each in said)] for word in questions])
    notes = []
    if "valid_token_accuracy" in labels:
        notes = ["Token accuracy counts single tokens, the end token too, given the right ones before."]
    if CONVERGENCE in labels:
        notes = [f"Convergence: the first epoch at whose end {labels[results['main']]} was the best possible."]
    if best:
        notes.insert(0, f"Best by {labels[deciding(results)]}: {_label(best['values'])}.")
    notes += [f"All runs: {_label(shared)}."] if shared else []
    notes += [f"{case}: {_label(values)}." for case, values in results.get("cases", {}).items() if values]
    if results["seeds"] > 1:
        notes.append(f"Mean and standard deviation of {results['seeds']} training seeds.")
    if _measures_training(results):
        notes.append("Validated on the problems trained on.")
    notes += [f"{run['run']} failed: {run['failed']}" for row in rows for run in row["runs"] if "failed" in run]
    return "\n".join([*_lay_out(first, groups), *(f"- {note}" for note in notes), ""])


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


def _by_epoch(
    folder: Path, name: str, results: dict[str, Any], rows: Sequence[dict[str, Any]], hidden: Iterable[str] = ()
) -> list[Line]:
    """A figure by epoch: a line for each of the rows of the table, and the report's figure at the end of it.

    Args:
        hidden: settings that its label leaves out.
    """
    lines, reports, drawn = [], [], []
    for number, row in enumerate(rows):
        logs = [RunLog(folder / run["run"] / METRICS).read() for run in row["runs"] if "figures" in run]
        points = []
        for entries in zip(*logs):  # one epoch, of all seeds
            values = [entry[name] for entry in entries if name in entry]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((entries[0]["epoch"], statistics.fmean(values), spread))
        if points and _measures_training(results) and name != "loss":  # which the log does not
            points = [(points[-1][0], row["mean"][name], row["spread"].get(name, 0.0))]
        own = {key: value for key, value in row["values"].items() if key not in hidden}
        label = _label(own) + (" (best)" if row is best_row(results) else "")
        lines.append(Line(label or "ours", points, f"C{number}"))
        if points and name in row["reported"] and row["reported"] not in drawn:  # once, where it is that of several
            drawn.append(row["reported"])
            alike = [other["values"] for other in rows if other["reported"] == row["reported"]]
            theirs = {key: value for key, value in _shared(alike).items() if key not in hidden}
            color = "black" if len(alike) > 1 else f"C{number}"
            label = f"{_report(results)} {_label(theirs)}".strip()
            reports.append(Line(label, [(points[-1][0], row["reported"][name], 0.0)], color, reported=True))
    return lines + reports


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The values that all have in common."""
    first, *others = settings
    return {key: first[key] for key in first if all(other.get(key) == first[key] for other in others)}


def _label(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _by_best(folder: Path, figures: dict[str, str], results: dict[str, Any]) -> dict[str, list[Line]]:
    """Panels of figures by epoch: rows that have the best possible figures in common, which is drawn, share a panel."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(tuple(row["best"].items()), []).append(row)
    panels = {}
    for name, panel in figures.items():
        for rows in groups.values():
            best, shared = rows[0]["best"].get(name, 0.0), _shared([row["values"] for row in rows])
            lines = _by_epoch(folder, name, results, rows, shared)
            ends = [point[0] for line in lines for point in line.points]
            if ends and (best or not is_loss(name)):  # a logarithmic axis has no 0
                limit = [(end, best, 0.0) for end in (min(ends), max(ends))]
                lines.append(Line("best possible", limit, "black", limit=True))
            panels[", ".join(filter(None, (panel, _label(shared))))] = lines
    return panels


def draw(results: dict[str, Any], folder: Path, path: Path) -> bool:
    """The results as a picture; returns False where matplotlib is not installed."""
    axis = next(
        (
            name
            for name, values in results["vary"].items()
            if len(values) > 1
            and not results.get("cases")  # which no axis puts in order
            and all(type(value) in (int, float) for value in values)
            and all(name in row["values"] for row in results["rows"])
        ),
        None,
    )
    title = results["study"] or folder.resolve().name
    figures = {name: panel for name, panel in results["figures"].items() if name != "seconds"}
    if all("best" in row for row in results["rows"]):
        figures = {name: panel for name, panel in figures.items() if name in results["rows"][0]["best"]}
        panels = _by_best(folder, figures, results)
        last = max((point[0] for lines in panels.values() for line in lines for point in line.points), default=1)
        ticks = [tick for tick in (1, 5, 50, 500, 5000, 50_000, 500_000) if tick < last]
        return save_panels(panels, "epoch", title, path, [*ticks, last])
    if axis is None:
        shared = _shared([row["values"] for row in results["rows"]])
        panels = {panel: _by_epoch(folder, name, results, results["rows"], shared) for name, panel in figures.items()}
        return save_panels(panels, "epoch", ", ".join(filter(None, (title, _label(shared)))), path)
    best = best_row(results)
    return save_panels(
        {panel: _by_setting(axis, name, results) for name, panel in figures.items()},
        axis.replace("_", " "),
        title,
        path,
        sorted(results["vary"][axis]),
        best["values"][axis] if best else None,
    )
