"""What a run folder holds, read without torch.

config.json          all settings
model.safetensors    the weights after the last finished epoch
resume.safetensors   the same weights with Adam's state: one file, so that the two can never be of different epochs
metrics.jsonl        a line an epoch
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from calcformer.config import PRESETS, RunConfig
from calcformer.errors import InputError, shown
from calcformer.runs.run_log import RunLog

__all__ = [
    "CONFIG",
    "METRICS",
    "MODEL",
    "RESUME",
    "RunError",
    "describe",
    "epoch_of",
    "finished_epochs",
    "list_runs",
    "read_config",
    "saved_epoch",
]

CONFIG, MODEL, RESUME, METRICS = "config.json", "model.safetensors", "resume.safetensors", "metrics.jsonl"
DEEPEST = 3  # folders below the one that is listed


class RunError(InputError):
    """A run folder that is missing or damaged."""


def read_config(folder: Path) -> RunConfig:
    """The settings of a run; RunError where the folder is not one."""
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}; make one with: calcformer train --out {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}; give the folder that training wrote")
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} cannot be used ({error}); train the run again or give another one") from None


def epoch_of(metadata: dict[str, str] | None) -> int:
    """The epoch that a file of tensors says it is from; KeyError or ValueError where it does not."""
    epoch = int((metadata or {})["epoch"])
    if epoch < 0:
        raise ValueError(f"epoch {epoch}")
    return epoch


def _head(path: Path) -> dict[str, Any]:
    """What a file of safetensors says of its tensors: dtype, shape and place of each, by name, and "__metadata__".

    Raises:
        OSError, ValueError: it cannot be read, or is no such file, or not all of it.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        head = json.loads(file.read(length)) if 0 < length <= size else None
    if not isinstance(head, dict):
        raise ValueError("no head")
    ends = [tensor["data_offsets"][1] for name, tensor in head.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{size} bytes")
    return head


def saved_epoch(path: Path) -> int | None:
    """The epoch that a file of tensors is from; None where it cannot be read. Reads the file's head only."""
    try:
        return epoch_of(_head(path).get("__metadata__"))
    except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def finished_epochs(folder: Path) -> int | None:
    """How many epochs of a run are saved, None where there is no run to continue."""
    return saved_epoch(folder / RESUME)


def describe(folder: Path) -> dict[str, Any]:
    """What can be said of a run without loading it, ready for JSON.

    Returns:
        run, task, preset, epoch, epochs; main, the name of the figure that counts, and figures, the newest of each; age
        in seconds; changed, the settings that differ from the preset's, None where this version has no such preset;
        parameters; bytes.

    Raises:
        RunError: the folder is no run, or damaged.
    """
    config = read_config(folder)
    epoch = saved_epoch(folder / MODEL)
    if epoch is None:
        what = "is damaged" if (folder / MODEL).exists() else "is missing"
        raise RunError(f"{folder / MODEL} {what}; restore it with: calcformer train --resume {folder}")
    figures: dict[str, float] = {}
    for entry in RunLog(folder / METRICS).read():
        figures |= {name: entry[name] for name in ("loss", *config.data.figures) if name in entry}
    preset = PRESETS.get(config.preset)
    own = preset.settings if preset is not None else {}
    tensors = [tensor for name, tensor in _head(folder / MODEL).items() if name != "__metadata__"]
    return {
        "run": str(folder),
        "task": config.data.task,
        "preset": config.preset,
        "epoch": epoch,
        "epochs": config.training.epochs,
        "main": next(iter(config.data.figures)),
        "figures": figures,
        "age": time.time() - (folder / MODEL).stat().st_mtime,
        "changed": {name: value for name, value in config.settings.items() if name not in own or own[name] != value}
        if preset is not None
        else None,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """What `describe` says of each run below a folder, in the order of their names; of a broken one, why, as "error".

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {shown(str(folder))}; give one with runs below it")
    patterns = ["*/" * depth + name for depth in range(1, DEEPEST + 1) for name in (CONFIG, MODEL, RESUME, METRICS)]
    rows: list[dict[str, Any]] = []
    for run in sorted({path.parent for pattern in patterns for path in folder.glob(pattern)}):
        try:
            rows.append(describe(run))
        except (InputError, OSError) as error:
            rows.append({"run": str(run), "error": str(error)})
    return rows
