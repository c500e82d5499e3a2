"""What there is: tasks, presets, runs; as JSON and as text. None of it is loaded, and torch is not needed."""

from __future__ import annotations

import itertools
import math
import shutil
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from calcformer.config import PRESETS, RunConfig
from calcformer.errors import SHOWN, InputError, shown
from calcformer.runs.folder import CONFIG, METRICS, MODEL, RESUME, RunError, read_config, read_head, saved_epoch
from calcformer.runs.run_log import RunLog
from calcformer.settings import is_loss
from calcformer.studies import SWEEP
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
    return table(["task", "preset", "what it is"], lines)


def describe_run(folder: Path) -> dict[str, Any]:
    """What can be said of a run without loading it.

    Returns:
        run, task, model, preset, epoch, epochs; figures, the newest of each by what people call it, the one that counts
        first; best, the best of that one, of any epoch; reported, those of the report; age in seconds; changed, the
        settings that differ from the preset's, all where this version has no such preset; parameters; bytes.

    Raises:
        RunError: the folder is no run, or damaged.
    """
    config, path = read_config(folder), folder / MODEL
    epoch = saved_epoch(path)
    if epoch is None:
        what = "damaged" if path.exists() else "missing"
        raise RunError(f"{path} is {what}; restore it with: calcformer train --resume {folder}")
    labels, newest = config.data.figures, dict[str, float]()
    entries = RunLog(folder / METRICS).read()
    for entry in entries:
        newest |= entry
    main = next(iter(labels))
    best = sorted((entry[main] for entry in entries if main in entry), reverse=not is_loss(main))[:1]
    tensors = [tensor for name, tensor in read_head(path).items() if name != "__metadata__"]
    return {
        "run": str(folder),
        "task": config.data.task,
        "model": config.model.kind,
        "preset": config.preset,
        "epoch": epoch,
        "epochs": config.training.epochs,
        "figures": {label: newest[name] for name, label in labels.items() if name in newest},
        "best": {labels[main]: value for value in best},
        "reported": {labels[name]: value for name, value in config.reported.items() if name in labels},
        "age": time.time() - path.stat().st_mtime,
        "changed": changed_settings(config),
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that differ from the preset's, without those that follow from the others."""
    if config.preset not in PRESETS:
        return config.settings
    preset = PRESETS[config.preset]
    usual = preset.settings | ({} if preset.training.processes else {"processes": config.training.processes})
    found = {name: x for name, x in config.settings.items() if name not in usual or usual[name] != x}
    for name in [name for name in found if name != "model"]:
        with suppress(InputError):  # without it the others do not go together
            rest = preset.with_settings({other: x for other, x in found.items() if other != name}).settings
            if name in rest and rest[name] == found[name]:
                del found[name]
    return found


def flag_of(name: str, value: Any) -> str:
    """A setting as it is given."""
    flag = name.replace("_", "-")
    return f"--{flag if value else f'no-{flag}'}" if isinstance(value, bool) else f"--{flag} {brief(value)}"


def run_text(run: dict[str, Any]) -> str:
    """What `describe_run` returned."""
    changed = ", ".join(flag_of(name, value) for name, value in run["changed"].items())
    lines = {
        "run": run["run"],
        "task": f"{run['task']}, preset {run['preset'] or 'unknown'}, {run['model']}",
        "changed": changed or "nothing",
        "epochs": f"{run['epoch']} of {run['epochs']}, {since(run['age'])} ago",
        "figures": figures_text(run["figures"]) or "not measured yet",
        "best": figures_text(run["best"]) if not run["best"].items() <= run["figures"].items() else "",
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
        raise InputError(
            f"there is no folder {shown(str(folder))}; give one that has runs in it, or make one with: calcformer train"
        )
    patterns = ["*/" * depth + name for depth in range(1, DEEPEST + 1) for name in (CONFIG, MODEL, RESUME, METRICS)]
    found: list[dict[str, Any]] = []
    for run in sorted({path.parent for pattern in patterns for path in folder.glob(pattern)}):
        try:
            found.append(describe_run(run))
        except (InputError, OSError) as error:
            found.append({"run": str(run), "error": str(error)})
    return found


def runs_text(folder: Path, runs: Sequence[dict[str, Any]]) -> str:
    """What `list_runs` returned of a folder; the runs of a sweep are one line, with the best figure of any."""
    rows = []
    for name, group in itertools.groupby((run for run in runs if "error" not in run), key=place_of):
        members = list(group)
        known = [(value, label) for run in members for label, value in run["best"].items()]
        value, label = min(known, key=lambda x: x[0] if is_loss(x[1]) else -x[0], default=(0.0, ""))
        one, ended = members[0], sum(run["epoch"] == run["epochs"] for run in members)
        rows.append(
            [
                name,
                one["task"],
                one["preset"],
                f"{one['epoch']}/{one['epochs']}" if name == one["run"] else f"{ended}/{len(members)} runs",
                figures_text({label: value}) if label else "not measured yet",
                since(min(run["age"] for run in members)),
            ]
        )
    lines = [table(["run", "task", "preset", "epochs", "best figure", "age"], rows)] if rows else []
    for run in runs:
        if "error" in run:
            lines.append(run["error"] if run["run"] in run["error"] else f"{run['run']}: {run['error']}")
    return "\n".join(lines) or f"there is no run in {folder}; make one with: calcformer train"


def place_of(run: dict[str, Any]) -> str:
    """The folder of a run's sweep, or of the run itself where it is in none."""
    folder = Path(run["run"]).parent
    return str(folder) if (folder / SWEEP).exists() else run["run"]


def figures_text(figures: dict[str, float]) -> str:
    return ", ".join(f"{label} {value:.4f}" for label, value in figures.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be, but for the last one, which has what room the terminal leaves."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    *others, _ = widths
    room = max(30, shutil.get_terminal_size((120, 24)).columns - sum(others) - 2 * len(others))
    lines = []
    for *cells, last in [head, *rows]:
        for place, part in enumerate(textwrap.wrap(last, room, break_on_hyphens=False) or [""]):
            row = [*(cells if place == 0 else [""] * len(cells)), part]
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return "\n".join(lines)


def since(seconds: float) -> str:
    """A time in its largest whole unit: 3 h."""
    units = {"d": 86_400, "h": 3_600, "min": 60}
    return next(
        (f"{seconds // size:.0f} {unit}" for unit, size in units.items() if seconds >= size), f"{seconds:.0f} s"
    )
