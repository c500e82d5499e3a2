"""What there is: tasks, presets, runs; as JSON and as text. None of it is loaded, and torch is not needed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calcformer.config import PRESETS
from calcformer.errors import SHOWN, InputError, shown
from calcformer.runs.folder import CONFIG, METRICS, MODEL, RESUME, RunError, read_config, read_head, saved_epoch
from calcformer.runs.run_log import RunLog
from calcformer.tasks import TASKS

__all__ = ["describe_run", "list_runs", "list_tasks", "runs_text", "run_text", "tasks_text"]

DEEPEST = 3  # folders below the one that is listed


def list_tasks() -> list[dict[str, Any]]:
    """Every preset: its task, its name, what it is, and figures of the report that it repeats."""
    return [
        {"task": name, "preset": preset, "about": made.about, "reported": made.reported}
        for name, task in TASKS.items()
        for preset, made in task.presets().items()
    ]


def tasks_text() -> str:
    lines: list[list[str]] = []
    for name, task in TASKS.items():
        lines += [[name, "", task.about], *(["", preset, made.about] for preset, made in task.presets().items())]
    return table(["task", "preset", ""], lines)


def describe_run(folder: Path) -> dict[str, Any]:
    """What can be said of a run without loading it.

    Returns:
        run, task, model, preset, epoch, epochs; figures, the newest of each by what people call it, the one that counts
        first; reported, those of the report; age in seconds; changed, the settings that differ from the preset's, all
        where this version has no such preset; parameters; bytes.

    Raises:
        RunError: the folder is no run, or damaged.
    """
    config, path = read_config(folder), folder / MODEL
    epoch = saved_epoch(path)
    if epoch is None:
        what = "damaged" if path.exists() else "missing"
        raise RunError(f"{path} is {what}; restore it with: calcformer train --resume {folder}")
    newest: dict[str, float] = {}
    for entry in RunLog(folder / METRICS).read():
        newest |= entry
    labels = config.data.figures
    usual = PRESETS[config.preset].settings if config.preset in PRESETS else {}
    tensors = [tensor for name, tensor in read_head(path).items() if name != "__metadata__"]
    return {
        "run": str(folder),
        "task": config.data.task,
        "model": config.model.kind,
        "preset": config.preset,
        "epoch": epoch,
        "epochs": config.training.epochs,
        "figures": {label: newest[name] for name, label in labels.items() if name in newest},
        "reported": {labels[name]: value for name, value in config.reported.items() if name in labels},
        "age": time.time() - path.stat().st_mtime,
        "changed": {name: x for name, x in config.settings.items() if name not in usual or usual[name] != x},
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def run_text(run: dict[str, Any]) -> str:
    """What `describe_run` returned."""
    changed = ", ".join(f"{name} {brief(value)}" for name, value in run["changed"].items())
    lines = {
        "run": run["run"],
        "task": f"{run['task']}, preset {run['preset'] or 'unknown'}, {run['model']}",
        "changed": changed or "nothing",
        "epochs": f"{run['epoch']} of {run['epochs']}, {since(run['age'])} ago",
        "figures": figures_text(run["figures"]) or "not measured yet",
        "report": figures_text(run["reported"]),
        "size": f"{run['parameters']:,} parameters, {run['bytes'] / 1e6:,.1f} MB on disk",
    }
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items() if text)


def brief(value: Any) -> str:
    """A setting on a line with others: a text that is long, or of several lines, as errors repeat it."""
    text = str(value)
    return text if len(text) <= SHOWN and text.isprintable() else shown(value)


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """What `describe_run` says of each run below a folder, by name; of one that cannot be used run and error.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {shown(str(folder))}; give one that has runs in it")
    patterns = ["*/" * depth + name for depth in range(1, DEEPEST + 1) for name in (CONFIG, MODEL, RESUME, METRICS)]
    found: list[dict[str, Any]] = []
    for run in sorted({path.parent for pattern in patterns for path in folder.glob(pattern)}):
        try:
            found.append(describe_run(run))
        except (InputError, OSError) as error:
            found.append({"run": str(run), "error": str(error)})
    return found


def runs_text(folder: Path, runs: Sequence[dict[str, Any]]) -> str:
    """What `list_runs` returned of a folder."""
    rows = [
        [
            run["run"],
            run["task"],
            run["preset"],
            f"{run['epoch']}/{run['epochs']}",
            figures_text(dict(list(run["figures"].items())[:1])) or "not measured yet",
            since(run["age"]),
        ]
        for run in runs
        if "error" not in run
    ]
    lines = [table(["run", "task", "preset", "epochs", "figure", "age"], rows)] if rows else []
    lines += [f"{run['run']} cannot be used: {run['error']}" for run in runs if "error" in run]
    return "\n".join(lines) or f"there is no run in {folder}; make one with: calcformer train"


def figures_text(figures: dict[str, float]) -> str:
    return ", ".join(f"{label} {value:.4f}" for label, value in figures.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be, without anything at the end of a line."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join(lines)


def since(seconds: float) -> str:
    """A time in its largest whole unit: 3 h."""
    units = {"d": 86_400, "h": 3_600, "min": 60}
    return next(
        (f"{seconds // size:.0f} {unit}" for unit, size in units.items() if seconds >= size), f"{seconds:.0f} s"
    )
